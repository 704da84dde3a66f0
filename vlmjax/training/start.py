"""How a run begins: the first or the continued state, and what is told about it."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from vlmjax.data import images
from vlmjax.errors import RecipeError
from vlmjax.sharding.rules import format_table, shardings
from vlmjax.training.build import import_params
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.durations import Durations
from vlmjax.training.state import TrainState, count, make_state, merge, split, state_shardings

Tree = Any


def start_state(
    recipe: Any,
    model: Any,
    optimizer_of: Callable[[Tree, Tree], optax.GradientTransformation],
    stage: Any,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[TrainState, dict[str, Any], optax.GradientTransformation]:
    """The state a run goes on from: its newest checkpoint, imported parameters, or random ones.

    Nothing is ever whole on one device: random numbers are drawn by a program compiled with its output shardings,
    imported and restored arrays are read slice by slice. Where there is a checkpoint nothing is imported.

    Args:
      optimizer_of: makes the optimizer from the shapes of the trainable and of the frozen parameters.
      stage: whose frozen parameters, added parameters and extra state it has.

    Returns:
      (state, data position of the checkpoint or {}, optimizer).
    """
    check_heads(model.config, mesh)
    frozen = (*recipe.frozen, *stage.frozen)

    def init() -> Tree:
        return stage.with_own_params(init_params(model, recipe.seed))

    shapes = jax.eval_shape(init)
    optimizer = optimizer_of(*split(shapes, frozen))

    def make(params: Tree) -> TrainState:
        return make_state(params, frozen, optimizer, bool(recipe.ema.decay), stage.init_extra)

    abstract = jax.eval_shape(make, shapes)
    places = state_shardings(abstract, recipe.sharding, mesh)
    step = checkpoints.latest()
    if step is not None:
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places
        )
        state, data = checkpoints.restore(step, target)
        return state, data, optimizer
    if not recipe.init_from:
        return jax.jit(lambda: make(init()), out_shardings=places)(), {}, optimizer
    places_of_model = shardings(
        recipe.sharding, jax.eval_shape(lambda: init_params(model, recipe.seed)), mesh
    )
    imported = import_params(recipe, model, places_of_model)
    whole = jax.jit(lambda params: make(stage.with_own_params(params)), out_shardings=places)
    return whole(imported), {}, optimizer


def check_heads(config: Any, mesh: Mesh) -> None:
    """Raise RecipeError unless every tower's heads can be dealt out evenly along `tensor`."""
    parts = mesh.shape["tensor"]
    for name, tower in (("image", config.image), ("text", config.text)):
        if tower.heads % parts:
            fits = [n for n in range(1, tower.heads + 1) if tower.heads % n == 0]
            raise RecipeError(
                f"config.mesh.tensor={parts} does not divide the {tower.heads} heads of the {name} tower "
                f"(config.model.{name}.heads): choose one of {', '.join(map(str, fits))}"
            )


def init_params(model: Any, seed: int) -> Tree:
    """Random fp32 parameters of a dual encoder, a function of the seed alone."""
    config = model.config
    size = config.image.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixels = np.zeros((1, height, width, 3), np.float32)
    ids = np.zeros((1, config.text.max_length), np.int32)
    return model.init(jax.random.key(seed), pixels, ids, attention_mask=np.ones_like(ids))["params"]


def announce(
    recipe: Any, state: TrainState, stage: Any, mesh: Mesh, lengths: Durations, start: int, sources: str
) -> None:
    """Print what is about to run: devices, data, parameters and where each of them lives."""
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    devices = (
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s) in {jax.process_count()} process(es)"
    )
    print(f"devices     {devices}; mesh {axes}")
    print(f"data        {sources}; batch {recipe.batch_size}")
    backend = ", ".join(f"{what} by {name}" for what, name in images.backend().items() if what != "pillow")
    print(f"pictures    {backend}")
    print(f"loss        {stage.describe()}")
    trainable, frozen = count(state.params), count(state.frozen)
    print(f"parameters  {trainable + frozen:,} ({trainable:,} trained, {frozen:,} frozen)")
    over = start >= lengths.total
    print(
        f"steps       {start} to {lengths.total}"
        + (" (done before)" if over else " (continued)" if start else "")
    )
    print(format_table(recipe.sharding, merge(state.params, state.frozen), mesh))
    if not over:
        print("the first step compiles the program, which takes a while", flush=True)
