"""The losses of every tiny recipe as they have been: written once, compared with those of every later change.

`python benchmarks/golden_losses.py --check runs/*` compares runs of `configs/NAME.py:tiny` in folders of that name with
tests/golden/losses.json, and ends with 1 where one is different. `--write runs/*` takes them for the new ones.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden" / "losses.json"


def losses(run: Path) -> dict[int, float]:
    """The logged losses of a run, by step."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def tolerance(run: Path) -> float:
    """Relative difference that another machine may make, by the numbers that a run's recipe computes with.

    XLA and Eigen order their sums by the width of the vector units, the caches and the cores. What that made of the
    losses was measured with narrower instruction sets and fewer cores (benchmarks/README.md): 2e-7 in float32, and 2e-4
    where features are rounded to bfloat16. Other versions of jaxlib may do more, hence these.
    """
    return 2e-3 if '"bfloat16"' in (run / "recipe.json").read_text() else 1e-4


def machine() -> str:
    """A name for what the order of sums depends on: jaxlib, and the CPU with its caches and cores."""
    info = Path("/proc/cpuinfo")
    keep = ("model name", "flags", "cache size", "Features", "CPU part")
    lines = [line for line in info.read_text().splitlines() if line.startswith(keep)] if info.exists() else []
    lines.append(str(os.cpu_count() if sys.platform != "linux" else len(os.sched_getaffinity(0))))
    return f"jaxlib {metadata.version('jaxlib')}, cpu {hashlib.sha256(str(lines).encode()).hexdigest()[:12]}"


def differences(found: Mapping[int, float], golden: Mapping[int, float], allowed: float) -> list[str]:
    """What is wrong with the losses of one run, in words; nothing where they are the golden ones."""
    if set(found) != set(golden):
        return [f"logged at steps {sorted(found)}, expected {sorted(golden)}"]
    apart = {
        step: abs(found[step] / expected - 1) if isinstance(found[step], float) else math.inf
        for step, expected in sorted(golden.items())
    }
    return [
        f"step {step}: loss {found[step]}, expected {golden[step]}: {size:.1e} apart, more than {allowed:g}"
        for step, size in apart.items()
        if not size <= allowed
    ]


def check(runs: Sequence[Path]) -> int:
    """Compare; returns the exit code."""
    golden = json.loads(GOLDEN.read_text())
    exact = golden["machine"] == machine()
    print(f"golden losses: {'bit for bit' if exact else 'within the tolerance for other machines'}")
    failed = False
    for run in runs:
        if run.name not in golden["recipes"]:
            wrong = ["no golden losses of such a recipe"]
        else:
            expected = {int(step): loss for step, loss in golden["recipes"][run.name].items()}
            wrong = differences(losses(run), expected, 0.0 if exact else tolerance(run))
        failed |= bool(wrong)
        print(f"{run.name:24} {'as before' if not wrong else wrong[0]}")
    if failed:
        print(
            f"Where a change of losses is meant, say so in its message and run {Path(__file__).name} --write RUNS"
        )
    return int(failed)


def write(runs: Sequence[Path]) -> int:
    """Take the losses of runs for the golden ones; those of other recipes are kept if they are of this machine."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"machine": machine()}
    kept = golden.get("recipes", {}) if golden["machine"] == machine() else {}
    recipes = kept | {run.name: losses(run) for run in runs}
    GOLDEN.parent.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "recipes": dict(sorted(recipes.items()))}, indent=1)
    GOLDEN.write_text(text + "\n")
    return 0


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", nargs="+", type=Path, metavar="RUN")
    what.add_argument("--write", nargs="+", type=Path, metavar="RUN")
    args = parser.parse_args()
    return check(args.check) if args.check else write(args.write)


if __name__ == "__main__":
    sys.exit(main())
