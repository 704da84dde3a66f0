"""Conversion to shards: nothing lost, resumable, the same on Beam."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture, shard, write_tar

from vlmjax.data import convert, images
from vlmjax.data.formats import tar_writer
from vlmjax.data.record import Record
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError

PACKAGE = Path(__file__).parent.parent.parent


@pytest.fixture(name="shards")
def _shards(tmp_path):
    """Twenty samples in two tars, the twelfth damaged, and a table of five with several captions."""
    shard(tmp_path / "a.tar", 0, 12)
    shard(tmp_path / "b.tar", 12, 8)
    rows = []
    for i in range(5):
        (tmp_path / f"p{i}.v1.png").write_bytes(encoded(picture(50 + i, 300, 200)))
        rows.append({"image": f"p{i}.v1.png", "captions": [caption(i), "another one"], "year": 1990 + i})
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{tmp_path}/{{a,b}}.tar,{tmp_path}/t.jsonl"


def _run(*args: str) -> int:
    return convert.main(list(args))


def _records(spec: str) -> list:
    source = open_source(spec)
    return [source[i] for i in range(len(source))]


@pytest.mark.parametrize("form", ["tar", "array_record"])
def test_what_goes_in_comes_out(shards, tmp_path, form, capsys):
    if form == "array_record":
        pytest.importorskip("array_record")
    out = tmp_path / "out"
    assert _run(shards, f"--out={out}", f"--format={form}", "--records=4") == 0
    assert "25 records in" in capsys.readouterr().out
    made = sorted(path.name for path in out.iterdir())
    assert len(made) == 2 * 7 + 1 and made[0] == "convert.json" and not [n for n in made if ".part" in n]
    got, given = _records(f"{out}/data-*{convert.FORMATS[form]}"), _records(shards)
    assert [one.captions for one in got] == [one.captions for one in given]
    assert [one.image for one in got] == [one.image for one in given]
    if form == "array_record":
        assert [one.key for one in got] == [one.key for one in given] and got[-1].extra == {"year": 1994}
    else:
        assert got[-1].key == "p4_v1_png" and json.loads(got[-1].extra["json"])["year"] == 1994
        assert json.loads(got[0].extra["json"])["width"] == 48, "a json member goes through untouched"


def test_shuffled_scaled_and_checked(shards, tmp_path, capsys):
    write_tar(tmp_path / "c.tar", {"x.jpg": b"\xff\xd8\xff not an image", "x.txt": b"broken"})
    out = tmp_path / "out"
    assert _run(f"{shards},{tmp_path}/c.tar", f"--out={out}", "--shuffle=3", "--shortest=32", "--check") == 0
    told = capsys.readouterr().out
    assert "25 records" in told and "left out: undecodable 1" in told or "left out: not_an_image 1" in told
    got = _records(str(out))
    order = [one.captions for one in got]
    assert order != [one.captions for one in _records(shards)]
    assert sorted(order) == sorted(one.captions for one in _records(shards))
    assert {min(images.decode(one.image).shape[:2]) for one in got} == {32}
    assert all(one.image.startswith(b"\xff\xd8\xff") for one in got)


def test_scenes_become_shards(tmp_path):
    out = tmp_path / "out"
    job = convert.Job("scenes", str(out), records=3)
    source = open_source("scenes")
    counts = job.write(0)
    assert counts == {"written": 3}
    got = _records(f"{out}/data-00000.tar")
    for i, one in enumerate(got):
        assert one.captions == source[i].captions
        assert np.abs(images.decode(one.image).astype(int) - source[i].image).mean() < 4


def test_finished_shards_are_kept_and_other_conversions_refused(shards, tmp_path, capsys):
    out = tmp_path / "out"
    assert _run(shards, f"--out={out}", "--records=10") == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("data-*")}
    (out / "data-00001.tar").unlink()
    (out / "data-00002.tar.json").unlink()
    assert _run(shards, f"--out={out}", "--records=10") == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("data-*")}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"data-0000{i}.tar{end}" for i in (1, 2) for end in ("", ".json")}
    assert len(_records(f"{out}/data-*.tar")) == 25
    capsys.readouterr()
    assert _run(shards, f"--out={out}", "--records=5") == 1
    assert "holds a conversion of other data or with other options" in capsys.readouterr().err


def test_bad_arguments(shards, tmp_path, capsys):
    assert _run(f"{tmp_path}/none.tar", f"--out={tmp_path}/out") == 1
    assert "none.tar" in capsys.readouterr().err
    for given, told in [
        (["--recrods=5"], "unknown option"),
        (["--records=0"], "at least 1"),
        (["--format=zip"], "zip"),
    ]:
        with pytest.raises(SystemExit) as caught:
            _run(shards, f"--out={tmp_path}/out", *given)
        assert caught.value.code == 2 and told in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert _run(shards, f"--out={tmp_path}/file/out") == 1
    assert "cannot write" in capsys.readouterr().err


def test_killed_and_started_again(tmp_path):
    """kill -9 while it writes: the same command finishes, with the bytes of an undisturbed one."""
    shard(tmp_path / "a.tar", 0, 120)
    command = [
        sys.executable,
        "-m",
        "vlmjax.data.convert",
        str(tmp_path / "a.tar"),
        "--records=3",
        "--workers=1",
    ]
    command += ["--shortest=39"]  # scaled: slow enough to be caught in the middle
    env = {**os.environ, "PYTHONPATH": str(PACKAGE)}
    out = tmp_path / "killed"
    child = subprocess.Popen([*command, f"--out={out}"], env=env, stdout=subprocess.DEVNULL)
    while len(list(out.glob("data-*.tar"))) < 3:
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (out / f"data-00079.tar.{socket.gethostname()}-{child.pid}.part").write_bytes(
        b"if it was caught between two"
    )
    for folder in (out, tmp_path / "whole"):
        subprocess.run([*command, f"--out={folder}"], env=env, check=True, stdout=subprocess.DEVNULL)
    made = sorted(path.name for path in (tmp_path / "whole").glob("data-*"))
    assert len(made) == 80 and made == sorted(path.name for path in out.glob("data-*"))
    for name in made:
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_parts_of_the_dead_are_removed_and_no_others(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    dead, host = subprocess.Popen(["true"]), socket.gethostname()
    dead.wait()
    waste = [f"out/data-00001.tar.{host}-{dead.pid}.part", f"tmp/vlmjax-convert-ab.{host}-{dead.pid}.part",
             "out/data-00009.tar.elsewhere-7.part"]  # fmt: skip
    kept = [f"out/data-00008.tar.{host}-{os.getpid()}.part", "out/data-00000.tar.elsewhere-7.part", "out/other.part",
            f"tmp/x.{host}-{dead.pid}.part"]  # fmt: skip
    (tmp_path / "out").mkdir()
    for name in waste + kept:
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / waste[2], (0, 0))
    assert _run(shards, f"--out={tmp_path}/out", "--records=10") == 0
    assert [name for name in waste + kept if (tmp_path / name).exists()] == kept


def test_progress_off_a_terminal_is_lines(shards, tmp_path, capsys):
    assert _run(shards, f"--out={tmp_path}/out", "--records=1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["25 of 25 shards, 25 records", f"25 records in {tmp_path}/out; left out: none"]
    assert 9 <= len(lines) <= 12 and not any("\r" in line for line in lines)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Beam's own imports warn
def test_on_beam(shards, tmp_path):
    pytest.importorskip("apache_beam")
    job = convert.Job(shards, str(tmp_path / "beam"), records=4)
    counts = convert.convert(job, beam=["--runner=DirectRunner"])
    assert counts == {"written": 25}
    convert.convert(convert.Job(shards, str(tmp_path / "here"), records=4))
    for path in (tmp_path / "here").glob("data-*"):
        assert path.read_bytes() == (tmp_path / "beam" / path.name).read_bytes()


@pytest.mark.filterwarnings("ignore")  # webdataset leaves the tar open
def test_names_with_a_slash_and_repeated_keys(tmp_path):
    """What webdataset itself reads, with nothing lost: no slash in an extension, no key twice."""
    image = encoded(picture(0))
    members = {"image/Format": b"png", "image_format": b"other", "PNG": b"not it", "text": b"no caption"}
    with tar_writer.Writer(str(tmp_path / "x.tar")) as out:
        for key in ("a", "a", "a-2", "b.c", "b_c"):
            out.write(Record(key, image, ("one",), dict(members)))
    source = open_source(str(tmp_path / "x.tar"))
    got = [source[i] for i in range(len(source))]
    assert [one.key for one in got] == ["a", "a-2", "a-2-2", "b_c", "b_c-2"]
    for one in got:
        assert one.image == image and one.captions == ("one",)
        assert sorted(one.extra.values()) == sorted(members.values())
        assert set(one.extra) == {"image_format", "image_format_2", "png_2", "text_2"}
    webdataset = pytest.importorskip("webdataset")
    read = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert [one["__key__"] for one in read] == [one.key for one in got]


def test_written_beside_the_target_and_a_full_disk(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    job = convert.Job(shards, str(tmp_path / "out"), records=10)
    assert job.write(0)["written"] == 10 and len(list((tmp_path / "out").iterdir())) == 2

    def full(*given) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tar_writer.Writer, "write", full)
    with pytest.raises(DataError, match=r"cannot write .*data-00001.tar: the disk of .*out is full"):
        job.write(1)
    assert len(list((tmp_path / "out").iterdir())) == 2
    remote = convert.Job(shards, "memory://made/out", records=10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(DataError, match=r"is full; name another folder for temporary files with TMPDIR"):
        remote.write(1)
    assert not list(tmp_path.glob("vlmjax-convert-*"))


def test_keys_that_readers_would_pass_over(tmp_path):
    keys = ["__a", "b/__c", "._d", "_e"]
    image = encoded(picture(0))
    with tar_writer.Writer(str(tmp_path / "x.tar")) as out:
        for key in keys:
            out.write(Record(key, image, ("one",)))
    source = open_source(str(tmp_path / "x.tar"))
    assert [source[i].key for i in range(len(source))] == ["x__a", "b/x__c", "x__d", "_e"]


@pytest.mark.parametrize("wrong", ["--out=", "--out= ", "--workers=-3"])
def test_options_that_are_refused(shards, tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        _run(shards, f"--out={tmp_path}/o", wrong)
    assert wrong.split("=")[0] in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_an_unknown_kind_of_storage(shards, capsys):
    assert _run(shards, "--out=nowhere://x/y") == 1
    assert "no driver for nowhere://" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"written": "x"}', b"\xff"])
def test_damaged_counts_and_manifest(shards, tmp_path, damage):
    job = convert.Job(shards, str(tmp_path / "out"), records=30)
    counts = convert.convert(job, 1)
    beside = tmp_path / "out" / "data-00000.tar.json"
    beside.write_bytes(damage)
    assert convert.convert(job, 1) == counts and json.loads(beside.read_bytes()) == counts
    (tmp_path / "out" / "convert.json").write_bytes(damage)
    with pytest.raises(DataError, match="is damaged|other data"):
        convert.convert(job, 1)
