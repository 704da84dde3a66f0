"""Tar shards: every header form, grouping, captions, damage; tarfile is the oracle."""

import gzip
import io
import itertools
import logging
import os
import pickle
import tarfile

import numpy as np
import pytest
from helpers import caption, encoded, picture, shard, write_tar

from vlmjax.data.formats import tar as tars
from vlmjax.data.formats import webdataset
from vlmjax.data.sources import open_source
from vlmjax.data.storage import files
from vlmjax.errors import BadRecord, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Indexes made on first use stay inside the test."""
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "own cache"))


@pytest.mark.parametrize("fmt", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_members_agree_with_tarfile(tmp_path, fmt):
    long = "folder/" + "n" * (90 if fmt == tarfile.USTAR_FORMAT else 180)
    members = {f"{i}.txt": os.urandom(i * 300) for i in range(6)} | {
        f"{long}.jpg": b"long",
        "é.png": b"umlaut",
    }
    path = write_tar(tmp_path / "x.tar", members, fmt=fmt)
    with tarfile.open(path, "a", format=fmt) as tar:
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        after = tarfile.TarInfo("after.txt")
        after.size = 3
        tar.addfile(after, io.BytesIO(b"end"))
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [tuple(m) for m in tars.members(str(path))] == expected
    data = path.read_bytes()
    assert {m.name: data[m.offset : m.offset + m.size] for m in tars.members(str(path))} == members | {
        "after.txt": b"end"
    }


def test_sizes_in_base_256(tmp_path):
    """GNU writes sizes from 8 GiB in base 256; the file itself may be sparse."""
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 * 2**30
    path = tmp_path / "big.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    end = tarfile.TarInfo("next.jpg")
    end.size = 4
    with open(path, "r+b") as out:
        out.seek(512 + info.size)
        out.write(end.tobuf(tarfile.GNU_FORMAT) + b"last".ljust(1536, b"\0"))
    assert [(m.name, m.size) for m in tars.members(str(path))] == [
        ("big.jpg", 9 * 2**30),
        ("next.jpg", 4),
    ]


def test_img2dataset_shards(tmp_path):
    shard(tmp_path / "a-0.tar", 0, 5)
    shard(tmp_path / "a-1.tar", 5, 3)
    source = open_source(f"{tmp_path}/a-{{0..1}}.tar")
    assert len(source) == 8
    for i in (7, 0, 5, 4):
        record = source[i]
        assert record.key == source.key(i) == f"{i:06d}"
        assert record.captions == (caption(i),) and record.image == encoded(picture(i))
        assert record.extra["json"].startswith(b'{"caption"') and list(record.extra) == ["json"]
    with pytest.raises(IndexError):
        source[8]
    again = pickle.loads(pickle.dumps(source))
    assert again[3].key == "000003" and again.fingerprint == source.fingerprint


def test_captions_from_text_and_json(tmp_path):
    image = encoded(picture(0))
    cases = {
        "a": ({"a.txt": b" one \n line "}, ("one line",)),
        "b": ({"b.json": b'{"caption": "single"}'}, ("single",)),
        "c": ({"c.json": b'{"caption": ["x", "y", "x", ""]}'}, ("x", "y")),
        "d": ({"d.json": b'{"captions": ["p", "q"]}', "d.txt": b"q"}, ("q", "p")),
        "e": ({"e.cls": b"3"}, ()),
        "f": ({"f.json": b'{"caption": null, "width": 3}'}, ()),
        "h": ({"h.txt": b"p", "h.json": b'{"caption": "p", "text": "q"}'}, ("p", "q")),
        "i": ({"i.txt": b"p", "i.json": b'{"caption":"p","width":1}'}, ("p",)),
        "j": ({"j.txt": b"p", "j.json": b'{"caption": "p and more"}'}, ("p", "p and more")),
        "k": ({"k.txt": b'a "q" \\ b', "k.json": b'{"caption": "a \\"q\\" \\\\ b"}'}, ('a "q" \\ b',)),
        "l": ({"l.json": b'{"caption": "q"}', "l.txt": b"p"}, ("p", "q")),
        "g": ({"g.txt": "naïve \xff".encode("latin-1")}, ("na\ufffdve \ufffd",)),
    }
    for key, (members, captions) in cases.items():
        write_tar(tmp_path / f"{key}.tar", {f"{key}.jpg": image} | members)
        record = open_source(str(tmp_path / f"{key}.tar"))[0]
        assert record.captions == captions, key
    assert open_source(str(tmp_path / "e.tar"))[0].extra.get("cls") == b"3"


def test_grouping(tmp_path):
    image = encoded(picture(0))
    members = {
        "./d/a.jpg": image, "d/b.input.PNG": image, "d/a.txt": b"a", "d/b.txt": b"b", "d/._a.jpg": b"mac",
        ".hidden": b"", "__index__.json": b"", "README": b"", "e/a.txt": b"other", "e/a.seg.png": b"s",
        "e/a.jpg": image,
    }  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "x.tar", members)))
    records = [source[i] for i in range(len(source))]
    assert [r.key for r in records] == ["d/a", "d/b", "e/a"]
    assert [r.captions for r in records] == [("a",), ("b",), ("other",)]
    assert all(r.image == image for r in records) and records[2].extra.get("seg.png") == b"s"


def test_repeated_keys_are_samples_of_their_own(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for data in (b"one", b"two"):
            for name in ("k.jpg", "k.txt"):
                info = tarfile.TarInfo(name)
                info.size = 3
                tar.addfile(info, io.BytesIO(data))
    source = open_source(str(path))
    assert [source[i].captions for i in range(len(source))] == [("one",), ("two",)]


def test_gzipped_shards_are_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "cache"))
    shard(tmp_path / "a.tar.gz", 0, 4, "w:gz")
    shard(tmp_path / "b.tgz", 4, 2, "w:gz")
    source = open_source(f"{tmp_path}/a.tar.gz,{tmp_path}/b.tgz")
    assert [source[i].key for i in range(6)] == [f"{i:06d}" for i in range(6)]
    cached = sorted((tmp_path / "cache").rglob("*.tar"))
    assert len(cached) == 2 and not list((tmp_path / "cache").rglob("*.part"))
    numbers = [p.stat().st_ino for p in cached]
    open_source(f"{tmp_path}/a.tar.gz,{tmp_path}/b.tgz")
    assert [p.stat().st_ino for p in cached] == numbers
    shard(tmp_path / "a.tar.gz", 10, 5, "w:gz")
    assert open_source(f"{tmp_path}/a.tar.gz")[0].key == "000010"


def test_damaged_gzip_leaves_nothing_behind(tmp_path):
    whole = gzip.compress(shard(tmp_path / "a.tar", 0, 20).read_bytes())
    (tmp_path / "a.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.tar\.gz"):
        open_source(str(tmp_path / "a.tar.gz"), cache=str(tmp_path / "cache"))
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


def test_shards_cut_off_or_damaged(tmp_path, caplog):
    whole = shard(tmp_path / "a.tar", 0, 10).read_bytes()
    with caplog.at_level(logging.WARNING):
        (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
        cut = open_source(str(tmp_path / "cut.tar"))
        good = bytearray(whole)
        place = [m for m in tars.members(str(tmp_path / "a.tar")) if m.name == "000006.png"][0].offset - 512
        good[place : place + 40] = b"\xff" * 40
        (tmp_path / "hole.tar").write_bytes(good)
        hole = open_source(str(tmp_path / "hole.tar"))
    assert 3 <= len(cut) < 10 and cut[0].key == "000000"
    assert len(hole) == 6 and "damaged at byte" in caplog.text and "cut off" in caplog.text
    (tmp_path / "page.tar").write_bytes(b"<html>" * 300)
    with pytest.raises(DataError, match="not a tar"):
        open_source(str(tmp_path / "page.tar"))
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(DataError, match="no sample"):
        open_source(str(tmp_path / "empty.tar"))


def test_shard_that_shrinks_or_vanishes_later(tmp_path):
    path = shard(tmp_path / "a.tar", 0, 10)
    source = open_source(str(path))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(BadRecord) as caught:
        source[9]
    assert caught.value.reason == "truncated_shard" and caught.value.key == "000009"
    gone = open_source(str(shard(tmp_path / "b.tar", 0, 2)))
    (tmp_path / "b.tar").unlink()
    with pytest.raises(BadRecord) as caught:
        gone[0]
    assert caught.value.reason == "unreadable_shard"


def test_sample_without_image(tmp_path):
    source = open_source(str(write_tar(tmp_path / "x.tar", {"a.mp": b"1", "b.jpg": b"2", "b.json": b"{"})))
    for i, reason in enumerate(["no_image", "bad_json"]):
        with pytest.raises(BadRecord) as caught:
            source[i]
        assert caught.value.reason == reason


def test_more_shards_than_open_files(tmp_path):
    reader = files.Reader(limit=3)
    for i in range(8):
        (tmp_path / str(i)).write_bytes(bytes([i]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for i in range(8):
            assert reader.read(str(tmp_path / str(i)), 2, 3) == bytes([i]) * 3
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    assert len(pickle.loads(pickle.dumps(reader))._open) == 0


def test_fingerprint_knows_data_not_place(tmp_path):
    (tmp_path / "m").mkdir()
    one = open_source(str(shard(tmp_path / "a.tar", 0, 4))).fingerprint
    moved = open_source(str(shard(tmp_path / "m" / "a.tar", 0, 4))).fingerprint
    other = open_source(str(shard(tmp_path / "m" / "a.tar", 1, 4))).fingerprint
    assert one == moved != other


@pytest.mark.slow
def test_reference_shards(shared_path, tmp_path):
    cache = str(tmp_path)
    emoji = open_source(str(shared_path("data/emoji") / "emoji-train-{00000..00003}.tar.gz"), cache=cache)
    assert len(emoji) == 5085 and emoji[0].captions == ("package",) and emoji[0].key == "twemoji_package"
    caltech = open_source(str(shared_path("data/caltech101") / "*.tar.gz"), cache=cache)
    assert caltech[0].captions[0].startswith("a photo of a") and "cls" in caltech[0].extra
    sample = open_source(str(shared_path("data/webdataset/sample.tgz")), cache=cache)
    assert len(sample) == 90 and sample[0].extra.get("cls") is not None
    nlvr = open_source(str(shared_path("data/nlvr/nlvr-dev-00000.tar")))
    assert len(nlvr) == 700 and b"question" in nlvr[0].extra["json"]


def test_numbers_of_the_index_are_small(tmp_path):
    samples = tars.index(str(shard(tmp_path / "a.tar", 0, 10)))
    assert samples.count == 10 and samples.extensions == ("png", "txt", "json")
    kinds = (
        samples.offset.dtype,
        samples.size.dtype,
        samples.extension.dtype,
        samples.columns["width"].dtype,
    )
    assert kinds == (np.uint32, np.uint32, np.uint8, np.uint16)
    assert samples.columns["width"].tolist() == [48] * 10 and samples.columns["height"].tolist() == [40] * 10


def _with_size(name: str, field: bytes) -> bytes:
    """A header whose size is `field`, with the right checksum."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = field.ljust(12, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


