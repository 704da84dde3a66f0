"""The container of our own shards, and ArrayRecord files of it and of tf.train.Example."""

import datetime
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture
from test_tfrecord import example

from vlmjax.data.formats import arrayrecord, container
from vlmjax.data.record import Record
from vlmjax.data.sources import image_sizes, open_source
from vlmjax.errors import BadRecord, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def same(a: Record, b: Record) -> bool:
    return (a.key, a.captions, a.extra) == (b.key, b.captions, b.extra) and np.array_equal(a.image, b.image)


def make(i: int) -> Record:
    return Record(
        f"key {i} é",
        encoded(picture(i)),
        (caption(i), "zweite \u2028 Zeile"),
        {"cls": b"3", "n": [1, {"a": None}]},
    )


def test_container_there_and_back():
    for record in (
        make(0),
        Record("", b"", ()),
        Record("p", picture(1), ("x",)),
        Record("b", b"\0" * 9, (), {"$bytes": 1}),
    ):
        assert same(container.decode(container.encode(record)), record)
    document = Record("d", b"im", (), {}, ("text", b"im", picture(2), "end"))
    parts = container.decode(container.encode(document)).parts
    assert parts[:2] == ("text", b"im") and np.array_equal(parts[2], picture(2)) and parts[3] == "end"
    several = Record("s", b"1", (), {"images": (b"1", b"22"), "box": np.array([[1.5, 2]], np.float32)})
    extra = container.decode(container.encode(several)).extra
    assert (
        extra["images"] == [b"1", b"22"]
        and extra["box"].dtype == np.float32
        and extra["box"].tolist() == [[1.5, 2]]
    )
    with pytest.raises(DataError, match="its field"):
        container.encode(Record("o", b"", (), {"what": object()}))


def test_container_damaged():
    whole = container.encode(make(0))
    cases = {
        whole[:-1]: "truncated_record",
        whole + b"x": "truncated_record",
        whole[:6]: "bad_container",
        b"VLR2" + whole[4:]: "bad_container",
        whole[:10] + b"\xff" + whole[11:]: "bad_container",
        b"": "bad_container",
    }
    for data, reason in cases.items():
        with pytest.raises(BadRecord) as caught:
            container.decode(data, "k")
        assert caught.value.reason == reason


def test_array_record_of_our_own(tmp_path):
    pytest.importorskip("array_record")
    for part in range(2):
        path = str(tmp_path / f"x-{part}.array_record")
        assert arrayrecord.write(path, [make(i) for i in range(part * 6, part * 6 + 6)]) == 6
    source = open_source(f"{tmp_path}/x-*.array_record")
    source = pickle.loads(pickle.dumps(source))
    assert len(source) == 12 and source.blocks is None
    for i in np.random.default_rng(0).permutation(12).tolist():
        assert (
            same(source[i], make(i))
            and source.key(i) == make(i).key
            and source.captions_at(i) == make(i).captions[:1] + ("zweite \u2028 Zeile",)
        )
    assert image_sizes(source, [3]).tolist() == [[48, 40]]
    assert len(open_source(f"{tmp_path}/x-*.array_record", exclude="key [0-4] ")) == 7
    with pytest.raises(IndexError):
        source[12]
    from array_record.python import array_record_module

    options = array_record_module.ArrayRecordReader(
        str(tmp_path / "x-0.array_record")
    ).writer_options_string()
    assert "group_size:1," in options and "uncompressed" in options


def test_array_record_of_examples(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(
        str(tmp_path / "c-train.array_record-00000-of-00001"), arrayrecord.WRITER_OPTIONS
    )
    for i in range(3):
        writer.write(
            example(
                {
                    "image": [encoded(picture(i))],
                    "captions/text": [b"a", caption(i).encode()],
                    "image/id": [i],
                }
            )
        )
    writer.write(b"\xff\xff")
    writer.close()
    source = open_source(str(tmp_path))
    assert source[2].captions == ("a", caption(2)) and source[2].image == encoded(picture(2))
    assert source[2].extra == {"image/id": 2} and source.key(2) == "c-train.array_record-00000-of-00001:2"
    with pytest.raises(BadRecord, match="bad_example"):
        source[3]


def test_array_record_damaged(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    path = tmp_path / "x.array_record"
    arrayrecord.write(str(path), [make(i) for i in range(50)])
    data = path.read_bytes()
    (tmp_path / "cut.array_record").write_bytes(data[: len(data) // 2])
    (tmp_path / "page.array_record").write_bytes(b"<html>")
    for name in ("cut", "page"):
        with pytest.raises(DataError, match=f"{name}.array_record is not a whole ArrayRecord file"):
            open_source(str(tmp_path / f"{name}.array_record"))
    module.ArrayRecordWriter(str(tmp_path / "void.array_record"), arrayrecord.WRITER_OPTIONS).close()
    with pytest.raises(DataError, match="hold no record"):
        open_source(str(tmp_path / "void.array_record"))
    source = open_source(str(path))
    path.unlink()
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(BadRecord) as caught:
        source[3]
    assert caught.value.reason == "unreadable_shard"


@pytest.mark.parametrize("kind", ["array_record", "parquet", "arrow"])
def test_missing_package_is_named(tmp_path, kind):
    package = "pyarrow" if kind != "array_record" else "array_record"
    (tmp_path / f"x.{kind}").write_bytes(b"")
    code = "import sys; sys.modules[sys.argv[1]] = None\n"
    code += "from vlmjax.data.sources import open_source\nopen_source(sys.argv[2])"
    root, command = Path(__file__).resolve().parents[2], [sys.executable, "-c", code, package]
    run = subprocess.run([*command, str(tmp_path / f"x.{kind}")], cwd=root, capture_output=True, text=True)
    assert "DataError" in run.stderr and "pip install" in run.stderr.strip().splitlines()[-1]


def test_what_a_container_cannot_hold_is_named():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(DataError, match=r"k1: its field 'when' cannot be written .*datetime"):
        container.encode(Record("k1", b"", (), {"n": 1, "when": datetime.datetime(2020, 1, 1)}))
    with pytest.raises(BadRecord, match="bad_json"):
        container.encode(Record("k2", b"", (), {"deep": nested}))
    while nested:  # an end that needs no deep stack
        nested = nested.pop()
