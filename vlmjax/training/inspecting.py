"""Looking at the checkpoints of a run: what they are, whether they are good, how two differ, and averages of them."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec
import numpy as np
from etils import epath

from vlmjax.errors import CheckpointError
from vlmjax.training import records
from vlmjax.training.build import read_run
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.digests import by_path
from vlmjax.training.frozen import whole
from vlmjax.training.reading import naming_damage, read_arrays
from vlmjax.training.workdir import Workdir

Tree = Any
GROUPS = ("params", "frozen", "ema")


class Run(NamedTuple):
    """A work folder and the numbers of its checkpoints."""

    workdir: str
    checkpoints: str
    steps: list[int]


def open_run(workdir: str) -> Run:
    """The checkpoints of a run. Raises CheckpointError where there are none."""
    root = workdir if "://" in workdir else str(epath.Path(workdir).expanduser().resolve())
    folder = root.rstrip("/") + "/checkpoints"
    if not epath.Path(root).is_dir():
        raise CheckpointError(f"{workdir}: no such folder")
    steps = Checkpoints(folder, writable=False).steps() if epath.Path(folder).is_dir() else []
    if not steps:
        raise CheckpointError(f"{workdir}: no complete checkpoint here; name the --workdir of a run")
    return Run(workdir, folder, steps)


def chosen(run: Run, step: int | None) -> int:
    """A checkpoint of a run, the newest one by default. Raises CheckpointError where there is none of that number."""
    if step is not None and step not in run.steps:
        there = ", ".join(map(str, run.steps))
        raise CheckpointError(f"{run.workdir}: no checkpoint of step {step}; there are: {there}")
    return run.steps[-1] if step is None else step


def listing(run: Run) -> Iterator[str]:
    """A line for each checkpoint, also those put aside as damaged or for a spike of the loss."""
    for step in run.steps:
        path = epath.Path(run.checkpoints) / str(step)
        system, base = fsspec.core.url_to_fs(str(path))
        yield f"step {step:<10} {system.du(base) / 2**20:10.1f} MiB  {_described(path)}"
    aside = [
        path for word in ("damaged", "spiked") for path in epath.Path(run.checkpoints).glob(f"*.{word}*")
    ]
    for path in sorted(aside):
        why = path / "why.txt"
        yield f"{path.name:<15} {why.read_text().strip() if why.exists() else 'no reason given'}"


def _described(path: epath.Path) -> str:
    try:
        record = records.read(path)
    except CheckpointError as error:
        return f"damaged: {str(error).partition(': ')[2]}"
    if record is None:
        return "without digests"
    made = record.get("environment", {})
    mesh = " x ".join(f"{axis} {size}" for axis, size in made.get("mesh", {}).items() if size > 1)
    parts = (
        f"{len(record['arrays'])} arrays",
        made.get("devices", ""),
        mesh and f"mesh {mesh}",
        f"vlmjax {made['packages']['vlmjax']}" if "packages" in made else "",
        f"mean of {', '.join(map(str, record['mean_of']))}" if "mean_of" in record else "",
        f"NOT FINITE: {record['wild'][0]}" if record["wild"] else "",
    )
    return "; ".join(filter(None, parts))


def verdict(run: Run, step: int) -> tuple[bool, str]:
    """Whether every array of a checkpoint is as it was saved, in words too; all of it is read."""
    path = epath.Path(run.checkpoints) / str(step)
    try:
        with naming_damage(path):
            record = records.read(path)
            records.position(path, record)
        arrays, record = read_arrays(run.checkpoints, step)
    except CheckpointError as error:
        return False, f"damaged: {error}"
    if record.get("wild"):
        return False, f"as saved, but not finite: {', '.join(record['wild'][:6])}"
    if not record:
        return True, "readable; written without digests, so that it cannot be verified"
    named = len(records.named_only(record))
    beside = f"; {named} frozen ones are those of {record['frozen_from']}, unread" if named else ""
    return True, f"good: {len(by_path(arrays))} arrays and the data position are as they were saved{beside}"


def difference(first: tuple[Run, int], second: tuple[Run, int]) -> Iterator[str]:
    """A line for each parameter that is not the same in two checkpoints, the most different first.

    How much is the root mean square of the difference over that of the first one's values.
    """
    (a, one), (b, two) = (read_arrays(run.checkpoints, step, GROUPS) for run, step in (first, second))
    a, b = by_path(a), by_path(b)
    lines = []
    for name in records.named_only(one) | records.named_only(
        two
    ):  # known by their digests, on one side at least
        a.pop(name, None), b.pop(name, None)
        digests = [side.get("arrays", {}).get(name, ["", [], ""])[2] for side in (one, two)]
        if digests[0] != digests[1]:
            lines.append((np.inf, f"{name:<70} frozen, of another source"))
    lines += [(np.inf, f"{name:<70} only in the first") for name in a if name not in b]
    lines += [(np.inf, f"{name:<70} only in the second") for name in b if name not in a]
    for name in a:
        if name not in b or (a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes()):
            continue
        if a[name].shape != b[name].shape:
            lines.append((np.inf, f"{name:<70} {a[name].shape} and {b[name].shape}"))
            continue
        x, y = (np.asarray(tree[name]).astype(np.float64) for tree in (a, b))
        size = np.sqrt(np.mean(np.square(x)))
        relative = np.sqrt(np.mean(np.square(x - y))) / size if size else np.inf
        lines.append((relative, f"{name:<70} {relative:9.3g}   largest {np.max(np.abs(x - y)):.3g}"))
    yield from (line for _, line in sorted(lines, key=lambda pair: -np.nan_to_num(pair[0], nan=np.inf)))


def average(run: Run, steps: Sequence[int], out: str) -> int:
    """Write a work folder whose one checkpoint holds the mean of the parameters that would be exported.

    Those are the moving average where the run keeps one. The mean is taken in float64, and locked parameters are those
    of the newest. Returns the number of the checkpoint, that of the newest. Raises CheckpointError.
    """
    target = epath.Path(out).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"--out={out} exists and is not an empty folder: name another")
    total, newest, shapes = {}, {}, {}
    for step in sorted(steps):
        newest, record = read_arrays(run.checkpoints, step, GROUPS)
        if "lora" in newest["params"]:
            raise CheckpointError(
                f"{run.workdir}: a mean of low-rank factors is no mean of what they do; export the "
                "checkpoints one by one"
            )
        params = by_path(newest["ema"] or newest["params"])
        if shapes and shapes != (shapes := {name: x.shape for name, x in params.items()}):
            raise CheckpointError(
                f"{run.workdir}: checkpoint {step} has other parameters than those before it"
            )
        shapes = {name: x.shape for name, x in params.items()}
        total = {name: total.get(name, 0) + x.astype(np.float64) for name, x in params.items()}
    if records.named_only(record):
        newest = whole(newest, record, *read_run(Workdir(run.workdir, writer=False)))
    params = newest["ema"] or newest["params"]
    mean = _like(params, {name: x / len(steps) for name, x in total.items()})
    source, number = epath.Path(run.checkpoints).parent, max(steps)
    for name in ("recipe.json", "model.json"):
        _copy(source / name, target / name)
    for file in (source / "tokenizer").glob("*") if (source / "tokenizer").is_dir() else ():
        _copy(file, target / "tokenizer" / file.name)
    about = {"mean_of": sorted(steps), "of": str(source)}
    writer = Checkpoints(
        f"{target.resolve()}/checkpoints" if "://" not in out else f"{out}/checkpoints", about=about
    )
    data = json.loads((epath.Path(run.checkpoints) / str(number) / "data" / "metadata").read_text())
    writer.save(number, {"params": mean, "frozen": newest["frozen"], "ema": {}}, data, {})
    writer.close()
    return number


def _like(tree: Tree, flat: dict[str, Any]) -> Tree:
    """Values by path in the structure and dtypes of a tree."""
    import jax

    leaves = [flat[name].astype(x.dtype) for name, x in by_path(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _copy(source: epath.Path, target: epath.Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.copy(target, overwrite=True)
