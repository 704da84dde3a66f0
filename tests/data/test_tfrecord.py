"""TFRecord files and tf.train.Example, written here by hand from their descriptions."""

import gzip
import pickle
import struct

import numpy as np
import pytest
from helpers import caption, encoded, picture

from vlmjax.data.formats import crc, tfexample
from vlmjax.data.sources import open_source
from vlmjax.errors import BadRecord, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def message(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def feature(values: list, packed: bool = True) -> bytes:
    if isinstance(values[0], bytes):
        return message(1, b"".join(message(1, value) for value in values))
    if isinstance(values[0], float):
        if packed:
            return message(2, message(1, struct.pack(f"<{len(values)}f", *values)))
        return message(2, b"".join(b"\x0d" + struct.pack("<f", value) for value in values))
    if packed:
        return message(3, message(1, b"".join(varint(value) for value in values)))
    return message(3, b"".join(b"\x08" + varint(value) for value in values))


def example(features: dict, packed: bool = True) -> bytes:
    entries = [
        message(1, message(1, name.encode()) + message(2, feature(v, packed))) for name, v in features.items()
    ]
    return message(1, b"".join(entries))


def crc32c(data: bytes) -> int:
    """Bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def frame(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def rows(count: int) -> list[bytes]:
    return [
        example(
            {
                "image/encoded": [encoded(picture(i))],
                "caption": [caption(i).encode()],
                "label": [i],
                "score": [0.5],
            }
        )
        for i in range(count)
    ]


def test_the_checksum_is_castagnoli():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the catalogue of CRC algorithms
    noise = np.random.default_rng(0).integers(0, 256, 140_000).astype(np.uint8).tobytes()
    for size in (0, 9, 64, 65, 67, 1023, 1024, 1025, 3000):
        assert crc.crc32c(noise[:size]) == crc32c(noise[:size]) and crc.masked(noise[:size]) == masked(
            noise[:size]
        )
    assert crc.crc32c(noise) == crc._byte_by_byte(noise)  # of more blocks than are summed at once


@pytest.mark.parametrize("packed", [True, False])
def test_example(packed):
    features = {
        "b": [b"", b"\xff" * 300],
        "i": [0, 1, -1, 2**63 - 1, -(2**63), 300],
        "f": [1.5, -0.25],
        "é": [b"x"],
    }
    assert tfexample.parse(example(features, packed)) == features
    empty = message(
        1, message(1, message(1, b"none") + message(2, b"")) + message(1, message(1, b"no value"))
    )
    assert tfexample.parse(empty) == {"none": [], "no value": []}
    assert tfexample.simple({"a": [1], "b": [1, 2], "c": []}) == {"a": 1, "b": [1, 2]}


def test_example_against_protobuf():
    """Bytes that TFDS's own writer makes, through Google's protobuf."""
    pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.proto import tf_example_generated_pb2 as tf_example_pb2

    made = tf_example_pb2.Example()
    made.features.feature["a"].bytes_list.value.extend([b"x", b"yy"])
    made.features.feature["b"].int64_list.value.extend([3, -4])
    made.features.feature["c"].float_list.value.extend([0.5])
    expected = {"a": [b"x", b"yy"], "b": [3, -4], "c": [0.5]}
    assert tfexample.parse(made.SerializeToString()) == expected
    assert (
        dict(tf_example_pb2.Example.FromString(example(expected)).features.feature).keys() == expected.keys()
    )


def test_example_damaged():
    whole = rows(1)[0]
    for data in (whole[:-1], whole[: len(whole) // 2], b"\xff" * 20, b"\x0b", b"<html>"):
        with pytest.raises(BadRecord) as caught:
            tfexample.parse(data, "k")
        assert caught.value.reason == "bad_example"


@pytest.mark.parametrize(
    "name", ["x.tfrecord", "x.tfrecords", "x-train.tfrecord-00000-of-00001", "x.tfrecord.gz"]
)
def test_source(tmp_path, name):
    data = b"".join(map(frame, rows(7)))
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / name))))
    assert len(source) == 7
    for i in (6, 0, 3):
        record = source[i]
        assert record.image == encoded(picture(i)) and record.captions == (caption(i),)
        assert record.extra == {"label": i, "score": 0.5} and record.key == source.key(i) == f"{name}:{i}"
    again = open_source(str(tmp_path / name), image_column="image/encoded", caption_columns="label")
    assert again.fingerprint == source.fingerprint and again[2].captions == ()


def test_damage(tmp_path, caplog):
    frames = list(map(frame, rows(5)))
    (tmp_path / "cut.tfrecord").write_bytes(b"".join(frames)[:-20])
    source = open_source(str(tmp_path / "cut.tfrecord"))
    assert len(source) == 4 and "cut off at byte" in caplog.text
    (tmp_path / "hole.tfrecord").write_bytes(b"".join(frames[:2]) + b"\0" * 40 + b"".join(frames[2:]))
    assert len(open_source(str(tmp_path / "hole.tfrecord"))) == 2 and "damaged at byte" in caplog.text
    for name, data in (("page", b"<html>" * 9), ("void", b"")):
        (tmp_path / f"{name}.tfrecord").write_bytes(data)
        with pytest.raises(DataError, match="not a TFRecord file|hold no record"):
            open_source(str(tmp_path / f"{name}.tfrecord"))
    (tmp_path / "other.tfrecord").write_bytes(frame(b"\xff\xff"))
    with pytest.raises(DataError, match="first records cannot be read"):
        open_source(str(tmp_path / "other.tfrecord"))


def test_a_byte_that_changed_is_a_bad_record_of_its_own_kind(tmp_path):
    frames = [bytearray(frame(row)) for row in rows(4)]
    picture_at = frames[0].index(b"\x89PNG") + 60  # inside the pixels: still a PNG, still an Example
    for i in (0, 2):
        frames[i][picture_at] ^= 1
    frames[3][-1] ^= 1
    (tmp_path / "x.tfrecord").write_bytes(b"".join(frames))
    source = open_source(str(tmp_path / "x.tfrecord"))
    assert source[1].captions == (caption(1),)
    for i in (0, 2, 3):
        with pytest.raises(BadRecord, match=f"x.tfrecord:{i}: bad_checksum"):
            source[i]
