"""Side files of shards: where they are kept, that they fit, what happens when they do not, and the command."""

import json
import logging
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture, shard, write_tar

from vlmjax.data import index
from vlmjax.data.formats import tar
from vlmjax.data.formats.webdataset import TarSource
from vlmjax.data.sources import image_sizes, open_source
from vlmjax.data.storage import samples, shard_index
from vlmjax.errors import BadRecord, DataError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("VLMJAX_CACHE", str(folder))
    return folder


def built(monkeypatch) -> list[str]:
    """The shards whose headers are read from now on."""
    seen, real = [], tar.index
    monkeypatch.setattr(tar, "index", lambda path: seen.append(os.path.basename(path)) or real(path))
    return seen


def records(source) -> list:
    return [(source[i].key, source[i].captions, source[i].image) for i in range(len(source))]


def test_flat_arrays_hold_what_was_put_in():
    groups = [
        ("a", [("jpg", 512, 10), ("txt", 5 * 2**40, 20)]),
        ("é", []),
        ("ccc", [("png", 1024, 7 * 2**32)]),
    ]
    flat = samples.flatten(groups, {0: (70_000, 4)})
    assert [flat.key(i) for i in range(flat.count)] == ["a", "é", "ccc"]
    expected = [{name: (at, size) for name, at, size in parts} for _, parts in groups]
    assert [flat.parts(i) for i in range(3)] == expected
    for i in range(3):
        codes, offsets, sizes = flat.members(i)
        names = [flat.extensions[code] for code in codes]
        assert dict(zip(names, zip(offsets, sizes, strict=True), strict=True)) == expected[i]
    assert flat.offset.dtype == np.uint64 and flat.columns["width"].tolist() == [70_000, 0, 0]
    many = samples.flatten([(str(i), [(f"e{i}", 512 * i, i)]) for i in range(300)])
    assert many.parts(299) == {"e299": (512 * 299, 299)} and many.extension.dtype == np.uint16


def test_side_file_beside_then_cache_then_built(tmp_path, cache, monkeypatch):
    path = shard(tmp_path / "a.tar", 0, 5)
    seen = built(monkeypatch)
    first = open_source(str(path))
    assert seen == ["a.tar"] and len(list(cache.rglob("*.index"))) == 1 and not list(tmp_path.glob("*.index"))
    assert records(open_source(str(path))) == records(first) and seen == ["a.tar"]
    assert index.main([str(path), "--force"]) == 0 and (tmp_path / "a.tar.index").is_file()
    for old in cache.rglob("*.index"):
        old.unlink()
    seen.clear()
    assert records(open_source(str(path))) == records(first) and seen == []
    assert open_source(str(path)).fingerprint == first.fingerprint


@pytest.mark.parametrize("where", ["beside", "cache"])
def test_index_of_another_shard_is_not_used(tmp_path, monkeypatch, caplog, where):
    """A shard replaced by one of the same size and member sizes, but other contents."""
    rng = np.random.default_rng(0)
    names = [f"{i:03d}.{e}" for i in range(20) for e in ("jpg", "txt")]
    path = write_tar(tmp_path / "a.tar", {name: rng.bytes(900) for name in names})
    if where == "beside":
        index.main([str(path)])
    else:
        open_source(str(path))
    seen, before = built(monkeypatch), path.stat().st_size
    with caplog.at_level(logging.WARNING):
        assert len(open_source(str(path))) == 20 and seen == [] and not caplog.records
        write_tar(path, {name.replace("0", "x"): rng.bytes(900) for name in names})
        assert path.stat().st_size == before
        source = open_source(str(path))
    assert seen == ["a.tar"] and source.key(0) == "xxx"
    warnings = [r.getMessage() for r in caplog.records]
    assert len(warnings) == 1 and "does not belong to its shard" in warnings[0] and "a.tar" in warnings[0]
    caplog.clear()
    assert len(open_source(str(path))) == 20


def test_probes_cover_the_whole_shard(tmp_path):
    """Other bytes in the first or the last member's header or first contents are noticed."""
    path = shard(tmp_path / "a.tar", 0, 40)
    data, flat = path.read_bytes(), tar.index(str(path))
    described = shard_index.describe(str(path), flat)
    assert described.fits(str(path))
    for j in (0, len(flat.offset) - 1):
        for at in (int(flat.offset[j]) * 512 - 400, int(flat.offset[j]) * 512 + 3):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            assert not described.fits(str(path)), (j, at)
    path.write_bytes(data + b"\0" * 512)
    assert not described.fits(str(path))


