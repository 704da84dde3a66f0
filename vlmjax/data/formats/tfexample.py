"""tf.train.Example without TensorFlow: the few lines of protobuf that its bytes need."""

import struct
from typing import Any

import numpy as np

from vlmjax.errors import BadRecord

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
Value = list[bytes] | list[int] | list[float]


def parse(data: bytes, key: str = "") -> dict[str, Value]:
    """Feature name -> its list of bytes, ints (int64) or floats (float32).

    The messages are Example{1: Features{1: map<string, Feature>}} and Feature{1: BytesList, 2: FloatList,
    3: Int64List}, each list with its values in field 1 (tensorflow/core/example/feature.proto).

    Raises:
        BadRecord: not such a message.
    """
    out: dict[str, Value] = {}
    try:
        view = memoryview(data)
        for number, features in _fields(view):
            if number != 1:
                continue
            for _, entry in _fields(features):
                pair = dict(_fields(entry))
                out[bytes(pair[1]).decode()] = _feature(pair.get(2, memoryview(b"")))
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        raise BadRecord("bad_example", key, f"not a tf.train.Example ({error})") from error
    return out


def simple(features: dict[str, Value]) -> dict[str, Any]:
    """The features with lists of one value replaced by the value, and empty ones left out."""
    return {name: value[0] if len(value) == 1 else value for name, value in features.items() if len(value)}


def _fields(view: memoryview) -> list[tuple[int, Any]]:
    """(field number, value) of a message: bytes as views, numbers as they are."""
    out, at = [], 0
    while at < len(view):
        tag, at = _varint(view, at)
        kind = tag & 7
        if kind == _LENGTH:
            size, at = _varint(view, at)
            value, at = _cut(view, at, size)
        elif kind == _VARINT:
            value, at = _varint(view, at)
        elif kind in (_FIXED32, _FIXED64):
            value, at = _cut(view, at, 4 if kind == _FIXED32 else 8)
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        out.append((tag >> 3, value))
    return out


def _cut(view: memoryview, at: int, size: int) -> tuple[memoryview, int]:
    if at + size > len(view):
        raise ValueError(f"cut off: {size} bytes wanted at byte {at} of {len(view)}")
    return view[at : at + size], at + size


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while True:
        byte = view[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number of more than 64 bits at byte {at}")


def _feature(view: memoryview) -> Value:
    for number, values in _fields(view):
        items = [value for field, value in _fields(values) if field == 1]
        if number == 1:
            return [bytes(item) for item in items]
        if number == 2:
            return [float(x) for item in items for x in np.frombuffer(item, "<f4")]
        if number == 3:
            return [
                _signed(x)
                for item in items
                for x in (_packed(item) if isinstance(item, memoryview) else [item])
            ]
    return []


def _packed(view: memoryview) -> list[int]:
    out, at = [], 0
    while at < len(view):
        value, at = _varint(view, at)
        out.append(value)
    return out


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
