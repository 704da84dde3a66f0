"""The folder of a run: whole files only, on a disk and in a bucket."""

import json
import uuid

import fsspec
import numpy as np
import pytest

from vlmjax.errors import UserError
from vlmjax.training.workdir import Workdir, jsonable


@pytest.fixture
def bucket():
    """An address in memory, which behaves as one in a bucket."""
    root = f"memory://{uuid.uuid4().hex}"
    yield root
    fsspec.filesystem("memory").rm(root, recursive=True)


def test_on_a_disk_files_are_written_in_place(tmp_path):
    workdir = Workdir(str(tmp_path / "a" / "run"))
    workdir.write_json("deep/x.json", {"a": (1, 2), "b": tmp_path})
    assert json.loads((tmp_path / "a/run/deep/x.json").read_text()) == {"a": [1, 2], "b": str(tmp_path)}
    assert [p.name for p in (tmp_path / "a/run/deep").iterdir()] == ["x.json"]  # no temporary left
    assert workdir.checkpoints == str(tmp_path / "a/run/checkpoints")
    workdir.sync()


def test_a_relative_folder_has_an_absolute_address(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Workdir("runs/x/").checkpoints == str(tmp_path / "runs/x/checkpoints")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    workdir = Workdir(str(tmp_path))
    workdir.write_json("x.json", 1)
    with pytest.raises(ValueError, match="Circular"):
        circle = []
        circle.append(circle)
        workdir.write_json("x.json", circle)
    assert json.loads((tmp_path / "x.json").read_text()) == 1


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--workdir=.*file/run: cannot be created"):
        Workdir(str(tmp_path / "file" / "run"))


def test_other_processes_write_elsewhere_and_read_what_is_there(tmp_path):
    first = Workdir(str(tmp_path / "run"))
    first.write_json("recipe.json", {"seed": 1})
    first.path("tokenizer", "tokenizer.json").write_text("{}")
    other = Workdir(str(tmp_path / "run"), writer=False)
    assert json.loads(other.path("recipe.json").read_text()) == {"seed": 1}
    assert other.path("tokenizer", "tokenizer.json").read_text() == "{}"
    other.write_json("mine.json", 1)
    other.sync()
    assert not (tmp_path / "run" / "mine.json").exists()
    assert other.checkpoints == first.checkpoints


def test_in_a_bucket_only_what_changed_is_sent(bucket):
    workdir, system = Workdir(bucket), fsspec.filesystem("memory")
    workdir.write_json("recipe.json", 1)
    workdir.path("tokenizer", "vocab.json").write_text("v")
    workdir.sync()
    assert (
        system.cat(f"{bucket}/recipe.json") == b"1\n" and system.cat(f"{bucket}/tokenizer/vocab.json") == b"v"
    )
    system.pipe(f"{bucket}/tokenizer/vocab.json", b"as it was")
    workdir.write_json("recipe.json", 2)
    workdir.sync()
    assert system.cat(f"{bucket}/recipe.json") == b"2\n"
    assert system.cat(f"{bucket}/tokenizer/vocab.json") == b"as it was"  # unchanged here, not sent again
    again = Workdir(bucket)
    assert again.path("recipe.json").read_text() == "2\n"
    assert again.path("tokenizer", "vocab.json").read_text() == "as it was"
    assert again.checkpoints == f"{bucket}/checkpoints"


@pytest.mark.parametrize("writer", [True, False])
def test_what_any_process_leaves_is_at_the_root(bucket, tmp_path, writer):
    system = fsspec.filesystem("memory")
    address = Workdir(bucket, writer=writer).leave("x.json", {"a": 1})
    assert address == f"{bucket}/x.json" and json.loads(system.cat(address)) == {"a": 1}
    address = Workdir(str(tmp_path), writer=writer).leave("x.json", {"a": 2})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2} and address == str(tmp_path / "x.json")


def test_whether_there_is_a_checkpoint(bucket, tmp_path):
    workdir = Workdir(str(tmp_path))
    assert not workdir.has_checkpoints()
    (tmp_path / "checkpoints").mkdir()
    assert not workdir.has_checkpoints()
    (tmp_path / "checkpoints" / "12").mkdir()
    assert workdir.has_checkpoints()
    assert not Workdir(bucket).has_checkpoints()
    fsspec.filesystem("memory").pipe(f"{bucket}/checkpoints/12/x", b"")
    assert Workdir(bucket).has_checkpoints()


def test_numbers_that_json_cannot_hold():
    found = jsonable(
        {"a": np.float32(0.5), "b": np.int64(3), "c": float("nan"), "d": np.float32("inf"), "e": True}
    )
    assert found == {"a": 0.5, "b": 3, "c": "nan", "d": "inf", "e": True}
    assert json.loads(json.dumps(found)) == found
