"""The smallest honest runs: a recipe file that trains in seconds, started in this process or in one of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from vlmjax import config

ROOT = Path(__file__).resolve().parents[2]
_PLACES = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


def recipe(**changes) -> config.Config:
    """An unvalidated recipe of width 16; `changes` are dotted paths with `/` for the dots."""
    c = config.recipe()
    c.batch_size = 16
    c.total.steps = 6
    c.log_every = 1
    c.export = False
    c.model.image.update(
        {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "image_size": 16, "patch_size": 8}
    )
    c.model.text.update({"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32, "max_length": 16})
    c.model.projection_dim = 16
    c.data.train = "scenes"
    c.data.tokenizer = "bpe:514"
    c.data.threads = 2
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup.steps = 2
    for path, value in changes.items():
        put(c, path.replace("__", "."), value)
    return c


def put(c: config.Config, path: str, value) -> None:
    """Set a dotted path."""
    *parents, last = path.split(".")
    for parent in parents:
        c = c[parent]
    c[last] = value


def source_code(**changes) -> str:
    """A recipe file whose get_config returns `recipe(**changes)`."""
    return (
        '"""A tiny recipe of the tests."""\n\n'
        "from tests.training import tiny\n\n\n"
        f"def get_config(arg=''):\n    return tiny.recipe(**{changes!r})\n"
    )


def write_recipe(folder: Path, **changes) -> Path:
    """The recipe as a file."""
    path = Path(folder) / "tiny_recipe.py"
    path.write_text(source_code(**changes))
    return path


def environment(devices: int = 1) -> dict[str, str]:
    """Environment of a process with so many simulated devices and nothing of the test's own launcher."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("VLMJAX_")}
    given = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    flags = f"{given} --xla_force_host_platform_device_count={devices}".strip()
    return env | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": _PLACES}


def python(*arguments, devices: int = 1, timeout: float = 300) -> subprocess.CompletedProcess:
    """A Python process of its own, to its end."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def rows(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]


def losses(workdir: Path) -> list[float]:
    """The logged losses in order."""
    return [row["loss"] for row in rows(workdir) if "loss" in row]
