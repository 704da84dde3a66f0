"""Starting is quick: `import vlmjax` and every command's --help load no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from vlmjax.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
FRAMEWORKS = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "tensorflow", "transformers"}
HEAVY = FRAMEWORKS | {"grain", "tensorboardX"}


def python(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


def loaded_after(code: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Top-level modules in a fresh interpreter after `code`, even if it leaves by SystemExit."""
    report = f"import atexit, sys\natexit.register(lambda: print('\\nLOADED', sorted(sys.modules)))\n{code}"
    run = python("-c", report)
    listed = run.stdout.rpartition("\nLOADED ")[2]
    assert listed, run.stderr
    return {name.partition(".")[0] for name in ast.literal_eval(listed)}, run


def test_the_measure_itself_sees_a_heavy_import():
    modules, _ = loaded_after("import optax")
    assert {"optax", "jax"} <= modules


def test_importing_the_package_loads_nothing_but_itself():
    modules, _ = loaded_after("import vlmjax")
    assert "vlmjax" in modules
    assert not modules & (HEAVY | {"numpy", "PIL"})


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_no_framework(command):
    modules, run = loaded_after(
        f"import runpy, sys\nsys.argv = ['vlmjax.{command}', '--help']\n"
        f"runpy.run_module('vlmjax.{command}', run_name='__main__')"
    )
    assert not modules & HEAVY
    assert "--" in run.stdout, f"no options in the help: {run.stdout}{run.stderr}"


def test_the_list_of_commands_is_complete():
    paths = (path for path in (ROOT / "vlmjax").rglob("*.py") if '__name__ == "__main__"' in path.read_text())
    runnable = {".".join(path.relative_to(ROOT / "vlmjax").with_suffix("").parts) for path in paths}
    assert set(COMMANDS) == {name.removesuffix(".__main__") for name in runnable - {"__main__"}}
    run = python("-m", "vlmjax")
    assert all(f"python -m vlmjax.{name} " in run.stdout for name in COMMANDS)


def test_data_rooms_never_load_jax():
    """What import-linter cannot see: a package that the data room uses may load jax itself, as grain does."""
    paths = [
        path for path in (ROOT / "vlmjax" / "data").rglob("*.py") if "import grain" not in path.read_text()
    ]
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths
    ]
    modules, run = loaded_after("\n".join(f"import {name}" for name in names))
    assert run.returncode == 0, run.stderr
    assert len(names) > 5
    assert not modules & FRAMEWORKS
