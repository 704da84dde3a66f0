"""Checkpoints of a run: the state and the data position, written in the background, restored onto any mesh."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from vlmjax.errors import CheckpointError, DamagedCheckpoint
from vlmjax.sharding import vote
from vlmjax.training import reading, records, restoring

Tree = Any


class Checkpoints:
    """The numbered checkpoints of a run.

    `N/state` holds the arrays, `N/data` the data position (json: step, seed, source fingerprint) and `N/record` the
    digest of every array, with what made them.
    """

    def __init__(
        self,
        folder: str,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_metric: str = "",
        writable: bool = True,
        about: Mapping[str, Any] | None = None,
        reference: records.Reference | None = None,
    ):
        """Name a folder of checkpoints; it is created when it is first written to.

        Args:
          folder: local path or gs:// address.
          keep_last: newest ones kept. The newest one whose parameters are finite is kept besides.
          keep_best: ones kept with the highest `best_metric`, besides.
          best_metric: name among the metrics given to `save`.
          writable: False for commands that only read.
          about: what each record says beside the digests: recipe, mesh, versions (see `finish.provenance`).
          reference: where the frozen parameters are from, which then are named in each checkpoint and not written.
        """
        if not writable and "://" not in folder and not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder of checkpoints")
        self.folder, self.best_metric, self.writable = folder, best_metric, writable
        self._keep = keep_last, keep_best
        self._about, self._reference = dict(about or {}), reference
        self._known: dict[int, dict[str, Any]] = {}
        self._manager: ocp.CheckpointManager | None = None
        self._saving = False

    def open(self) -> ocp.CheckpointManager:
        """Make the folder ready to be written, which clears away what unfinished writes left there.

        After a restore: what opens it waits for all processes, on their devices.
        """
        if self._manager:
            return self._manager
        manager, (keep_last, keep_best) = checkpoint_managers, self._keep
        keep = [manager.LatestN(n=max(keep_last, 1)), _NewestFinite(self._known)]
        if self.best_metric and keep_best:
            keep.append(_Best(self._known, self.best_metric, keep_best))
        self._known.update({step: _known(self.folder, step) for step in self.steps()})
        with self._writing():
            self._manager = ocp.CheckpointManager(
                self.folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=manager.AnyPreservationPolicy(keep),
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=True,
                ),
                item_names=("state", "data", records.ITEM),
                item_handlers={
                    "state": ocp.StandardCheckpointHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                    records.ITEM: ocp.JsonCheckpointHandler(),
                },
            )
        return self._manager

    def steps(self) -> list[int]:
        """Numbers of the finished checkpoints, in ascending order."""
        return reading.steps_in(self.folder)

    def latest(self) -> int | None:
        """Number of the newest finished checkpoint."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: Tree, data: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Start writing checkpoint `step`; returns as soon as the arrays have been copied off the devices.

        Raises:
          CheckpointError: where the previous write failed in the background, so that it is not lost in a log.
        """
        manager = self.open()
        if step in manager.all_steps():
            return
        scores = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
        if self._reference:
            self._name_frozen(state.frozen)
            state = state.replace(frozen={})
        record = records.make(state, data, {**self._about, "metrics": scores})
        self._known[step] = record
        items = {
            "state": ocp.args.StandardSave(state),
            "data": ocp.args.JsonSave(dict(data)),
            records.ITEM: ocp.args.JsonSave(records.seal(record)),
        }
        with self._writing():
            manager.save(step, args=ocp.args.Composite(**items), force=True)
        self._saving = True

    def _name_frozen(self, frozen: Tree) -> None:
        """Have records say which frozen parameters they mean; these never change, so that one look is enough."""
        if "frozen_from" not in self._about:
            arrays, _ = records.describe(frozen, records.FROZEN)
            self._about |= {"frozen_from": self._reference.address, "arrays": arrays}

    def check(self) -> None:
        """Raise CheckpointError if a write failed in the background; does not wait for one that goes on."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's own failures are ValueErrors
            raise CheckpointError(
                f"{self.folder}: a checkpoint cannot be written: {reading.one_line(error)}"
            ) from error

    def restore_newest(self, abstract: Tree) -> tuple[Tree, dict[str, Any]] | None:
        """(state, data position) of the newest good checkpoint, see `restoring.restore_newest`; None without any.

        The folder is open for writing afterwards, so that one that cannot be is found out before the first step.
        """
        found = restoring.restore_newest(self.folder, abstract, self._reference)
        if self.writable:
            self.open()
        return found and found[1:]

    def newest_before(self, step: int) -> int | None:
        """Number of the newest checkpoint of a step up to this one, the same on every process; None without any.

        What is being written is waited for.
        """
        self.wait()
        there = max((number for number in self.steps() if number <= step), default=None)
        return json.loads(vote.first_says("looking for a checkpoint to go back to", json.dumps(there)))

    def go_back(self, step: int, abstract: Tree, reason: str) -> tuple[int, Tree]:
        """(step, state) of checkpoint `step`, or of the newest good one before it; later ones are set aside.

        Raises:
          CheckpointError: none is good.
        """
        if self._manager:
            self._manager.close()
            self._manager = None
        back, state, _ = restoring.restore_newest(self.folder, abstract, self._reference, until=step)
        for later in json.loads(vote.first_says("listing the checkpoints", json.dumps(self.steps()))):
            if later > back:
                restoring.set_aside(self.folder, later, reason, "spiked")
        self._known.clear()
        self.open()
        return back, state

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """(state, data position) of one checkpoint in the shapes, dtypes and shardings of `abstract`.

        Args:
          step: which one.
          abstract: jax.ShapeDtypeStruct leaves with shardings (of the mesh of today, not the one that saved).

        Raises:
          CheckpointError: naming the parameters that are missing, left over, of another shape, or damaged.
        """
        return restoring.restore_step(self.folder, step, abstract, self._reference)

    def read_params(self, step: int | None = None) -> tuple[dict[str, Tree], dict[str, Any]]:
        """Parameters of a checkpoint, by default of the newest good one; the optimizer's arrays are not read.

        Returns:
          ({`params`, `frozen`, `ema`} as numpy arrays, the record; without frozen ones where that only names them).

        Raises:
          CheckpointError: the step does not exist, cannot be read, or is damaged; or none is good.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; there are: {there}")
        if not steps:
            raise CheckpointError(f"{self.folder}: no complete checkpoint yet")
        for number in [step] if step is not None else steps[::-1]:
            try:
                return reading.read_arrays(self.folder, number, ("params", "frozen", "ema"))
            except DamagedCheckpoint as error:
                if number in (step, steps[0]):
                    raise
                print(f"checkpoint  damaged: {error}; taking an older one", file=sys.stderr, flush=True)
        raise AssertionError("one of them returned or raised")

    def wait(self) -> None:
        """Block until what `save` began is on disk."""
        self._saving = False
        if self._manager:
            with self._writing():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending writes and let go of the folder."""
        if self._manager:
            with self._writing():
                self._manager.close()


@dataclasses.dataclass
class _NewestFinite:
    """Keeps the newest checkpoint without infinities and NaN in its parameters, however many came after it."""

    known: dict[int, dict[str, Any]]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        finite = [info.step for info in checkpoints if not self.known.get(info.step, {}).get("wild")]
        return [info.step in finite[-1:] for info in checkpoints]


@dataclasses.dataclass
class _Best:
    """Keeps those with the highest score, also of runs before this one; orbax forgets scores with the process."""

    known: dict[int, dict[str, Any]]
    metric: str
    count: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = {info.step: self.known.get(info.step, {}).get("metrics", {}) for info in checkpoints}
        scored = [step for step in scores if self.metric in scores[step]]
        best = sorted(scored, key=lambda step: (scores[step][self.metric], step))[-self.count :]
        return [info.step in best for info in checkpoints]


def _known(folder: str, step: int) -> dict[str, Any]:
    """The record of a checkpoint; one that is damaged counts as not finite, one without a record as finite."""
    try:
        return records.read(epath.Path(folder) / str(step)) or {}
    except CheckpointError:
        return {"wild": True}
