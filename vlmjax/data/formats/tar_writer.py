"""Records as webdataset shards: what other tools read too."""

import dataclasses
import io
import itertools
import json
import tarfile
from collections.abc import Container
from typing import Any

import numpy as np

from vlmjax.data.formats.fields import TEXT_EXTENSIONS
from vlmjax.data.pictures import signatures
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError


def encoded(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG, or PNG where there is transparency, which JPEG has none of."""
    from PIL import Image

    out, image = io.BytesIO(), Image.fromarray(pixels)
    if pixels.shape[2] == 4:
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=quality)
    return out.getvalue()


class Writer:
    """Writes records to one tar: `with Writer(path) as out: out.write(record)`.

    A sample is key.jpg (or what the image is), key.txt with the first caption, key.json with all captions where
    there are several and whatever else the record knows; members the record was read with keep their names, in lower
    case and with "_" for "/". A key that this tar has already gets "-2", "-3", ...: webdataset refuses it otherwise.
    """

    def __init__(self, path: str):
        """Begin the file."""
        self._keys: set[str] = set()
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)

    def write(self, record: Record) -> None:
        """Append a record.

        Raises:
            BadRecord: bytes that are no image of a known kind.
            DataError: a record that a tar cannot hold.
        """
        if record.parts or "images" in record.extra:
            raise DataError(
                f"{record.key}: has several images, which a tar sample cannot order: use --format=array_record"
            )
        members = _members(record)  # all of them or none: what fails, fails before anything is written
        key = _unused(_tar_key(record.key), self._keys, "-")
        self._keys.add(key)
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))

    def __enter__(self) -> "Writer":
        """Itself."""
        return self

    def __exit__(self, *failure: Any) -> None:
        """End the file."""
        self._tar.close()


def _tar_key(key: str) -> str:
    """A key whose base name has no dot, at which webdataset would cut it, and that leads out of no folder."""
    parts = [part for part in key.replace("\\", "/").split("/") if part not in ("", ".", "..")] or ["sample"]
    base = parts[-1].replace(".", "_")
    parts[-1] = "x" + base if base.startswith("__") else base  # readers pass over names that begin so
    return "/".join(parts)


def _unused(name: str, used: Container[str], mark: str) -> str:
    """The name, with a number from 2 on after it where it is used already."""
    numbered = (f"{name}{mark}{count}" for count in itertools.count(2))
    return name if name not in used else next(other for other in numbered if other not in used)


def _members(record: Record) -> dict[str, bytes]:
    """Extension -> bytes of one sample."""
    out: dict[str, bytes] = {}
    if len(record.image):
        data = record.image if isinstance(record.image, bytes) else encoded(record.image, 95)
        out[_extension(data, record.key)] = data
    if record.captions:
        out["txt"] = record.captions[0].encode()
    rest: dict[str, Any] = {}
    for name in record.extra:
        value = record.extra[name]
        if isinstance(value, bytes):
            # Read back, a member called so would be a caption; "json" is where captions were, and goes through.
            taken = (*out, *TEXT_EXTENSIONS)
            out[_unused(name.replace("/", "_").lower() or "bytes", taken, "_")] = value
        else:
            rest[name] = value
    if "json" not in out and (rest or len(record.captions) > 1):
        body = {**rest, **({"captions": list(record.captions)} if len(record.captions) > 1 else {})}
        try:
            out["json"] = json.dumps(body, default=_plain, ensure_ascii=False).encode("utf-8", "replace")
        except RecursionError as error:
            raise BadRecord("bad_json", record.key, "nested too deeply") from error
    return out


def _plain(value: Any) -> Any:
    """Numpy values and dataclasses for json."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    raise DataError(f"a record holds a {type(value).__name__}, which json cannot: use --format=array_record")


def _extension(data: bytes, key: str) -> str:
    """The usual extension of an encoded image, told by its first bytes. Raises BadRecord."""
    extension = signatures.EXTENSIONS.get(signatures.format_of(data))
    if extension is None:
        raise BadRecord("not_an_image", key, f"begins with {data[:12]!r}")
    return extension
