"""Two processes restore one checkpoint: they agree, go back together, and name who is silent; none of them hangs."""

import importlib
import json
import shutil
import time
from pathlib import Path

import pytest
from etils import epath
from multihost.test_local_launcher import launch
from training import damage

from vlmjax.training import records
from vlmjax.training.digests import digests

HERE = Path(__file__).resolve().parent
OPTIONS = ("--processes=2", "--devices_per_process=2", "--module=restore_program", "--grace_seconds=2", "--")


def run(*arguments, code=0):
    found, output = launch(*OPTIONS, *arguments, timeout=150)
    assert found == code, output
    return output


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "c"
    run("write", folder)
    return folder


def restored(folder, out):
    """The step both processes went on from, with the right weights each."""
    found = [json.loads((out.parent / f"{out.name}-{i}").read_text()) for i in range(2)]
    assert all(each["equal"] for each in found)
    assert found[0]["step"] == found[1]["step"]
    assert (folder / "9").is_dir()  # and it can save again
    return found[0]["step"]


def test_one_process_cannot_read_what_the_other_can(written, tmp_path):
    shutil.copytree(written, tmp_path / "c")
    output = run("restore", tmp_path / "c", tmp_path / "out", 1)
    assert restored(tmp_path / "c", tmp_path / "out") == 1
    assert "process 1: " in output and "cannot be read here; kept as 2.damaged" in output
    assert output.count("damaged:") == 1  # said once, by process 0
    assert "cannot be read here" in (tmp_path / "c" / "2.damaged" / "why.txt").read_text()


@pytest.mark.parametrize("how", ["asleep", "stopped"])
def test_who_is_silent_is_named(written, tmp_path, how):
    """And waited for no longer: the other leaves without jax's own wait at the end of a process."""
    shutil.copytree(written, tmp_path / "c")
    began = time.monotonic()
    output = run("restore", tmp_path / "c", tmp_path / "out", -1, 1, how, code=75)
    assert "error: restoring checkpoint 2: process 0 waited 3 s for process 1 of 2" in output
    assert time.monotonic() - began < 60
    assert (tmp_path / "c" / "2").is_dir()


@pytest.mark.slow
def test_no_damage_to_any_file_gives_wrong_weights_or_hangs(written, tmp_path):
    """Each file once; the way of damage rotates, so that all of them occur."""
    ways, names = damage.ways(2), [path.relative_to(written / "2") for path in damage.files(written / "2")]
    folders, outs = ([tmp_path / f"{what}{i}" for i in range(len(names))] for what in ("c", "out"))
    for i, (name, folder) in enumerate(zip(names, folders, strict=True)):
        shutil.copytree(written, folder)
        ways[i % len(ways)](folder / "2" / name)
    output = run("restore", ",".join(map(str, folders)), ",".join(map(str, outs)))
    fell = [restored(folder, out) == 1 for folder, out in zip(folders, outs, strict=True)]
    for name, folder, back in zip(names, folders, fell, strict=True):
        said = [line for line in output.splitlines() if f"{folder}/2" in line and "kept as 2.damaged" in line]
        assert back == bool(said) == (folder / "2.damaged").exists(), (name, output)
    assert sum(fell) >= len(names) // 3


def test_digests_are_those_of_one_process(written, monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    values = importlib.import_module("restore_program").values(2)
    record = records.read(epath.Path(written) / "2")
    expected, _ = digests({"params/w": values["params"]["w"], "step": values["step"]})
    assert {name: digest for name, (*_, digest) in record["arrays"].items()} == expected
