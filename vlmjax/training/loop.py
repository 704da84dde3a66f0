"""The training loop: read `Run.go` from top to bottom to know when everything happens."""

import time
from collections.abc import Callable
from typing import Any

import jax

from vlmjax.data.formats.folder import Subset
from vlmjax.data.recipe import open_train_sources, train_data
from vlmjax.data.sources import Source, together
from vlmjax.errors import NonFiniteError, UserError
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
from vlmjax.training.hosts import Hosts
from vlmjax.training.metrics import Clock, MetricsLog, ProgressBar, Trace
from vlmjax.training.optimizer import make_schedule
from vlmjax.training.phases import Phases
from vlmjax.training.report import write_report
from vlmjax.training.spikes import Spikes
from vlmjax.training.start import announce, reference, start_state
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
        return Run(recipe, workdir, phases, profile).go()


class Run:
    """One start of a run: what it consists of, the step it has come to, and the state after that step."""

    def __init__(self, recipe: Any, workdir: str, phases: Phases, profile: bool):
        """Everything but the loop: devices, data, model, and the state that the run goes on from."""
        self.recipe, self.phases, self.first = recipe, phases, jax.process_index() == 0
        self.mesh = make_mesh(**recipe.mesh.to_dict())
        check_batch_size(recipe.batch_size, self.mesh, recipe.micro_batches)
        self.folder = folder = Workdir(workdir, writer=self.first)
        if recipe.compilation_cache:
            keep_programs(folder.programs)
        sources, shares = open_train_sources(recipe)
        self.source = together(sources)
        self.lengths = lengths = Durations(recipe, self.source)
        self.tokenizer = build.make_tokenizer(recipe, self.source, folder)
        self.model = build.make_model(recipe, self.tokenizer, self.source)
        schedule = make_schedule(recipe.optimizer, lengths.total, lengths.warmup, lengths.cooldown)

        if recipe.export:
            finish.check_export(self.model)

        # State: random, imported or continued, every array born in its place on the mesh
        self.program = make_program(recipe, self.model, self.mesh, schedule)
        self.checkpoints = Checkpoints(
            folder.checkpoints,
            keep_last=recipe.checkpoint.keep_last,
            keep_best=recipe.checkpoint.keep_best,
            best_metric=recipe.checkpoint.best_metric,
            about=finish.provenance(recipe, self.mesh),
            reference=reference(recipe, self.model, self.program, self.mesh),
        )
        phases.enter("restore")
        barrier("state")
        self.state, saved = start_state(recipe, self.model, self.program, self.mesh, self.checkpoints)
        phases.enter("initialise")
        shape, rows = self.model.config.image.image_shape, local_rows(self.mesh, recipe.batch_size)
        tokens = getattr(self.model.config, "image_tokens", None)
        options = {"rows": rows, "image_tokens": tokens, "classes": build.classes_of(self.model)}
        self.data = train_data(recipe, sources, shares, self.tokenizer, shape, **options)
        if saved:
            self.data.restore(saved, accept=recipe.data.accept_new_mixture)
        self.left_out = saved.get("left_out", 0)  # batches that no update has seen, since the run went back
        self.start = self.step = self.data.step - self.left_out
        self.owed = saved.get("evaluation_owed", False)
        self.evaluations = finish.Evaluations(recipe, self.model, self.tokenizer, self.mesh, folder)
        if self.first:
            finish.describe(folder, recipe, self.model, self.mesh)
            folder.sync()
            told = self.data.mixture.describe()
            announce(recipe, self.state, self.program.stage, self.mesh, lengths, self.start, told)
        self.log = MetricsLog(folder, self.start)
        self.attempts = Attempts(folder, phases, self.start)
        self.hosts = Hosts(folder, phases)
        self.clock = Clock(recipe.batch_size, self.model.config.image.dtype)
        self.bar = ProgressBar(self.start, lengths.total, self.first, self.program.stage.unit)
        begin = min(self.start + 3, lengths.total)
        self.trace = Trace(folder, first=begin, steps=3 if profile else 0)
        spikes = Spikes(folder, recipe.spikes, **saved.get("spikes", {}))
        self.steps = StartedSteps(folder, recipe.nonfinite_limit, spikes, **saved.get("updates", {}))
        self.results: dict[str, float] = {}
        self.compiled: dict[tuple, Callable] = {}  # one for each shape that batches have
        self.save_due = False
        self.stop = StopRequest()

    def go(self) -> dict[str, float]:
        """Train to the end; returns the metrics of the last evaluation."""
        try:
            with leaving_at_once():
                if self.owed:
                    self.results = self._evaluate()
                while self.step < self.lengths.total:
                    if self.steps.spikes.pending:
                        self._go_back()
                    self.step += 1
                    self._update()
                    self._report_step()
                    self._after_step()
        finally:
            self._close()
        self.phases.enter("finish")
        if self.start >= self.lengths.total and not self.results:
            # The run was over before: say again what it reached.
            self.results = self.evaluations.run(self.state, self.step)
        finish.finish(
            self.recipe,
            self.folder,
            self.model,
            self.state,
            self.tokenizer,
            self.evaluations,
            self._last_batch,
        )
        return self.results

    def _last_batch(self) -> Source:
        """The examples of the last step."""
        return Subset(self.source, self.data.indices(self.lengths.total - 1 + self.left_out))

    def _update(self) -> None:
        """Start one step. Its metrics are fetched after the next has been started, so no device waits for them."""
        self.phases.enter("data")
        asked = time.perf_counter()
        batch = next(self.data)
        waited = time.perf_counter() - asked
        keys = batch.pop("key")
        batch = to_global(batch, self.mesh, self.recipe.batch_size)
        self.clock.step(waited, self.program.stage.train_flops(batch, self.state.params))
        shape = tuple(value.shape for value in batch.values())
        first = shape not in self.compiled
        if first:
            self.phases.enter("compile")
            self.compiled[shape] = compiled(self.program, self.state, batch)
        self.trace.before(self.step)
        self.phases.enter("step")
        with jax.transfer_guard("disallow"):
            self.state, metrics = self.compiled[shape](self.state, batch)
        self.trace.after(self.step, metrics)
        self.checkpoints.check()
        self.steps.started(self.step, metrics, keys)
        if first:
            self.steps.settle()
            self.clock.restart()  # rates begin here

    def _report_step(self) -> None:
        """A line of the log where one is due, and the bar."""
        if self.step % self.recipe.log_every == 0 or self.step in (1, self.lengths.total):
            row = {**self.steps.row(), **self.clock.read(), **data_row(self.data, self.clock.seconds)}
            row |= {"examples": self.step * self.recipe.batch_size, **self.hosts.row(), **self.attempts.row()}
            self.log.write(self.step, row)
            self.bar.report(self.step, row)
            self.clock.restart()
        self.bar.step(self.step)

    def _after_step(self) -> None:
        """What is due after this step: to stop, an evaluation, a checkpoint, a report."""
        step, last = self.step, self.step == self.lengths.total
        eval_due = self.lengths.due("eval", step) or last
        self.save_due = self.save_due or self.lengths.due("checkpoint", step)
        if eval_due or self.save_due:
            self.steps.settle()  # nothing is scored or saved that ends the run
        # Numbers of batches never fall, as steps do where a run goes back.
        if self.stop.after(self.data.step):
            self.steps.settle()
            self._save({}, owed=eval_due)  # there may be no time for an evaluation now
            self.stop.raise_at(step)
        if last and self.steps.spikes.pending and self._go_back():
            return
        measured: dict[str, float] = {}
        if eval_due:
            try:
                measured = self.results = self._evaluate()
            except NonFiniteError:
                raise
            except UserError:
                self._save({}, owed=True)  # what was learned is not lost with the score
                raise
        if last or (self.save_due and not self.steps.doubtful):  # the parameters may be what is wrong
            self._save(measured)
            self.save_due = False
        if (self.lengths.due("eval", step) or self.lengths.due("report", step)) and not last and self.first:
            self.phases.enter("finish")
            write_report(self.folder.local)
            self.folder.sync()
        if self.lengths.due("eval", step) or self.lengths.due("checkpoint", step):
            self.clock.restart()

    def _evaluate(self) -> dict[str, float]:
        self.phases.enter("evaluate")
        measured = self.evaluations.run(self.state, self.step)
        self.log.write(self.step, measured)
        return measured

    def _save(self, measured: dict[str, float], owed: bool = False) -> None:
        self.phases.enter("checkpoint")
        position = {
            **self.data.state,
            "left_out": self.left_out,
            "updates": self.steps.state,
            "spikes": self.steps.spikes.state,
            "evaluation_owed": owed,
        }
        self.checkpoints.save(self.step, self.state, position, measured)
        self.attempts.saved(self.step)
        self.folder.sync()

    def _go_back(self) -> bool:
        """After a spike of the loss: to a checkpoint from well before it, while the data go on from here.

        Returns whether there was one that is old enough.
        """
        spike, self.steps.spikes.pending = self.steps.spikes.pending, None
        self.phases.enter("restore")
        rewind = self.recipe.spikes.rewind
        back = self.checkpoints.newest_before(spike.first - rewind) if rewind else None
        if back is None:
            self.steps.spikes.tell(spike)
            return False
        self.state = None  # there may not be room for two
        why = f"the loss rose in steps {spike.first} to {spike.last}"
        back, self.state = self.checkpoints.go_back(back, self.program.state, why)
        self.steps.spikes.tell(spike, back, range(self.data.step - (self.step - back), self.data.step))
        self.left_out += self.step - back
        self.step = back
        self.save_due = False
        self.steps.forget()
        self.attempts.went_back(back)
        self.log.close()
        self.log = MetricsLog(self.folder, back)
        self.clock.restart()
        return True

    def _close(self) -> None:
        self.phases.enter("checkpoint")
        self.stop.close()
        self.trace.close()
        self.bar.close()
        self.log.close()
        self.data.close()
        self.checkpoints.close()  # a stop for bad data must not tear a checkpoint that is being written
        if self.start < self.lengths.total:
            self.attempts.row()
        self.folder.sync()
