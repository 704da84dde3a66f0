"""The safetensors format: memory-mapped reading and streamed writing, one file or shards with an index.

A file is eight bytes of little-endian header length, a JSON header (tensor name -> dtype, shape, byte range)
and the raw little-endian bytes. Reading it here, rather than through the `safetensors` package, gives
bfloat16 as a numpy array without torch, and a view of the mapped file of which only the touched pages are
read.
Source: https://github.com/huggingface/safetensors (README, "Format").
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from vlmjax.errors import HubError

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # transformers' own limit before 5.0; every version reads any split
_MAX_HEADER_BYTES = 100_000_000  # the reference reader's limit: a damaged length must not allocate memory

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """Where one tensor lies: its file, numpy dtype, shape and the offset of its first byte."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a folder by name; `weights[name]` is a read-only view of the mapped file."""

    def __init__(self, entries: Mapping[str, Entry]):
        """`entries` as `read_header` returns them, of one file or of all shards."""
        self.entries = dict(entries)
        self._maps: dict[Path, np.memmap] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Return the tensor without copying it."""
        entry = self.entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        size = math.prod(entry.shape) * entry.dtype.itemsize
        raw = self._maps[entry.file][entry.offset : entry.offset + size]
        return raw.view(np.ndarray).view(entry.dtype).reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        """Names, in the order of the files."""
        return iter(self.entries)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self.entries[name].shape


def read_header(file: Path) -> dict[str, Entry]:
    """Return the entries of one file, every byte range checked against the size of the file.

    Raises:
        HubError: the file is cut short, its header is damaged, or it holds a dtype that is not supported.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise HubError(
                f"{file}: not a safetensors file, or cut short ({size:,} bytes); download it again"
            )
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            rows = {name: (v["dtype"], tuple(v["shape"]), *v["data_offsets"]) for name, v in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{file}: damaged safetensors header ({error}); download it again") from error
    entries = {}
    for name, (code, shape, start, stop) in rows.items():
        if code not in DTYPES:
            raise HubError(f"{file}: tensor {name} is {code}; supported are {', '.join(DTYPES)}")
        dtype = DTYPES[code]
        if stop - start != math.prod(shape) * dtype.itemsize or start < 0 or 8 + length + stop > size:
            raise HubError(
                f"{file}: the bytes of tensor {name} {list(shape)} are not all there; download it again"
            )
        entries[name] = Entry(file, dtype, shape, 8 + length + start)
    return entries


def open_folder(folder: Path, *more: str) -> Weights:
    """Open `model.safetensors`, or the shards that `model.safetensors.index.json` names; and the files `more`.

    Raises:
        HubError: neither is there, or one of `more`, a shard, or a tensor that the index names is missing.
    """
    if more:
        absent = [name for name in more if not (folder / name).is_file()]
        if absent:
            raise HubError(f"{folder}: holds no {', '.join(absent)}, where the rest of this model is")
        headers = [read_header(folder / name) for name in more]
        return Weights({k: v for part in (open_folder(folder).entries, *headers) for k, v in part.items()})
    if (folder / FILE).is_file():
        return Weights(read_header(folder / FILE))
    if not (folder / INDEX).is_file():
        raise HubError(_explain_missing(folder))
    try:
        where = dict(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise HubError(f"{folder / INDEX}: damaged index ({error}); download it again") from error
    files = sorted(set(where.values()))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise HubError(f"{folder}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent[:8])}")
    headers = {file: read_header(folder / file) for file in files}
    lost = [f"{name} (in {file})" for name, file in where.items() if name not in headers[file]]
    if lost:
        raise HubError(f"{folder}: tensors that {INDEX} names are not in their shard: {', '.join(lost[:8])}")
    return Weights({name: headers[file][name] for name, file in where.items()})


def _explain_missing(folder: Path) -> str:
    others = sorted(
        f.name for f in folder.iterdir() if f.suffix in (".bin", ".msgpack", ".h5", ".pt", ".pth")
    )
    if not others:
        return f"{folder}: holds no {FILE} and no {INDEX}"
    return (
        f"{folder}: holds {', '.join(others[:4])} but no {FILE}; these are not read (unpickling runs code). "
        "Convert once with transformers: AutoModel.from_pretrained(folder).save_pretrained(folder)"
    )


class Pending(NamedTuple):
    """A tensor to be written: its shape, dtype and a function that makes the array when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def write_folder(
    tensors: Mapping[str, Pending], folder: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write the tensors, one in memory at a time; above `max_shard_bytes` as shards with an index.

    Files appear under their final name only when complete, and those of an earlier save are removed
    afterwards, so a folder never mixes two saves.

    Raises:
        HubError: a dtype that safetensors cannot hold.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(tensors, max_shard_bytes)
    count = len(shards)
    names = [FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file, shard in zip(names, shards, strict=True):
        write_file({name: tensors[name] for name in shard}, folder / file)
    (folder / INDEX).unlink(missing_ok=True)
    if count > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(map(_nbytes, tensors.values()))}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for old in [folder / FILE, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in names:
            old.unlink(missing_ok=True)
    return [folder / name for name in names]


def _nbytes(tensor: Pending) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _split(tensors: Mapping[str, Pending], limit: int) -> list[list[str]]:
    """Fill shards in name order; a tensor larger than the limit has a shard of its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in sorted(tensors):
        size = _nbytes(tensors[name])
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def write_file(tensors: Mapping[str, Pending], file: Path) -> None:
    """Write one file, one tensor in memory at a time; it has its name only when it is complete."""
    # transformers 4 refuses a file whose metadata does not name the framework it was saved for.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order: Sequence[str] = sorted(
        tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)
    )  # keeps alignment
    offset = 0
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _CODES:
            raise HubError(
                f"{name} is {tensor.dtype}, which a safetensors file cannot hold; cast it to float32 first"
            )
        stop = offset + _nbytes(tensor)
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(file.name + ".partial")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            array = np.ascontiguousarray(tensors[name].make())
            if array.nbytes != _nbytes(tensors[name]) or array.dtype != tensors[name].dtype:
                raise HubError(
                    f"{name}: announced as {tensors[name][:2]}, made as {(array.shape, array.dtype)}"
                )
            stream.write(array.reshape(-1).view(np.uint8).data)
    os.replace(partial, file)
