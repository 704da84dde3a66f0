"""Where a run goes on: the newest checkpoint that every process can read and whose every bit is as it was saved."""

import json
import sys
from typing import Any

import jax
from etils import epath

from vlmjax.errors import CheckpointError, DamagedCheckpoint, UserError
from vlmjax.sharding import vote
from vlmjax.training.digests import by_path
from vlmjax.training.reading import and_more, differing, one_line, read_state, steps_in
from vlmjax.training.records import Reference, named_only

Tree = Any


def restore_newest(
    folder: str,
    abstract: Tree,
    reference: Reference | None = None,
    *,
    until: int | None = None,
    seconds: float = vote.SECONDS,
) -> tuple[int, Tree, dict[str, Any]] | None:
    """The newest good checkpoint; damaged ones that are newer are renamed, and why is printed.

    Every process reads its part on its own, then all tell each other how it went before any device is needed: none
    waits for one that failed. Which checkpoints there are is what process 0 sees.

    Args:
      folder: of the checkpoints.
      abstract: jax.ShapeDtypeStruct leaves with the shardings of today.
      reference: where frozen parameters are from that a checkpoint only names.
      until: look at none of a later step.
      seconds: how much longer than this process another may take.

    Returns:
      (step, state, data position), or None where there is no checkpoint.

    Raises:
      CheckpointError: none is good, or it belongs to another model, or it cannot be read now.
    """
    there = [step for step in steps_in(folder) if until is None or step <= until]
    steps = json.loads(vote.first_says("listing the checkpoints", json.dumps(there), seconds))
    for step in reversed(steps):
        try:
            return step, *restore_step(folder, step, abstract, reference, seconds=seconds)
        except DamagedCheckpoint as error:
            if step == steps[0]:
                raise CheckpointError(
                    f"no good checkpoint is left: {error}; `python -m vlmjax.checkpoint verify` looks at all of them. "
                    f"To begin anew, name another --workdir or remove {folder}"
                ) from error
            moved = set_aside(folder, step, str(error), seconds=seconds)
            _tell(f"damaged: {error}; kept as {moved}, going on from an older one")
    return None


def restore_step(
    folder: str,
    step: int,
    abstract: Tree,
    reference: Reference | None = None,
    *,
    seconds: float = vote.SECONDS,
) -> tuple[Tree, dict[str, Any]]:
    """A checkpoint, on all processes or on none: (state, data position).

    Raises:
      DamagedCheckpoint: on every process, when one found damage.
      CheckpointError: on every process, when one cannot read it or it belongs to another model.
    """
    state = data = record = None
    try:
        state, data, record = read_state(folder, step, abstract, reference)
        verdict = ("good", "")
    except DamagedCheckpoint as error:
        verdict = ("damaged", str(error))
    except UserError as error:
        verdict = ("refused", str(error))
    said = vote.exchange(f"restoring checkpoint {step}", json.dumps(verdict), seconds)
    verdicts = [json.loads(verdict) for verdict in said]
    for kind, error in (("refused", CheckpointError), ("damaged", DamagedCheckpoint)):
        for process, (found, reason) in enumerate(verdicts):
            if found == kind:
                raise error(reason if len(said) == 1 else f"process {process}: {reason}")
    if record is None:
        _tell(f"{folder}/{step} was written without digests: what it holds cannot be verified")
        return state, data
    path = f"{folder}/{step}"
    wrong = differing(by_path(state), record)
    if wrong and set(wrong) <= named_only(record):
        raise CheckpointError(
            f"{path} was trained beside other frozen parameters than {reference.address} holds now "
            f"({and_more(wrong)}): bring back what was there ({record['frozen_from']}), or start a new workdir"
        )
    if wrong:
        raise DamagedCheckpoint(f"{path}: {and_more(wrong)} not what was saved")
    if record["wild"]:
        raise DamagedCheckpoint(f"{path}: {and_more(record['wild'])} not finite")
    return jax.tree.map(_cast, state, abstract), data


def set_aside(
    folder: str, step: int, reason: str, word: str = "damaged", *, seconds: float = vote.SECONDS
) -> str:
    """Rename a checkpoint to `STEP.word` so that nothing takes it for one, its reason in `why.txt`.

    Process 0 does it, and all have seen it done on return. Returns the new name; raises CheckpointError where it cannot
    be renamed.
    """
    done = ("", "")
    if jax.process_index() == 0:
        source = epath.Path(folder) / str(step)
        names = (f"{step}.{word}" + (f".{i}" if i else "") for i in range(1000))
        target = next(path for name in names if not (path := epath.Path(folder) / name).exists())
        try:
            (source / "why.txt").write_text(reason + "\n")
            source.rename(target)
            done = (target.name, "")
        except OSError as error:
            done = ("", one_line(error))
    name, problem = json.loads(vote.first_says(f"renaming checkpoint {step}", json.dumps(done), seconds))
    if problem:
        raise CheckpointError(f"{reason}; and it cannot be renamed: {problem}")
    return name


def _cast(x: jax.Array, wanted: Any) -> jax.Array:
    """An array in today's dtype, where the recipe's differs from the one saved."""
    if x.dtype == wanted.dtype:
        return x
    return jax.jit(lambda x: x.astype(wanted.dtype), out_shardings=wanted.sharding)(x)


def _tell(line: str) -> None:
    if jax.process_index() == 0:
        print(f"checkpoint  {line}", file=sys.stderr, flush=True)
