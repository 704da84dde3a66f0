"""What a run leaves beside its checkpoints: evaluations, what the report shows, the report and the export."""

import platform
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import vlmjax
from vlmjax.data.form import Form
from vlmjax.data.sources import Source
from vlmjax.errors import HubError, RecipeError
from vlmjax.evals.benchmark import Benchmark, EvalResult, benchmark_of
from vlmjax.evals.choose import Evaluators
from vlmjax.evals.table import print_results
from vlmjax.models.lora import merged
from vlmjax.training import build
from vlmjax.training.report import save_result, save_similarity, write_report
from vlmjax.training.state import TrainState, merge
from vlmjax.training.workdir import Workdir

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "transformers")


class Evaluations:
    """The evaluations of a recipe, their sources opened and towers compiled once for all of them."""

    def __init__(self, recipe: Any, model: Any, tokenizer: Any, mesh: Mesh, workdir: Workdir):
        """Open every entry of `recipe.evals` that names data; raises RecipeError before any training."""
        transform = build.eval_transform(recipe, model.config.image.image_shape)
        parts = {"model": model, "tokenizer": tokenizer, "transform": transform, "mesh": mesh}
        self._dual = recipe.stage in ("contrastive", "blip")
        form = Form.of_recipe(recipe) if recipe.stage == "generative" else None
        self._makers = Evaluators(**parts, form=form, images_per_row=recipe.data.images_per_row)
        self._recipe = recipe
        self._workdir, self._batch_size = workdir, min(recipe.batch_size, 256)
        self._evaluators = []
        for name, entry in recipe.evals.items():
            if entry.data:
                batch = entry.batch_size or self._batch_size
                said = {**entry.to_dict(), "batch_size": batch, "clean": recipe.data.clean}
                benchmark = benchmark_of(name, said)
                with build.naming(f"evals.{name}"):
                    self._evaluators.append(self._makers.of(benchmark))
        self.results: list[EvalResult] = []

    def run(self, state: TrainState, step: int) -> dict[str, float]:
        """Score a state (its averaged parameters where it has them); metrics as `eval/<name>/<metric>`.

        Args:
          state: of the run.
          step: it has come to: the report tells answers of several steps apart.
        """
        params = evaluated(state, self._recipe)
        self.results = [evaluator.run(params) for evaluator in self._evaluators]
        if self._workdir.writer:
            for result in self.results:
                save_result(self._workdir.local, result, step)
        return {key: value for result in self.results for key, value in result.row().items()}

    def compare(self, state: TrainState, batch: Callable[[], Source]) -> None:
        """Keep the similarity matrix of some pairs of a batch, where no retrieval evaluation leaves one."""
        if not self._dual or any(
            evaluator.benchmark.benchmark == "retrieval" for evaluator in self._evaluators
        ):
            return
        size, batch = self._batch_size, batch()
        benchmark = Benchmark("batch", "retrieval", batch.name, examples=size, batch_size=size)
        details = self._makers.of(benchmark, batch).run(evaluated(state, self._recipe)).details
        if self._workdir.writer:
            pairs = details["similarity"]
            save_similarity(self._workdir.local, pairs["images"], pairs["captions"], pairs["similarity"])


def evaluated(state: TrainState, recipe: Any) -> Any:
    """The model's parameters as they are evaluated and exported.

    The moving average where the recipe keeps one; low-rank adapters are merged into their kernels.
    """
    return merged(merge(state.ema or state.params, state.frozen), recipe.lora.alpha)


def check_export(model: Any) -> None:
    """Raise RecipeError, before anything is trained, for a model that no Hugging Face class can express."""
    from vlmjax.hub.folder import family_of

    try:
        family_of(model).to_config(model)
    except HubError as error:
        raise RecipeError(
            f"config.export=True: {error}; set config.export=False to train it all the same"
        ) from None


def describe(workdir: Workdir, recipe: Any, model: Any, mesh: Mesh) -> None:
    """Write recipe.json, model.json and environment.json, which make the folder readable by itself."""
    workdir.write_json("recipe.json", recipe.to_dict())
    workdir.write_json("model.json", build.model_to_json(model))
    workdir.write_json("environment.json", environment(mesh))


def environment(mesh: Mesh) -> dict[str, Any]:
    """Machine, devices, mesh and versions of a run."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "packages": {"vlmjax": vlmjax.__version__, **{name: metadata.version(name) for name in PACKAGES}},
    }


def provenance(recipe: Any, mesh: Mesh) -> dict[str, Any]:
    """What every checkpoint says of its origin: the resolved recipe, its seed, and the environment."""
    return {"recipe": recipe.to_dict(), "seed": recipe.seed, "environment": environment(mesh)}


def finish(
    recipe: Any,
    workdir: Workdir,
    model: Any,
    state: TrainState,
    tokenizer: Any,
    evaluations: Evaluations,
    batch: Callable[[], Source],
) -> None:
    """End a run: the table of results, the report (with pairs of `batch`, the last one), the Hugging Face folder."""
    evaluations.compare(state, batch)
    if recipe.export:
        export_params = jax.tree.map(_whole, evaluated(state, recipe))
    if not workdir.writer:
        return
    if evaluations.results:
        print_results(evaluations.results)
    write_report(workdir.local)
    print(f"report      {workdir.path('report.html')}")
    if recipe.export:
        from vlmjax import hub

        transform = build.eval_transform(recipe, model.config.image.image_shape)
        form = Form.of_recipe(recipe) if recipe.stage == "generative" else None
        processor = {"tokenizer": tokenizer, "image_processor": transform, "form": form}
        hub.save(model, export_params, workdir.path("hf"), **processor, clean=recipe.data.clean)
        print(f"export      {workdir.path('hf')}")
    workdir.sync()


def _whole(array: jax.Array) -> np.ndarray:
    """A parameter on the host, gathered from every process."""
    if not array.is_fully_addressable:
        mesh = array.sharding.mesh
        array = jax.jit(jnp.copy, out_shardings=NamedSharding(mesh, PartitionSpec()))(array)
    return np.asarray(array.addressable_data(0)) if not array.is_fully_addressable else np.asarray(array)
