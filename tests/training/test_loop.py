"""Whole runs: what they leave, how they stop, and that a run that was killed ends as if it never had been."""

import json
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from training import tiny

pytestmark = pytest.mark.slow

# The train command, with every batch it takes noted: step and keys, one json object per line.
NOTING = """
import atexit, json, os, sys
from vlmjax.data import pipeline
atexit.register(lambda: print("torch imported:", "torch" in sys.modules))
taken, notes = pipeline.TrainData.__next__, open(os.environ["NOTES"], "a")
def noting(self):
    batch = taken(self)
    print(json.dumps([self.step, list(batch["key"])]), file=notes, flush=True)
    return batch
pipeline.TrainData.__next__ = noting
from absl import app
from vlmjax import main
app.run(main.main, flags_parser=main.parse)
"""


def shard(path, count, damaged=()):
    """Pictures of one colour each with a caption that names it."""
    import io

    from PIL import Image

    with tarfile.open(path, "w") as tar:
        for i in range(count):
            picture = io.BytesIO()
            Image.new("RGB", (20, 20), (i * 7 % 256, i * 31 % 256, i * 57 % 256)).save(picture, "PNG")
            data = {"png": b"damaged" if i in damaged else picture.getvalue(), "txt": f"colour {i}".encode()}
            for ending, content in data.items():
                entry = tarfile.TarInfo(f"{i:04d}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return str(path)


def start(recipe, workdir, *arguments, notes=None, devices=1):
    """The train command in a process of its own."""
    env = tiny.environment(devices) | {"NOTES": str(notes)}
    command = [sys.executable, "-m", "vlmjax.main"] if notes is None else [sys.executable, "-c", NOTING]
    return subprocess.Popen(
        [*command, f"--config={recipe}", f"--workdir={workdir}", *arguments],
        cwd=tiny.ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(recipe, workdir, *arguments, code=0, **options):
    """A run to its end; returns (standard output, error output)."""
    process = start(recipe, workdir, *arguments, **options)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    assert "Traceback" not in err
    return out, err


def exact(workdir):
    """What must be equal bit for bit: the losses and gradient norms by step, and the evaluations."""
    keep = ("step", "loss", "grad_norm")
    return [
        {k: v for k, v in row.items() if k in keep or k.startswith("eval/")} for row in tiny.rows(workdir)
    ]


CHANGES = {
    "batch_size": 16,
    "total__steps": 14,
    "checkpoint__every__steps": 3,
    "ema__decay": 0.9,
    "data__threads": 3,
    "log_every": 1,
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 14 steps over 40 pictures (5.6 epochs), with evaluation, threads and a moving average."""
    folder = tmp_path_factory.mktemp("whole")
    data = shard(folder / "train.tar", 40)
    recipe = folder / "recipe.py"
    recipe.write_text(
        tiny.source_code(**CHANGES, data__train=data).replace("return tiny", "c = tiny", 1).rstrip()
        + "\n    from vlmjax import config\n"
        + f"    c.evals.known = config.evaluation('retrieval', {data!r}, examples=16)\n"
        + "    c.eval_every.steps = 5\n    return c\n"
    )
    out, err = run(recipe, folder / "run", notes=folder / "notes")
    return folder, recipe, out, err


def test_what_a_run_leaves(uninterrupted):
    folder, _, out, err = uninterrupted
    rows = tiny.rows(folder / "run")
    trained, evaluated = ([r for r in rows if key in r] for key in ("loss", "eval/known/text_to_image_r1"))
    assert [row["step"] for row in trained] == list(range(1, 15))
    assert [row["step"] for row in evaluated] == [5, 10, 14]
    rates = {"images_per_second", "step_seconds", "data_wait_share", "model_tflops_per_second"}
    always = {
        "loss",
        "grad_norm",
        "learning_rate",
        "logit_scale",
        "skipped",
        "examples",
        "image_to_text_accuracy",
    }
    assert always <= set(trained[0]) and always | rates <= set(trained[5])
    assert trained[5]["examples"] == 96 and trained[5]["skipped"] == 0
    assert trained[0]["learning_rate"] == 0.0 and trained[1]["learning_rate"] == pytest.approx(5e-4)
    assert trained[-1]["loss"] < trained[0]["loss"]
    for name in ("recipe.json", "model.json", "environment.json", "report.html", "tokenizer/tokenizer.json"):
        assert (folder / "run" / name).is_file(), name
    assert list((folder / "run" / "tensorboard").iterdir())
    assert json.loads((folder / "run" / "recipe.json").read_text())["ema"] == {"decay": 0.9}
    assert "placement" in out and "step 14/14" in out
    assert "torch imported: False" in out  # nor by what writes for TensorBoard
    assert err == "", err


def epochs_of(notes, records, batch):
    """Keys by epoch from the notes, the last note of a step counting (an earlier one was lost with its process)."""
    by_step = dict(json.loads(line) for line in notes.read_text().splitlines())
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    keys = [key for step in sorted(by_step) for key in by_step[step]]
    return [keys[i : i + records] for i in range(0, len(keys), records)], by_step


def test_killed_and_started_again(uninterrupted, tmp_path):
    """kill -9 after step 7: the same losses bit for bit, the same examples, none twice in an epoch, none lost."""
    folder, recipe, _, _ = uninterrupted
    workdir, notes = tmp_path / "run", tmp_path / "notes"
    process = start(recipe, workdir, notes=notes)
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "6" / "commit_success.txt").exists() and not (
        notes.exists() and len(notes.read_text().splitlines()) >= 8
    ):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = [row["step"] for row in tiny.rows(workdir) if "loss" in row]
    assert done and done[-1] < 14, "the run ended before it could be killed"
    before = epochs_of(notes, 40, 16)[1]
    out, _ = run(recipe, workdir, notes=notes)
    assert "(continued)" in out
    assert exact(workdir) == exact(folder / "run")
    epochs, by_step = epochs_of(notes, 40, 16)
    for epoch in epochs[:-1]:
        assert len(epoch) == 40 and len(set(epoch)) == 40
    assert len(set(epochs[-1])) == len(epochs[-1])
    assert by_step == epochs_of(folder / "notes", 40, 16)[1]
    assert all(by_step[step] == keys for step, keys in before.items() if step in by_step)


def test_continued_from_the_middle_of_an_epoch_with_other_threads(uninterrupted, tmp_path):
    """Stopped at step 7 (2.8 epochs) by a shorter total, continued with no threads: bit-equal, average included."""
    from vlmjax.training.checkpoint import Checkpoints

    folder, recipe, _, _ = uninterrupted
    constant = "--config.optimizer.schedule=constant"
    run(recipe, tmp_path / "whole", constant)
    run(recipe, tmp_path / "parts", constant, "--config.total.steps=7")
    run(recipe, tmp_path / "parts", constant, "--config.data.threads=1")
    in_both = [row for row in exact(tmp_path / "whole") if "loss" in row]
    assert [row for row in exact(tmp_path / "parts") if "loss" in row] == in_both
    first, second = (
        Checkpoints(str(tmp_path / name / "checkpoints"), writable=False).read_params(14)[0]
        for name in ("whole", "parts")
    )
    assert first["ema"]
    for a, b in zip(_leaves(first), _leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert exact(tmp_path / "whole") != exact(folder / "run")  # the schedule does matter


def _leaves(tree):
    return [
        leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])
    ]


def test_a_finished_run_started_again_trains_no_further(uninterrupted):
    folder, recipe, _, _ = uninterrupted
    before = exact(folder / "run")
    out, _ = run(recipe, folder / "run")
    assert exact(folder / "run") == before
    assert "chance" in out  # the table of results is shown again


def test_continuing_with_what_does_not_fit_is_refused(uninterrupted):
    folder, recipe, _, _ = uninterrupted
    _, err = run(recipe, folder / "run", "--config.model.image.mlp_dim=48", code=1)
    assert err.startswith("error: ") and "belongs to another model" in err and "mlp/fc1/kernel" in err
    _, err = run(recipe, folder / "run", "--config.seed=5", code=1)
    assert "cannot continue: seed was 0 and is 5" in err


def test_an_evaluation_that_fails_does_not_lose_what_was_learned(uninterrupted, tmp_path):
    folder, recipe, _, _ = uninterrupted
    classes = tmp_path / "classes.txt"
    classes.write_text("nothing of the kind\nneither\n")
    judge = ("--config.evals.known.benchmark=zeroshot", f"--config.evals.known.classes={classes}")
    _, err = run(recipe, tmp_path / "run", *judge, "--config.checkpoint.every.steps=100", code=1)
    assert "nothing of the kind" in err or "class" in err
    assert (tmp_path / "run" / "checkpoints" / "5").is_dir()  # the first evaluation; no checkpoint was due


def test_a_loss_that_explodes_stops_with_the_examples(uninterrupted, tmp_path):
    folder, recipe, _, _ = uninterrupted
    huge = (
        "--config.optimizer.learning_rate=1e38",
        "--config.optimizer.warmup.steps=0",
        "--config.loss.logit_scale=learned",
        "--config.nonfinite_limit=3",
    )
    _, err = run(recipe, tmp_path / "run", *huge, code=77, notes=tmp_path / "notes")
    left = sorted(
        (tmp_path / "run").glob("nonfinite-*.json"), key=lambda p: json.loads(p.read_text())["step"]
    )
    saved, record = left[-1], json.loads(left[-1].read_text())
    assert len(left) == 3 and saved.name == f"nonfinite-{record['step']}.json"
    # One was due at step 3, after the update that spoiled the parameters.
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    taken = dict(json.loads(line) for line in (tmp_path / "notes").read_text().splitlines())
    assert record["keys"] == taken[record["step"]] and len(record["keys"]) == 16
    assert record["groups"] and set(record["groups"]) <= {
        "vision_model", "text_model", "visual_projection", "text_projection", "logit_scale",
    }  # fmt: skip
    last = err.splitlines()[-1]
    assert last.startswith("error: step ") and str(saved) in last and "3 step(s) in a row" in last


def test_damaged_records_are_counted_and_too_many_stop_the_run(uninterrupted, tmp_path):
    _, recipe, _, _ = uninterrupted
    data = f"--config.data.train={shard(tmp_path / 'x.tar', 40, damaged=[3, 11, 12])}"
    steps = "--config.total.steps=5"
    _, err = run(recipe, tmp_path / "run", data, steps, "--config.data.max_bad_share=0.2")
    last = [row for row in tiny.rows(tmp_path / "run") if "loss" in row][-1]
    assert last["skipped"] == last["skipped/not_an_image"] == 6  # 80 records are two epochs
    assert np.isfinite(last["loss"])
    many = f"--config.data.train={shard(tmp_path / 'y.tar', 40, damaged=range(0, 40, 2))}"
    _, err = run(recipe, tmp_path / "stopped", many, "--config.total.steps=200", code=1)
    last = err.splitlines()[-1]
    assert (
        last.startswith("error: ")
        and "are unusable (not_an_image" in last
        and "more than the 1.0% allowed" in last
    )


def test_profile_writes_a_trace(uninterrupted, tmp_path):
    _, recipe, _, _ = uninterrupted
    run(recipe, tmp_path / "run", "--config.total.steps=5", "--profile")
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(tiny.losses(tmp_path / "run")) == 5


def test_starting_from_an_exported_model(uninterrupted, tmp_path):
    """The loss goes on near where training left it, at another image size as well."""
    folder, recipe, _, _ = uninterrupted
    trained = tiny.losses(folder / "run")
    export = tiny.python("-m", "vlmjax.export", f"--workdir={folder}/run", f"--out={tmp_path}/hf")
    assert export.returncode == 0 and export.stderr == "", export.stderr
    begin = (f"--config.init_from={tmp_path}/hf", "--config.data.tokenizer=", "--config.total.steps=4")
    run(recipe, tmp_path / "same", *begin)
    run(recipe, tmp_path / "larger", *begin, "--config.model.image.image_size=24")
    first = tiny.losses(tmp_path / "same")[0]
    assert abs(first - trained[-1]) < abs(first - trained[0]), (first, trained)
    assert tiny.losses(tmp_path / "larger")[0] < (trained[0] + trained[-1]) / 2
    assert json.loads((tmp_path / "larger" / "model.json").read_text())["image"]["image_size"] == 24
    _, err = run(recipe, tmp_path / "bad", *begin, "--config.model.image.image_size=20", code=78)
    assert "config.model.image.image_size=20 is not a multiple" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 42)])
def test_asked_to_stop_it_saves_and_goes_on_from_there(uninterrupted, tmp_path, number, code):
    """Ctrl-C and SIGTERM between checkpoints: nothing is done twice, and the end is that of the undisturbed run."""
    folder, recipe, _, _ = uninterrupted
    never = "--config.checkpoint.every.steps=1000"
    process = start(recipe, tmp_path / "run", never)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not tiny.rows(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
    assert err.endswith(f"stopped at step {step}, which is saved: the same command continues from there\n")
    out, _ = run(recipe, tmp_path / "run", never)
    assert f"steps       {step} to 14 (continued)" in out
    assert exact(tmp_path / "run") == exact(folder / "run")