@pytest.mark.parametrize("size", ["-1536", "x", "1" * 30, "1_0", b"zz", b"-7", b"\xff" * 12])
def test_sizes_that_are_none(tmp_path, caplog, size):
    """The files before them are used; nothing is read backwards, for ever, or fails without a name."""
    first = write_tar(tmp_path / "x.tar", {"a.txt": b"abc"}).read_bytes()[:1024]
    if isinstance(size, str):
        with tarfile.open(tmp_path / "y.tar", "w", format=tarfile.PAX_FORMAT) as tar:
            info = tarfile.TarInfo("b.txt")
            info.pax_headers = {"size": size}
            tar.addfile(info)
        second, at = (tmp_path / "y.tar").read_bytes(), 2048
    else:
        second, at = _with_size("b.txt", size) + b"\0" * 1024, 1024
    (tmp_path / "x.tar").write_bytes(first + second)
    found = itertools.islice(tars.members(str(tmp_path / "x.tar")), 9)
    assert [member.name for member in found] == ["a.txt"] and f"damaged at byte {at}" in caplog.text
    assert tars.index(str(tmp_path / "x.tar")).count == 1


def test_a_key_with_very_many_members_and_very_many_extensions(tmp_path):
    names = [f"a.{i:05d}.jpg" for i in range(400)] + ["a.jpg", "a.00017.jpg", "a.00200.jpg"]
    path = tmp_path / "x.tar"
    write_tar(path, {}, "w")
    with tarfile.open(path, "w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    samples = tars.index(str(path))
    assert [len(samples.parts(i)) for i in range(samples.count)] == [401, 2]
    codes = np.array([70_000, 1], np.uint32)
    extensions = ("txt", "json", *(f"x{i}" for i in range(69_998)), "jpg")
    roles = webdataset._roles(codes.tobytes(), extensions)
    assert (roles.image, roles.json) == (0, 1)


def test_a_gzip_that_unpacks_to_more_than_there_is_room_for(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "x.tar.gz", "wb") as out:
        for _ in range(20):
            out.write(b"\0" * (1 << 20))
    monkeypatch.setenv("VLMJAX_CACHE_LIMIT", "5M")
    with pytest.raises(DataError, match="20,971,520 bytes does not fit into the cache"):
        open_source(str(tmp_path / "x.tar.gz"))
    with open(tmp_path / "x.tar.gz", "ab") as out:
        out.write(gzip.compress(b""))  # so that its last bytes say nothing of the rest
    with pytest.raises(DataError, match="unpacks to more than the cache"):
        open_source(str(tmp_path / "x.tar.gz"))
    assert not [p for p in (tmp_path / "own cache" / "shards").iterdir() if p.is_file()]
