"""Plans of recipes on device sets as one table and JSON: what `vlmjax.plan` says, without any of the devices.

`python benchmarks/plan_table.py --configs=configs/clip_vitl.py --topologies=v5e:16x16,h100:8x8 --out=plan.json`
Each plan is made in a process of its own, so that one that fails leaves the others. Arguments that are not known here
are passed on, such as `--examples=400000000` or `--config.micro_batches=4`.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax")


def plan(config: str, topology: str, options: list[str]) -> dict:
    """The json of one plan; of one that cannot be made, `error`."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "plan.json")
        command = [
            sys.executable,
            "-m",
            "vlmjax.plan",
            f"--config={config}",
            f"--topology={topology}",
            *options,
        ]
        run = subprocess.run([*command, f"--json={out}"], cwd=ROOT, capture_output=True, text=True)
        about = {"config": config, "topology": topology, "command": " ".join(["python", *command[1:]])}
        if out.exists():
            return about | json.loads(out.read_text())
        last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        return about | {"error": last}


def environment() -> dict:
    """What the figures were made with."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, no accelerator",
        "packages": versions,
    }


def row(made: dict) -> list[str]:
    """A plan as cells of the table."""
    if "error" in made:
        return [made["config"], made["topology"], made["error"], *["–"] * (len(HEADER) - 3)]

    def cell(key: str, form: str, scale: float = 1.0) -> str:
        return format(made[key] * scale, form) if made[key] is not None else "–"

    return [
        made["config"],
        f"{made['devices']} x {made['device']} ({made['topology']})",
        f"{made['batch_size']:,}",
        f"{cell('needed_bytes', '.2f', 2**-30)} of {cell('hbm_bytes', '.2f', 2**-30)}",
        "yes" if made["fits"] else "no",
        cell("model_flops", ".3g", 1e-12),
        cell("predicted_step_seconds", ".3f"),
        cell("predicted_mfu", ".1%"),
        cell("images_per_second", ",.0f"),
        cell("days", ".2f"),
        made["prediction"].partition(":")[0],
        cell("compile_seconds", ".0f"),
    ]


HEADER = [
    "recipe", "devices", "batch", "GiB per device", "fits", "model TFLOP per device", "step s", "MFU", "images/s",
    "days", "predicted by", "compile s",
]  # fmt: skip


def main() -> None:
    """Plan what the flags name and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", default="configs/clip_vitl.py", help="recipes, separated by commas")
    parser.add_argument("--topologies", default="v5e:16x16", help="device sets, separated by commas")
    parser.add_argument("--out", help="JSON file to write")
    args, options = parser.parse_known_args()
    plans = []
    for config in args.configs.split(","):
        for topology in args.topologies.split(","):
            plans.append(plan(config, topology, options))
            print(*row(plans[-1]), sep=" | ", file=sys.stderr, flush=True)
    found = {"environment": environment(), "plans": plans}
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for made in plans:
        print("| " + " | ".join(row(made)) + " |")
    print("\n" + json.dumps(found["environment"]))


if __name__ == "__main__":
    main()
