"""A record as bytes, for shards of our own: a JSON header, then the files it tells of, one after the other."""

import json
import struct
from typing import Any

import numpy as np

from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError

MAGIC = b"VLR1"
_BYTES, _PIXELS = "$bytes", "$pixels"


def encode(record: Record) -> bytes:
    """The record as bytes.

    Layout: b"VLR1", the length of the header (uint32, little endian), the header, the files. The header is JSON in
    UTF-8: {"files": [sizes], "key", "captions", "image", "extra", "parts"}, in which {"$bytes": n} stands for the
    bytes of file n, and {"$pixels": n, "shape": [...], "dtype": "|u1"} for an array in row-major order; other names
    that begin with $ have one more.

    Raises:
        DataError: something in `extra` that is neither JSON, bytes nor an array of numbers; names it.
        BadRecord: nested too deeply.
    """
    try:
        return _encode(record)
    except RecursionError as error:
        raise BadRecord("bad_json", record.key, "nested too deeply") from error
    except TypeError as error:
        field = next((name for name, value in record.extra.items() if not _is_plain(value)), "?")
        raise DataError(
            f"{record.key}: its field {field!r} cannot be written ({error}): make it text, numbers or bytes, or "
            "leave its column out"
        ) from error


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(_pack(value, []))
    except (TypeError, RecursionError):
        return False
    return True


def _encode(record: Record) -> bytes:
    kept: list[bytes] = []
    body = {
        "key": record.key,
        "captions": list(record.captions),
        "image": _pack(record.image, kept),
        "extra": _pack(dict(record.extra.items()), kept),
        "parts": _pack(list(record.parts), kept),
    }
    header = json.dumps({"files": [len(data) for data in kept], **body}, ensure_ascii=False).encode()
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *kept])


def decode(data: bytes, key: str = "") -> Record:
    """Inverse of `encode`; `key` is for the error's message. Tuples in `extra` come back as lists.

    Raises:
        BadRecord: not such bytes, or not all of them.
    """
    if data[:4] != MAGIC or len(data) < 8:
        raise BadRecord("bad_container", key, f"begins with {data[:8]!r}")
    end = 8 + struct.unpack("<I", data[4:8])[0]
    try:
        body = json.loads(data[8:end])
        ends = np.cumsum([end, *body["files"]]).tolist()
        if ends[-1] != len(data):
            raise BadRecord("truncated_record", body["key"], f"{len(data)} of {ends[-1]} bytes")
        kept = [data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]
        parts = tuple(_unpack(part, kept) for part in body["parts"])
        image, extra = _unpack(body["image"], kept), _unpack(body["extra"], kept)
        return Record(body["key"], image, tuple(body["captions"]), extra, parts)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise BadRecord("bad_container", key, f"{type(error).__name__}: {error}") from error


def _pack(value: Any, kept: list[bytes]) -> Any:
    if isinstance(value, (bytes, bytearray, memoryview)):
        kept.append(bytes(value))
        return {_BYTES: len(kept) - 1}
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            raise TypeError("an array of objects has no bytes of its own")
        kept.append(np.ascontiguousarray(value).tobytes())
        return {_PIXELS: len(kept) - 1, "shape": list(value.shape), "dtype": value.dtype.str}
    if isinstance(value, dict):
        # A name of the user's own that begins as ours do gets one $ more.
        return {"$" * str(n).startswith("$") + str(n): _pack(item, kept) for n, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_pack(item, kept) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _unpack(value: Any, kept: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, kept) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {_BYTES}:
        return kept[value[_BYTES]]
    if set(value) == {_PIXELS, "shape", "dtype"}:
        return np.frombuffer(kept[value[_PIXELS]], np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    return {name.removeprefix("$"): _unpack(item, kept) for name, item in value.items()}
