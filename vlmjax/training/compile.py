"""The program of a run: the compiled step, and the shapes and places of what goes into it."""

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from vlmjax.errors import RecipeError
from vlmjax.models import blip, blip_tasks, classifier, clip, vlm
from vlmjax.models.layers import DTYPES
from vlmjax.sharding.mesh import batch_sharding
from vlmjax.sharding.peers import barrier
from vlmjax.stages.blip import BlipPretraining
from vlmjax.stages.blip_nlvr import BlipStatements
from vlmjax.stages.blip_vqa import BlipAnswers
from vlmjax.stages.classification import Classification
from vlmjax.stages.contrastive import Contrastive
from vlmjax.stages.generative import Generative
from vlmjax.stages.stage import Stage
from vlmjax.training.optimizer import make_optimizer
from vlmjax.training.state import TrainState, make_state, split, state_shardings
from vlmjax.training.step import make_train_step

STAGES = {
    "contrastive": Contrastive,
    "generative": Generative,
    "blip": BlipPretraining,
    "blip_vqa": BlipAnswers,
    "blip_nlvr": BlipStatements,
    "classification": Classification,
}
# The smallest inputs that make every parameter of a model.
EXAMPLES = {
    clip.Clip: clip.example_inputs,
    vlm.Vlm: vlm.example_inputs,
    classifier.Classifier: classifier.example_inputs,
    blip.Blip: lambda config: blip.example_inputs(blip.Blip(config)),
    blip_tasks.BlipVqa: lambda config: blip_tasks.example_inputs(blip_tasks.BlipVqa(config)),
    blip_tasks.BlipNlvr: lambda config: blip_tasks.example_inputs(blip_tasks.BlipNlvr(config)),
}
Tree = Any


class Program(NamedTuple):
    """What a recipe compiles to on a mesh: training runs it, planning only compiles it.

    `step` is the jitted (state, batch) -> (state, metrics), which takes over the memory of its state. `state` and
    `batch` are shapes, dtypes and shardings of its arguments. `make` turns a model's parameters into a first state.
    """

    stage: Stage
    step: Any
    state: TrainState
    batch: dict[str, jax.ShapeDtypeStruct]
    make: Callable[[Tree], TrainState]


def make_program(recipe: Any, model: Any, mesh: Mesh, schedule: optax.Schedule) -> Program:
    """The program of a validated recipe. Nothing is computed, so the devices of `mesh` need not exist here."""
    check_heads(model.config, mesh)
    stage = STAGES[recipe.stage](recipe, model, mesh)
    frozen = (*recipe.frozen, *stage.frozen)
    shapes = jax.eval_shape(lambda: stage.with_own_params(init_params(model, recipe.seed)))
    optimizer = make_optimizer(recipe.optimizer, schedule, *split(shapes, frozen))

    def make(params: Tree) -> TrainState:
        whole = stage.with_own_params(params)
        ema = bool(recipe.ema.decay)
        return make_state(whole, frozen, optimizer, ema, stage.init_extra, DTYPES[stage.frozen_dtype])

    abstract = jax.eval_shape(make, shapes)
    places = state_shardings(abstract, stage.placement(recipe.sharding, shapes), mesh)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)
    step = make_train_step(
        stage,
        optimizer,
        schedule,
        mesh,
        seed=recipe.seed,
        micro_batches=recipe.micro_batches,
        ema_decay=recipe.ema.decay,
    )
    step = jax.jit(
        step, donate_argnums=0, out_shardings=(places, None), compiler_options=compiler_options(mesh)
    )
    return Program(stage, step, state, abstract_batch(stage, recipe.batch_size, mesh), make)


def compiled(program: Program, state: TrainState, batch: Mapping) -> Callable:
    """The step of a program compiled for these very arrays, once every process has compiled it.

    Processes compile at different speeds; without the wait the fast ones would count it as silence of the slow ones.
    """
    update = program.step.lower(state, batch).compile()
    barrier("compiled")
    return update


def keep_programs(folder: str) -> None:
    """Have jax keep what it compiles in a folder or bucket, unless the environment names another."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # one process may train in several folders


def check_heads(config: Any, mesh: Mesh) -> None:
    """Raise RecipeError unless every tower's heads can be dealt out evenly along `tensor`."""
    parts = mesh.shape["tensor"]
    text = getattr(config, "text", None)  # which a classifier has not
    words = "language.kv_heads" if hasattr(text, "kv_heads") else "text.heads"
    for key, tower in (("image.heads", config.image), *([(words, text)] if text else [])):
        name, heads = key.partition(".")[0], getattr(tower, "kv_heads", tower.heads)
        if heads % parts:
            fits = [n for n in range(1, heads + 1) if heads % n == 0]
            raise RecipeError(
                f"config.mesh.tensor={parts} does not divide the {heads} heads of the {name} tower "
                f"(config.model.{key}): choose one of {', '.join(map(str, fits))}"
            )


def init_params(model: Any, seed: int) -> Tree:
    """Random fp32 parameters of a model, a function of the seed alone."""
    return model.init(jax.random.key(seed), **EXAMPLES[type(model)](model.config))["params"]


def abstract_batch(stage: Stage, batch_size: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the arrays that data/pipeline.py makes, on the mesh."""
    rows = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows)
        for name, (shape, dtype) in stage.batch_shapes().items()
    }


def compiler_options(mesh: Mesh) -> Mapping[str, str] | None:
    """What XLA is told about a program, by the kind of device it is for; None where its defaults are right.

    On a TPU one transfer between neighbours waits for the other unless more are allowed; a ring sends in both
    directions, and several blocks at once.
    """
    if mesh.devices.flat[0].platform == "tpu":
        return {"xla_max_concurrent_async_collective_permutes": "16"}
    return None
