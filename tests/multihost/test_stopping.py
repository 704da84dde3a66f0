"""SIGTERM to one of two real processes: both save the same step, and the continued run is the undisturbed one."""

import signal

import pytest
from multihost.pair import STEPS, Pair, run
from training import tiny

pytestmark = pytest.mark.slow


def exact(workdir):
    """Losses and gradient norms by step, which must be equal bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in tiny.rows(workdir) if "loss" in row]


@pytest.mark.parametrize("number", [0, 1])
def test_sigterm_to_either_saves_one_step_on_both(uninterrupted, tmp_path, number):
    folder, recipe = uninterrupted
    with Pair(tmp_path, recipe, tmp_path / "run", PACE="0.1") as pair:
        pair.until_step(4)
        pair.processes[number].send_signal(signal.SIGTERM)
        assert pair.codes() == [42, 42], pair.output()
    step = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit())
    assert 4 <= step < STEPS
    message = f"stopped at step {step}, which is saved: the same command continues from there"
    assert pair.output().count(message) == 2
    assert f"steps       {step} to {STEPS} (continued)" in run(tmp_path, recipe, tmp_path / "run")
    assert exact(tmp_path / "run") == exact(folder / "run")


def test_ctrl_c_is_passed_on(uninterrupted, tmp_path):
    _, recipe = uninterrupted
    with Pair(tmp_path, recipe, tmp_path / "run", PACE="0.1") as pair:
        pair.until_step(2)
        pair.processes[1].send_signal(signal.SIGINT)
        assert pair.codes() == [42, 42], pair.output()


def test_an_evaluation_due_where_a_run_is_stopped_is_made_at_the_next_start(tmp_path):
    """And not before the state is saved: there may be no time. The log is that of the undisturbed run."""
    recipe = tiny.write_recipe(tmp_path, total__steps=8, data__threads=1, eval_every__steps=4)
    recipe.write_text(
        recipe.read_text().replace("return tiny", "c = tiny").rstrip()
        + "\n    from vlmjax import config\n"
        + "    c.evals.known = config.evaluation('retrieval', 'scenes:heldout', examples=16)\n    return c\n"
    )

    def log(name):
        keep = ("step", "loss")
        rows = tiny.rows(tmp_path / name)
        return [{k: v for k, v in row.items() if k in keep or k.startswith("eval/")} for row in rows]

    run(tmp_path, recipe, tmp_path / "whole", processes=1)
    output = run(tmp_path, recipe, tmp_path / "run", processes=1, code=42, STOP_AT="4")
    assert "stopped at step 4, which is saved" in output
    assert [row["step"] for row in log("run")] == [1, 2, 3, 4]
    run(tmp_path, recipe, tmp_path / "run", processes=1)
    assert [row["step"] for row in log("run") if "loss" not in row] == [4, 8]
    assert log("run") == log("whole")
