"""The training loop: read `train` from top to bottom to know when everything happens."""

import time
from typing import Any

import jax

from vlmjax.data.formats.folder import Subset
from vlmjax.data.recipe import open_train_sources, train_data
from vlmjax.data.sources import together
from vlmjax.errors import NonFiniteError, UserError
from vlmjax.models import flops
from vlmjax.sharding import distributed
from vlmjax.sharding.mesh import check_batch_size, local_rows, make_mesh, to_global
from vlmjax.sharding.peers import barrier, leaving_at_once
from vlmjax.training import build, finish
from vlmjax.training.attempts import Attempts
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import compiled, keep_programs, make_program
from vlmjax.training.data_metrics import data_row
from vlmjax.training.durations import Durations
from vlmjax.training.finite import StartedSteps
from vlmjax.training.metrics import Clock, MetricsLog, ProgressBar, Trace
from vlmjax.training.optimizer import make_schedule
from vlmjax.training.phases import Phases
from vlmjax.training.report import write_report
from vlmjax.training.start import announce, start_state
from vlmjax.training.stop import StopRequest
from vlmjax.training.watchdog import Watchdog
from vlmjax.training.workdir import Workdir


@leaving_at_once()
def train(
    recipe: Any, workdir: str, *, profile: bool = False, began: float | None = None
) -> dict[str, float]:
    """Run a validated recipe in a work folder, continuing what is there; returns the last evaluation's metrics.

    Args:
      recipe: from `config.validate`.
      workdir: folder or bucket of the run.
      profile: whether to trace a few early steps.
      began: when the process did, on `time.monotonic`; what lies between is time of this run.

    Raises:
      UserError: see vlmjax/errors.py; NonFiniteError leaves `nonfinite-STEP.json` with the examples of the batch. What
        ends processes without an exception is in docs/runs.md.
    """
    phases = Phases(began)
    distributed.initialize()
    with Watchdog(phases, recipe.watchdog):
        return _train(recipe, workdir, phases, profile)


def _train(recipe: Any, workdir: str, phases: Phases, profile: bool) -> dict[str, float]:
    # Set-up: devices, data, model
    first = jax.process_index() == 0
    mesh = make_mesh(**recipe.mesh.to_dict())
    check_batch_size(recipe.batch_size, mesh, recipe.micro_batches)
    folder = Workdir(workdir, writer=first)
    if recipe.compilation_cache:
        keep_programs(folder.programs)
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
    phases.enter("restore")
    barrier("state")
    state, saved = start_state(recipe, model, program, mesh, checkpoints)
    phases.enter("initialise")
    shape, rows = model.config.image.image_shape, local_rows(mesh, recipe.batch_size)
    data = train_data(recipe, sources, shares, tokenizer, shape, rows=rows)
    if saved:
        data.restore(saved, accept=recipe.data.accept_new_mixture)
    start = data.step
    evaluations = finish.Evaluations(recipe, model, tokenizer, mesh, folder)
    if first:
        finish.describe(folder, recipe, model, mesh)
        folder.sync()
        announce(recipe, state, program.stage, mesh, lengths, start, data.mixture.describe())
    log = MetricsLog(folder, start)
    attempts = Attempts(folder, phases, start)
    towers = {"image": "vision_model", "text": "text_model"}
    locked = [tower for tower, tree in towers.items() if tree not in state.params]
    work = flops.train_flops(model.config, recipe.batch_size, locked=locked)
    clock = Clock(recipe.batch_size, work, model.config.image.dtype)
    bar = ProgressBar(start, lengths.total, shown=first)
    trace = Trace(folder, first=min(start + 3, lengths.total), steps=3 if profile else 0)
    steps = StartedSteps(folder, recipe.nonfinite_limit, **saved.get("updates", {}))
    results: dict[str, float] = {}
    save_due = False
    stop = StopRequest()

    def evaluate(step: int) -> dict[str, float]:
        phases.enter("evaluate")
        measured = evaluations.run(state)
        log.write(step, measured)
        return measured

    def save(step: int, measured: dict[str, float], owed: bool = False) -> None:
        phases.enter("checkpoint")
        position = {**data.state, "updates": steps.state, "evaluation_owed": owed}
        checkpoints.save(step, state, position, measured)
        attempts.saved(step)
        folder.sync()

    # Loop. The metrics of a step are fetched after the next one has been started, so the device never waits for them.
    try:
        with leaving_at_once():
            if saved.get("evaluation_owed"):
                results = evaluate(start)
            for step in range(start + 1, lengths.total + 1):
                phases.enter("data")
                asked = time.perf_counter()
                batch = next(data)
                clock.step(time.perf_counter() - asked)
                keys = batch.pop("key")
                batch = to_global(batch, mesh, recipe.batch_size)
                if step == start + 1:
                    phases.enter("compile")
                    update = compiled(program, state, batch)
                trace.before(step)
                phases.enter("step")
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, batch)
                trace.after(step, metrics)
                checkpoints.check()
                steps.started(step, metrics, keys)
                if step == start + 1:
                    steps.settle()
                    clock.restart()  # rates begin here
                if step % recipe.log_every == 0 or step in (1, lengths.total):
                    row = {**steps.row(), **clock.read(), **data_row(data, clock.seconds)}
                    log.write(step, {**row, "examples": step * recipe.batch_size, **attempts.row()})
                    bar.report(step, row)
                    clock.restart()
                bar.step(step)
                last = step == lengths.total
                eval_due = lengths.due("eval", step) or last
                save_due = save_due or lengths.due("checkpoint", step)
                if eval_due or save_due:
                    steps.settle()  # nothing is scored or saved that ends the run
                if stop.after(step):
                    steps.settle()
                    save(step, {}, owed=eval_due)  # there may be no time for an evaluation now
                    stop.raise_at(step)
                measured: dict[str, float] = {}
                if eval_due:
                    try:
                        measured = results = evaluate(step)
                    except NonFiniteError:
                        raise
                    except UserError:
                        save(step, {}, owed=True)  # what was learned is not lost with the score
                        raise
                if last or (save_due and not steps.streak):  # the parameters may be what is wrong
                    save(step, measured)
                    save_due = False
                if (lengths.due("eval", step) or lengths.due("report", step)) and not last and first:
                    phases.enter("finish")
                    write_report(folder.local)
                    folder.sync()
                if lengths.due("eval", step) or lengths.due("checkpoint", step):
                    clock.restart()
    finally:
        phases.enter("checkpoint")
        stop.close()
        trace.close()
        bar.close()
        log.close()
        data.close()
        checkpoints.close()  # a stop for bad data must not tear a checkpoint that is being written
        if start < lengths.total:
            attempts.row()
        folder.sync()
    phases.enter("finish")
    if start >= lengths.total and not results:
        results = evaluations.run(state)  # the run was over before: say again what it reached
    last_batch = Subset(source, data.indices(lengths.total - 1))
    finish.finish(recipe, folder, model, state, tokenizer, evaluations, last_batch)
    return results
