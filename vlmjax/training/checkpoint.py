"""Checkpoints of a run: the state and the data position, written in the background, restored onto any mesh."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vlmjax.errors import CheckpointError
from vlmjax.sharding.rules import path_of

Tree = Any


class Checkpoints:
    """The numbered checkpoints of a run: `N/state` (arrays) and `N/data` (json: step, seed, source fingerprint)."""

    def __init__(
        self,
        folder: str,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        best_metric: str = "",
        writable: bool = True,
    ):
        """Open a folder of checkpoints (created when writable).

        Args:
          folder: local path or gs:// address.
          keep_last: newest ones kept.
          keep_best: ones kept with the highest `best_metric`, besides.
          best_metric: name among the metrics given to `save`.
          writable: False for commands that only read.
        """
        manager = checkpoint_managers
        keep = [manager.LatestN(n=max(keep_last, 1))]
        if best_metric and keep_best:
            keep.append(
                manager.BestN(
                    get_metric_fn=lambda metrics: metrics.get(best_metric, float("-inf")),
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if not writable and "://" not in folder and not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder of checkpoints")
        self.folder, self.best_metric = folder, best_metric
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=manager.AnyPreservationPolicy(keep),
                cleanup_tmp_directories=writable,
                # Not `read_only`, which warns on every opening: nothing here writes but `save`.
                save_root_metadata=writable,
                create=writable,
                enable_async_checkpointing=writable,
            ),
            item_names=("state", "data"),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()},
        )

    def latest(self) -> int | None:
        """Number of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Tree, data: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Start writing checkpoint `step`; returns as soon as the arrays have been copied off the devices.

        Raises:
          CheckpointError: where the previous write failed in the background, so that it is not lost in a log.
        """
        if step in self._manager.all_steps():
            return
        ranked = {self.best_metric: float(metrics[self.best_metric])} if self.best_metric in metrics else None
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(dict(data)))
        with self._writing():
            self._manager.save(step, args=items, metrics=ranked, force=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore's own failures are ValueErrors
            raise CheckpointError(
                f"{self.folder}: a checkpoint cannot be written: {_one_line(error)}"
            ) from error

    def restore(self, step: int, abstract: Tree) -> tuple[Tree, dict[str, Any]]:
        """Read a checkpoint into the shapes, dtypes and shardings of `abstract`.

        Args:
          step: which one.
          abstract: jax.ShapeDtypeStruct leaves with shardings (of the mesh of today, not the one that saved).

        Raises:
          CheckpointError: naming the parameters that are missing, left over, or of another shape.
        """
        self._compare(step, abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["data"]

    def read_params(self, step: int) -> dict[str, Tree]:
        """`params`, `frozen` and `ema` of a checkpoint as numpy arrays; the optimizer's arrays are not read.

        Raises:
          CheckpointError: the step does not exist or cannot be read.
        """
        if step not in self._manager.all_steps():
            steps = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(f"{self.folder}: no checkpoint of step {step}; there are: {steps}")
        saved = self._saved(step)
        wanted = {name: saved[name] for name in ("params", "frozen", "ema")}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(f"{self.folder}/{step}/state", args=args)

    def tree(self, step: int) -> dict[str, tuple[int, ...]]:
        """Paths and shapes of the arrays in a checkpoint, without reading them."""
        leaves = jax.tree_util.tree_flatten_with_path(self._saved(step))[0]
        return {path_of(path): tuple(leaf.shape) for path, leaf in leaves}

    def _saved(self, step: int) -> Tree:
        saved = self._manager.item_metadata(step)["state"]
        if saved is None:
            raise CheckpointError(
                f"{self.folder}/{step}: holds no state; it is incomplete or not a vlmjax checkpoint"
            )
        return getattr(saved, "tree", saved)

    def _compare(self, step: int, abstract: Tree) -> None:
        saved = self.tree(step)
        wanted = {path_of(p): tuple(x.shape) for p, x in jax.tree_util.tree_flatten_with_path(abstract)[0]}
        problems = [f"missing {path} {wanted[path]}" for path in wanted if path not in saved]
        problems += [f"left over {path} {saved[path]}" for path in saved if path not in wanted]
        problems += [
            f"{path} is {saved[path]} there and {wanted[path]} in the recipe"
            for path in wanted
            if path in saved and saved[path] != wanted[path]
        ]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise CheckpointError(
                f"{self.folder}/{step} belongs to another model: {'; '.join(problems[:6])}{more}. "
                "Use another --workdir, or the recipe that wrote it."
            )

    def wait(self) -> None:
        """Block until what `save` began is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for pending writes and let go of the folder."""
        with self._writing():
            self._manager.close()


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
