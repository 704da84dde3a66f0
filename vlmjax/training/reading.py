"""Reading one checkpoint: each process on its own, waiting for no other, and telling damage from all else."""

import contextlib
import dataclasses
import gc
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlmjax.errors import CheckpointError, DamagedCheckpoint
from vlmjax.training import records
from vlmjax.training.digests import by_path, digests, host_digest

Tree = Any

# What these say passes, or is about this machine: the same checkpoint can be good tomorrow, or elsewhere.
_NOT_DAMAGE = (PermissionError, ConnectionError, TimeoutError, MemoryError)
_NOT_DAMAGE_WORDS = (
    "PERMISSION_DENIED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
)


def steps_in(folder: str) -> list[int]:
    """Numbers of the finished checkpoints in a folder, in ascending order."""
    found = ocp.path.step.standard_name_format().find_all(epath.Path(folder))
    return sorted(metadata.step for metadata in found)


def read_state(
    folder: str, step: int, abstract: Tree, reference: records.Reference | None = None
) -> tuple[Tree, dict[str, Any], dict[str, Any] | None]:
    """The arrays of a checkpoint in the shapes and shardings of `abstract`, in the dtypes they were saved in.

    No process waits for another in here, so that one may fail alone. The digests are not compared yet. Frozen
    parameters that the checkpoint only names come from `reference`.

    Returns:
      (state, data position, record or None for a checkpoint from before there were records).

    Raises:
      DamagedCheckpoint: it does not hold what was saved.
      CheckpointError: it belongs to another model, or cannot be read from here or now.
    """
    path = epath.Path(folder) / str(step)
    if not path.is_dir():
        raise CheckpointError(f"{path}: not seen from here; all processes of a run share its folder")
    with naming_damage(path):
        record = records.read(path)
        data = records.position(path, record)
        saved = _shapes(path)
    known = {name: tuple(shape) for name, (_, shape, _) in record["arrays"].items()} if record else saved
    compare(path, known, abstract)
    named = records.named_only(record)
    if named and not reference:
        raise CheckpointError(
            f"{path}: its frozen parameters are those of {record['frozen_from']}: set config.init_from, or "
            "model.image_from and model.language_from, to that"
        )
    if saved != {name: shape for name, shape in known.items() if name not in named}:
        raise DamagedCheckpoint(f"{path}: it lists other arrays than were saved")

    def as_saved(name: str, x: Any) -> Any:
        dtype = np.dtype(record["arrays"][name][0]) if record else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)

    wanted = [as_saved(name, x) for name, x in by_path(abstract).items()]
    wanted = jax.tree.unflatten(jax.tree.structure(abstract), wanted)
    wanted = wanted.replace(frozen={}) if named else wanted
    # Checkpoints from before states had `extra` lack even its empty group, which orbax would miss.
    older = dataclasses.is_dataclass(wanted) and "extra" not in _saved(path)
    if older:
        wanted = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
        del wanted["extra"]
    with naming_damage(path):
        state = ocp.StandardCheckpointHandler().restore(path / "state", args=ocp.args.StandardRestore(wanted))
    state = abstract.replace(**state, extra={}) if older else state
    return state.replace(frozen=reference.fetch()) if named else state, data, record


def differing(leaves: Mapping[str, Any], record: Mapping[str, Any], *, on_host: bool = False) -> list[str]:
    """Names of arrays whose bits are not those that were saved.

    Args:
      leaves: arrays by path, as they were saved; on devices every process has to ask.
      record: of their checkpoint.
      on_host: they are numpy arrays.
    """
    found = {name: host_digest(x) for name, x in leaves.items()} if on_host else digests(leaves)[0]
    return [name for name in leaves if record["arrays"][name][2] != found[name]]


def read_arrays(
    folder: str, step: int, groups: tuple[str, ...] | None = None
) -> tuple[dict[str, Tree], dict[str, Any]]:
    """The arrays of a checkpoint as numpy, those of some groups of the state (`params`, `ema`) or all; compared.

    Returns:
      ({group: tree}, record; empty for a checkpoint from before there were digests to compare with).

    Raises:
      DamagedCheckpoint: they are not what was saved.
    """
    path = epath.Path(folder) / str(step)
    with naming_damage(path):
        record, saved = records.read(path), _saved(path)
        wanted = {name: saved[name] for name in groups or saved}
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(path / "state", args=args)
    leaves = by_path(found)
    if record:
        held = set(record["arrays"]) - records.named_only(record)
        expected = {name for name in held if groups is None or name.split("/")[0] in groups}
        if expected != set(leaves) or (expected := differing(leaves, record, on_host=True)):
            raise DamagedCheckpoint(f"{path}: {and_more(sorted(expected))} not what was saved")
    return found, record or {}


def compare(path: epath.Path, saved: Mapping[str, tuple], abstract: Tree) -> None:
    """Raise CheckpointError naming the arrays that are missing, left over, or of another shape than the recipe's."""
    wanted = {name: tuple(x.shape) for name, x in by_path(abstract).items()}
    problems = [f"missing {name} {wanted[name]}" for name in wanted if name not in saved]
    problems += [f"left over {name} {saved[name]}" for name in saved if name not in wanted]
    problems += [
        f"{name} is {saved[name]} there and {wanted[name]} in the recipe"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    if problems:
        raise CheckpointError(
            f"{path} belongs to another model: {and_more(problems, '; ')}. "
            "Use another --workdir, or the recipe that wrote it."
        )


def and_more(names: list[str], separator: str = ", ") -> str:
    """The first six, and how many more there are."""
    return separator.join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _shapes(path: epath.Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in by_path(_saved(path)).items()}


def _saved(path: epath.Path) -> Tree:
    """The tree of a checkpoint's arrays, without reading them."""
    if not (path / "state").exists():
        raise DamagedCheckpoint(f"{path}: holds no state; it is incomplete or not a vlmjax checkpoint")
    saved = ocp.StandardCheckpointHandler().metadata(path / "state")
    return getattr(saved, "tree", saved)


@contextlib.contextmanager
def naming_damage(path: epath.Path) -> Iterator[None]:
    """Raise what orbax and its storage raise for a checkpoint as DamagedCheckpoint, or as a plain CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # Bytes that make no sense come out as nearly any type, TypeError to KeyError.
        reason = one_line(error)
        if isinstance(error, _NOT_DAMAGE) or any(word in reason for word in _NOT_DAMAGE_WORDS):
            found = CheckpointError(f"{path} cannot be read from here or now: {reason}")
        else:
            found = DamagedCheckpoint(f"{path}: {type(error).__name__}: {reason}")
        _drop(error)
        raise found from None


def _drop(error: BaseException) -> None:
    """Let go of the reads that orbax leaves behind unfinished; each would print a page when it is collected."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = error.__context__ = error.__cause__ = None
            gc.collect()
    finally:
        sys.unraisablehook = hook


def one_line(error: BaseException) -> str:
    """The message of an error without its line breaks, shortened."""
    return " ".join(str(error).split())[:500]
