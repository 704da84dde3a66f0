"""The training loop: read `train` from top to bottom to know when everything happens."""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vlmjax.data.formats.folder import Subset
from vlmjax.data.recipe import open_train_sources, train_data
from vlmjax.data.sources import together
from vlmjax.errors import NonFiniteError, UserError
from vlmjax.models import flops
from vlmjax.sharding import distributed
from vlmjax.sharding.mesh import check_batch_size, local_rows, make_mesh, to_global
from vlmjax.training import build, finish
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import make_program
from vlmjax.training.data_metrics import data_row
from vlmjax.training.durations import Durations
from vlmjax.training.metrics import Clock, MetricsLog, ProgressBar, Trace
from vlmjax.training.optimizer import make_schedule
from vlmjax.training.report import write_report
from vlmjax.training.start import announce, start_state
from vlmjax.training.stop import StopRequest
from vlmjax.training.workdir import Workdir


def train(recipe: Any, workdir: str, *, profile: bool = False) -> dict[str, float]:
    """Run a validated recipe in a work folder, continuing what is there; returns the last evaluation's metrics.

    Raises:
      UserError: see vlmjax/errors.py; NonFiniteError leaves `nonfinite-STEP.json` with the examples of the batch.
    """
    # Set-up: devices, data, model
    distributed.initialize()
    first = jax.process_index() == 0
    mesh = make_mesh(**recipe.mesh.to_dict())
    check_batch_size(recipe.batch_size, mesh, recipe.micro_batches)
    folder = Workdir(workdir, writer=first)
    sources, shares = open_train_sources(recipe)
    source = together(sources)
    lengths = Durations(recipe, source)
    tokenizer = build.make_tokenizer(recipe, source, folder)
    model = build.make_model(recipe, tokenizer)
    schedule = make_schedule(recipe.optimizer, lengths.total, lengths.warmup, lengths.cooldown)
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep_last=recipe.checkpoint.keep_last,
        keep_best=recipe.checkpoint.keep_best,
        best_metric=recipe.checkpoint.best_metric,
        about=finish.provenance(recipe, mesh),
    )

    # State: random, imported or continued, every array born in its place on the mesh
    program = make_program(recipe, model, mesh, schedule)
    state, data_state = start_state(recipe, model, program, mesh, checkpoints)
    shape, rows = model.config.image.image_shape, local_rows(mesh, recipe.batch_size)
    data = train_data(recipe, sources, shares, tokenizer, shape, rows=rows)
    if data_state:
        data.restore(data_state, accept=recipe.data.accept_new_mixture)
    start = data.step
    evaluations = finish.Evaluations(recipe, model, tokenizer, mesh, folder)
    if first:
        finish.describe(folder, recipe, model, mesh)
        folder.sync()
        announce(recipe, state, program.stage, mesh, lengths, start, data.mixture.describe())
    log = MetricsLog(folder, start)
    towers = {"image": "vision_model", "text": "text_model"}
    locked = [tower for tower, tree in towers.items() if tree not in state.params]
    work = flops.train_flops(model.config, recipe.batch_size, locked=locked)
    clock = Clock(recipe.batch_size, work, model.config.image.dtype)
    bar = ProgressBar(start, lengths.total, shown=first)
    trace = Trace(folder, first=min(start + 3, lengths.total), steps=3 if profile else 0)
    recent: deque = deque(maxlen=2)
    pending: tuple[int, Any] | None = None
    results: dict[str, float] = {}
    stop = StopRequest()

    # Loop. The metrics of a step are fetched after the next one has been started, so the device never waits for them.
    try:
        for step in range(start + 1, lengths.total + 1):
            asked = time.perf_counter()
            batch = next(data)
            clock.step(time.perf_counter() - asked)
            recent.append((step, batch.pop("key")))
            batch = to_global(batch, mesh, recipe.batch_size)
            trace.before(step)
            with jax.transfer_guard("disallow"):
                state, metrics = program.step(state, batch)
            trace.after(step, metrics)
            checkpoints.check()
            if pending:
                _check(pending, recent, folder)
            pending = (step, metrics)
            if step == start + 1:
                jax.block_until_ready(metrics)  # compilation is over; rates begin here
                clock.restart()
            if step % recipe.log_every == 0 or step in (1, lengths.total):
                row = {
                    **_row(_check(pending, recent, folder)),
                    **clock.read(),
                    **data_row(data, clock.seconds),
                }
                log.write(step, {**row, "examples": step * recipe.batch_size})
                bar.report(step, row)
                clock.restart()
            bar.step(step)
            last = step == lengths.total
            measured: dict[str, float] = {}
            if lengths.due("eval", step) or last:
                _check(pending, recent, folder)
                try:
                    measured = results = evaluations.run(state)
                except UserError:
                    checkpoints.save(
                        step, state, data.state, {}
                    )  # what was learned is not lost with the score
                    raise
                log.write(step, results)
            if lengths.due("checkpoint", step) or last or stop.number:
                _check(pending, recent, folder)
                checkpoints.save(step, state, data.state, measured)
                folder.sync()
            if stop.number and not last:
                stop.raise_at(step)
            if (lengths.due("eval", step) or lengths.due("report", step)) and not last and first:
                write_report(folder.local)
                folder.sync()
            if lengths.due("eval", step) or lengths.due("checkpoint", step):
                clock.restart()
    finally:
        stop.close()
        trace.close()
        bar.close()
        log.close()
        data.close()
        checkpoints.close()  # a stop for bad data must not tear a checkpoint that is being written
        folder.sync()
    if start >= lengths.total:
        results = evaluations.run(state)  # the run was over before: say again what it reached
    last_batch = Subset(source, data.indices(lengths.total - 1))
    finish.finish(recipe, folder, model, state, tokenizer, evaluations, last_batch)
    return results


def _check(pending: tuple[int, Any], recent: deque, folder: Workdir) -> Mapping[str, Any]:
    """The metrics of a started step, fetched; raise where it was not finite (the state was left as it was)."""
    step, metrics = pending
    metrics = jax.device_get(metrics)
    if metrics["finite"]:
        return metrics
    groups = sorted(name for name, ok in metrics["finite_groups"].items() if not ok)
    keys = next((list(map(str, keys)) for number, keys in recent if number == step), [])
    name = f"nonfinite-{step}" + (f"-p{jax.process_index()}" if jax.process_count() > 1 else "") + ".json"
    record = {
        "step": step,
        "loss": str(metrics["loss"]),
        "grad_norm": str(metrics["grad_norm"]),
        "groups": groups,
    }
    address = folder.leave(name, {**record, "keys": keys})
    raise NonFiniteError(
        f"step {step}: loss {metrics['loss']} and gradient norm {metrics['grad_norm']} are not finite "
        f"(parameter groups: {', '.join(groups) or 'none, the loss alone'}); the examples of the batch are in "
        f"{address}. Lower optimizer.learning_rate, set optimizer.clip_norm, or exclude those records."
    )


def _row(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: np.asarray(v).item() for k, v in metrics.items() if k not in ("finite", "finite_groups")}
