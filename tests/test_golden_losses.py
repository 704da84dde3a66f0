"""The golden losses and the check of a run against them: what it lets pass, and what not."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("golden_losses", ROOT / "benchmarks" / "golden_losses.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, tmp_path):
    """Writes a run with the golden losses of a recipe times a factor."""

    def write(recipe="quickstart", factor=1.0, dtype="float32", last=None):
        golden = json.loads(script.GOLDEN.read_text())["recipes"][recipe]
        rows = [{"step": int(step), "loss": loss * factor} for step, loss in golden.items()]
        rows[-1]["loss"] = rows[-1]["loss"] if last is None else last
        folder = tmp_path / recipe
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": 1, "eval/x": 0.5}])))
        (folder / "recipe.json").write_text(json.dumps({"loss": {"feature_dtype": dtype}}))
        return folder

    return write


def test_every_recipe_has_golden_losses(script):
    recipes = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__"}
    assert set(json.loads(script.GOLDEN.read_text())["recipes"]) == recipes


@pytest.mark.parametrize(
    ("where", "changes", "code"),
    [
        ("here", {}, 0),
        ("here", {"factor": 1 + 1e-7}, 1),
        ("elsewhere", {"factor": 1 + 5e-5}, 0),
        ("elsewhere", {"factor": 1 + 5e-4}, 1),
        ("elsewhere", {"factor": 1 + 5e-4, "dtype": "bfloat16"}, 0),
        ("elsewhere", {"last": "nan"}, 1),  # as metrics.jsonl has what json has not
    ],
)
def test_bit_for_bit_on_the_same_machine_and_nearly_elsewhere(script, run, monkeypatch, where, changes, code):
    made = json.loads(script.GOLDEN.read_text())["machine"]
    monkeypatch.setattr(script, "machine", lambda: made if where == "here" else "another")
    assert script.check([run(), run("moco_clip", **changes)]) == code


def test_a_step_that_was_not_logged_and_a_recipe_that_is_new(script, run, capsys):
    folder = run()
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[1:]))
    assert script.check([folder]) == 1 and "logged at steps [" in capsys.readouterr().out
    assert script.check([folder.rename(folder.with_name("another"))]) == 1
    assert "no golden losses of such a recipe" in capsys.readouterr().out


def test_what_is_written_is_what_is_checked(script, run, monkeypatch, tmp_path):
    folder = run(factor=1.5)
    monkeypatch.setattr(script, "GOLDEN", tmp_path / "losses.json")
    assert script.write([folder]) == 0 == script.check([folder])
    assert list(json.loads(script.GOLDEN.read_text())["recipes"]) == ["quickstart"]
