"""What the small recipes reach on this machine: results, training time and CPU time of each, as one table and JSON.

`python benchmarks/small_recipes.py --out=small.json` measures the quickstart. `--emoji=SHARDS` adds `clip_emoji.py`
with one style held out; `--caltech101=SHARDS --heldout="[05]$"` adds `clip_caltech101.py` with those keys held out.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(config: str, workdir: Path, *overrides: str) -> dict:
    """Train a recipe in a process of its own; its last results, wall and CPU seconds, and seconds inside the steps."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-m", "vlmjax.main", f"--config={config}", f"--workdir={workdir}", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "step_seconds" in row]
    counts = [b - a for a, b in itertools.pairwise([1, *(row["step"] for row in steps)])]
    return {
        "command": " ".join(command[1:]),
        "wall_seconds": time.perf_counter() - start,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "training_seconds": sum(row["step_seconds"] * n for row, n in zip(steps, counts, strict=True)),
        **{name: value for row in rows for name, value in row.items() if name.startswith("eval/")},
    }


def evaluate(workdir: Path, benchmark: str, data: str, keep: str, *options: str) -> dict:
    """The metrics of `vlmjax.evaluate` on the records whose key matches."""
    out = workdir / "results.json"
    flags = [
        f"--model={workdir}",
        f"--benchmark={benchmark}",
        f"--data={data}",
        f"--keep={keep}",
        f"--out={out}",
    ]
    subprocess.run([sys.executable, "-m", "vlmjax.evaluate", *flags, *options], cwd=ROOT, check=True)
    return {name: value for name, value in json.loads(out.read_text()).items() if isinstance(value, float)}


def main() -> None:
    """Measure what the flags ask for and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--runs", help="empty folder that keeps the runs and their reports")
    parser.add_argument("--emoji", help="shards of drawings whose keys are style_name")
    parser.add_argument("--caltech101", help="shards of photographs")
    parser.add_argument(
        "--heldout", default="[05]$", help="regex on keys of the photographs that are held out"
    )
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "jax": metadata.version("jax"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        scratch = args.runs or temporary
        results["quickstart"] = run("configs/quickstart.py", Path(scratch, "quickstart"))
        if args.emoji:
            folder, config = Path(scratch, "emoji"), "configs/clip_emoji.py:leave_out=noto"
            results["emoji"] = run(config, folder, f"--config.data.train={args.emoji}")
            results["emoji"] |= evaluate(folder, "retrieval", args.emoji, "^noto_")
        if args.caltech101:
            folder, held = Path(scratch, "caltech101"), args.heldout
            overrides = (f"--config.data.train={args.caltech101}", f"--config.data.exclude={held}")
            results["caltech101"] = run("configs/clip_caltech101.py", folder, *overrides)
            results["caltech101"] |= evaluate(folder, "zeroshot", args.caltech101, held)
    print(json.dumps(results, indent=2))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