@pytest.mark.parametrize("harm", ["cut", "empty", "header", "magic", "text"])
def test_damaged_side_file_is_made_anew(tmp_path, cache, monkeypatch, caplog, harm):
    path = shard(tmp_path / "a.tar", 0, 5)
    expected = records(open_source(str(path)))
    side = next(cache.rglob("*.index"))
    data = side.read_bytes()
    side.unlink()  # files of the cache are replaced, never changed: they are mapped
    side.write_bytes(
        {"cut": data[:-8], "empty": b"", "header": data[:40] + b"?" + data[41:], "magic": b"x" + data[1:],
         "text": b"no index"}[harm]
    )  # fmt: skip
    seen = built(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert records(open_source(str(path))) == expected and seen == ["a.tar"]
    assert "not a usable index" in caplog.text
    assert records(open_source(str(path))) == expected and seen == ["a.tar"]


def test_contents_damaged_are_noticed_when_first_used(tmp_path, cache, monkeypatch, caplog):
    path = shard(tmp_path / "a.tar", 0, 5)
    expected = records(open_source(str(path)))
    side = next(cache.rglob("*.index"))
    data = bytearray(side.read_bytes())
    data[-3] ^= 0xFF
    side.unlink()
    side.write_bytes(data)
    monkeypatch.setattr(shard_index, "_MAPPED", shard_index._Maps())
    source = pickle.loads(pickle.dumps(open_source(str(path))))
    seen = built(monkeypatch)
    source._build = tar.index
    with caplog.at_level(logging.WARNING):
        assert records(source) == expected
    assert seen == ["a.tar"] and "contents are damaged" in caplog.text


def test_index_beside_cut_short_while_in_use(tmp_path, cache):
    """Another file is copied over it in place: what is mapped is a copy in the cache."""
    path = shard(tmp_path / "a.tar", 0, 5)
    index.main([str(path)])
    source = open_source(str(path))
    expected = records(source)
    os.truncate(tmp_path / "a.tar.index", 10)
    assert records(source) == expected
    assert (
        records(pickle.loads(pickle.dumps(source))) == expected and len(list(cache.rglob("*.index.*"))) == 1
    )


def test_shard_replaced_and_its_index_lost_meanwhile(tmp_path, cache, monkeypatch):
    path = shard(tmp_path / "a.tar", 0, 5)
    open_source(str(path))
    monkeypatch.setattr(shard_index, "_MAPPED", shard_index._Maps())
    source = open_source(str(path))
    shard(path, 3, 9)
    next(cache.rglob("*.index")).unlink()
    with pytest.raises(BadRecord) as caught:
        source[0]
    assert caught.value.reason == "changed_shard"


def test_cache_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    path = shard(tmp_path / "a.tar", 0, 5)
    with caplog.at_level(logging.WARNING):
        source = TarSource([str(path)], cache=str(tmp_path / "file"))
    assert "kept in memory only" in caplog.text
    again = pickle.loads(pickle.dumps(source))
    assert records(again) == records(source) and again[4].captions == (caption(4),)


def test_notes_of_a_damaged_shard_are_told_at_every_opening(tmp_path, caplog):
    whole = shard(tmp_path / "a.tar", 0, 10).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            open_source(str(tmp_path / "cut.tar"))
        assert "cut off at byte" in caplog.text


def test_sizes_and_columns(tmp_path):
    images = {f"{i}.png": encoded(picture(i, 10 + i, 20 + i)) for i in range(4)}
    texts = {f"{i}.txt": ("word " * (i + 1)).encode() for i in range(4)}
    write_tar(
        tmp_path / "a.tar",
        dict(sorted((images | texts).items())) | {"5.txt": b"no image", "6.png": b"broken"},
    )
    shard(tmp_path / "b.tar", 0, 2)
    source = open_source(f"{tmp_path}/a.tar,{tmp_path}/b.tar")
    expected = [[20, 10], [21, 11], [22, 12], [23, 13], [0, 0], [0, 0], [48, 40], [48, 40]]
    assert image_sizes(source, np.arange(8)).tolist() == expected
    assert source.column("tokens:x") is None
    part = open_source(str(tmp_path / "a.tar"))
    part.add_column("tokens:x", np.array(index.token_lengths(part, lambda text: len(text.split()))))
    assert part.column("tokens:x").tolist() == [1, 2, 3, 4, 2, 0]
    again = open_source(str(tmp_path / "a.tar"))
    assert again.column("tokens:x").tolist() == [1, 2, 3, 4, 2, 0] and again[1].captions == ("word word",)
    assert again.fingerprint == open_source(str(tmp_path / "a.tar")).fingerprint
    with pytest.raises(DataError, match="5 values for 6 samples"):
        again.add_column("tokens:y", np.zeros(5, np.int64))
    assert open_source(str(tmp_path / "a.tar"), exclude="[13]").column("tokens:x").tolist() == [1, 3, 2, 0]


def test_command(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(3):
        shard(tmp_path / "data" / f"x-{i}.tar", i * 4, 4)
    (tmp_path / "data" / "page.tar").write_bytes(b"<html>" * 300)
    assert index.main([f"{tmp_path}/data/x-{{0..2}}.tar", "--threads=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(f"x-{i}.tar: indexed, 4 samples" in lines[i] for i in range(3))
    assert index.main([str(tmp_path / "data")]) == 1
    out, err = capsys.readouterr()
    assert out.count("already indexed, 4 samples") == 3 and "page.tar: failed: " in err and "not a tar" in err
    assert index.main([str(tmp_path / "data" / "x-0.tar"), "--cache", str(tmp_path / "c"), "--force"]) == 0
    assert len(list((tmp_path / "c").rglob("*.index"))) == 1
    (tmp_path / "t.csv").write_text("image,caption\n")
    for bad, told in ((["nowhere.tar"], "no such data file"), ([str(tmp_path / "t.csv")], "have an index")):
        assert index.main(bad) == 1 and told in capsys.readouterr().err
    for bad in ([], ["x", "--threads=0"], ["x", "--nope"]):
        with pytest.raises(SystemExit) as caught:
            index.main(bad)
        assert caught.value.code == 2


def test_command_counts_tokens(tmp_path, capsys):
    from helpers import tokenizer

    tokenizer(tmp_path / "tok")
    shard(tmp_path / "a.tar", 0, 4)
    name = str(tmp_path / "tok")
    assert index.main([str(tmp_path / "a.tar"), f"--tokenizer={name}"]) == 0
    lengths = open_source(str(tmp_path / "a.tar")).column(f"tokens:{name}")
    from vlmjax.data import text

    expected = [len(text.load(name, 1000).encode(caption(i))) for i in range(4)]
    assert lengths.tolist() == expected and min(expected) >= 4


def test_help_is_quick():
    begin = time.process_time()
    command = [sys.executable, "-c", "import resource, sys\nfrom vlmjax.data import index\n"
               "try: index.main(['--help'])\nexcept SystemExit: pass\n"
               "print(resource.getrusage(resource.RUSAGE_SELF).ru_utime, sorted(sys.modules))"]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--cache DIR" in run.stdout and time.process_time() - begin < 5
    assert not {"'numpy'", "'grain'", "'pyarrow'"} & set(
        run.stdout.rpartition("[")[2].rstrip("]\n").split(", ")
    )


def test_workers_of_another_process(tmp_path):
    for i in range(3):
        shard(tmp_path / f"{i}.tar", 4 * i, 4)
    source = open_source(f"{tmp_path}/{{0..2}}.tar")
    expected = [source[i].key for i in range(12)]
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    code = "import json, pickle, sys; s = pickle.load(open(sys.argv[1], 'rb'))\n"
    code += "print(json.dumps([s[i].key for i in range(12)]))"
    command = [sys.executable, "-c", code, str(tmp_path / "source")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == expected and len((tmp_path / "source").read_bytes()) < 20_000


def test_many_shards_open_quickly(tmp_path):
    one = shard(tmp_path / "one.tar", 0, 2).read_bytes()
    (tmp_path / "many").mkdir()
    for i in range(300):
        (tmp_path / "many" / f"{i:04d}.tar").write_bytes(one)
    spec = str(tmp_path / "many" / "{0000..0299}.tar")
    open_source(spec)
    begin = time.process_time()
    assert len(open_source(spec)) == 600
    assert time.process_time() - begin < 2  # about 0.05 s without type checks


def test_an_index_older_than_its_shard_is_not_used(tmp_path, caplog):
    """A caption corrected inside its block of 512 bytes: the same size, headers elsewhere and first bytes all equal."""
    members = {
        f"{i:03d}.{kind}": data
        for i in range(40)
        for kind, data in (("png", b"\x89PNG" * 400), ("txt", b"short"))
    }
    path = write_tar(tmp_path / "a.tar", members)
    cache = str(tmp_path / "cache")
    for beside in (False, True):
        if beside:
            assert index.main([str(path)]) == 0
        source = TarSource([str(path)], cache=cache)
        assert source[13].captions[0].startswith("short")
        size, text = path.stat().st_size, f"a longer caption, {beside}"
        members["013.txt"] = text.encode()
        time.sleep(0.02)
        write_tar(path, members)
        assert path.stat().st_size == size
        caplog.clear()
        assert TarSource([str(path)], cache=cache)[13].captions == (text,)
        assert "older than its shard" in caplog.text
        members["013.txt"] = b"short again"
        write_tar(path, members)


@pytest.mark.parametrize("beside", [True, False])
def test_an_index_in_the_cache_that_is_empty(tmp_path, cache, beside):
    path = shard(tmp_path / "a.tar", 0, 5)
    if beside:
        index.main([str(path)])
    expected = records(open_source(str(path)))
    (kept,) = cache.rglob("*.index.*" if beside else "*.index")
    source = open_source(str(path))
    kept.write_bytes(b"")
    shard_index._MAPPED._open.clear()
    assert records(source) == expected
    assert records(open_source(str(path))) == expected and kept.stat().st_size > 0
