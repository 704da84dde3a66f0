"""The record of a checkpoint: what its arrays are, digest by digest, and what made them; sealed against damage."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from etils import epath

from vlmjax.errors import DamagedCheckpoint
from vlmjax.training.digests import by_path, digests

Tree = Any
ITEM = "record"
FROZEN = "frozen/"


class Reference(NamedTuple):
    """Frozen parameters that a checkpoint names and does not hold.

    Attributes:
        address: where they are from: a Hugging Face folder or id.
        fetch: reads them again, into the places of the state.
    """

    address: str
    fetch: Callable[[], Tree]


def make(state: Tree, data: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a state and its data position. Every process calls this; arrays do not leave their devices.

    Keys: `arrays` (see `describe`), `wild` (trained parameters that hold a value that is not finite), `data` (digest of
    the data position), and all of `about`, whose own `arrays` are those that the checkpoint names and does not hold.
    """
    arrays, wild = describe(state)
    trained = [path for path in wild if path.startswith("params/")]
    named = about.get("arrays", {})
    return {**about, "arrays": {**arrays, **named}, "wild": trained, "data": digest(data)}


def describe(tree: Tree, prefix: str = "") -> tuple[dict[str, list], list[str]]:
    """({path: [dtype, shape, digest]} of the arrays of a tree, paths of those that are not finite)."""
    leaves = by_path(tree)
    found, wild = digests(leaves)
    return {prefix + path: [str(x.dtype), list(x.shape), found[path]] for path, x in leaves.items()}, wild


def named_only(record: Mapping[str, Any] | None) -> set[str]:
    """Paths of the arrays that a checkpoint does not hold, because its record says where they are from."""
    if not record or "frozen_from" not in record:
        return set()
    return {path for path in record["arrays"] if path.startswith(FROZEN)}


def digest(value: Any) -> str:
    """SHA-256 of a json value, blind to what json does not keep (tuples, order of keys)."""
    plain = json.loads(json.dumps(value, default=str))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as it is written, with its own digest."""
    record = json.loads(json.dumps(record, default=str))
    return {"record": record, "sha256": digest(record)}


def read(step: epath.Path) -> dict[str, Any] | None:
    """The record in the folder of a step; None for a checkpoint from before there were records.

    Raises:
      DamagedCheckpoint: where it is not what was written, or lost.
    """
    if not (step / ITEM).exists():
        if ITEM in _items(step):
            raise DamagedCheckpoint(f"{step}: its record is lost")
        return None
    try:
        sealed = json.loads((step / ITEM / "metadata").read_text())
        if digest(sealed["record"]) == sealed["sha256"]:
            return sealed["record"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    raise DamagedCheckpoint(f"{step}: its record is not what was written")


def _items(step: epath.Path) -> list[str]:
    """What orbax wrote into a step, by orbax's own note; where that is lost no record can be ruled out."""
    try:
        return list(json.loads((step / "_CHECKPOINT_METADATA").read_text())["item_handlers"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return [ITEM]


def position(step: epath.Path, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The data position in the folder of a step, as it was written. Raises DamagedCheckpoint."""
    try:
        data = json.loads((step / "data" / "metadata").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise DamagedCheckpoint(f"{step}: its data position cannot be read ({error})") from error
    if record and digest(data) != record["data"]:
        raise DamagedCheckpoint(f"{step}: its data position is not what was written")
    return data
