"""PyTorch's .pth files without PyTorch: tensors alone are read, and nothing in a file is ever run.

Since version 1.6 `torch.save` writes a zip archive that compresses nothing: `<name>/data.pkl`, a pickle that says which
tensor has which dtype, shape and storage, and `<name>/data/<key>`, the raw bytes of each storage. So a tensor is a view
of the mapped file. The pickle is read by an unpickler that knows the few names tensors are made of; whatever else a
file holds (an optimizer, the arguments of a run) becomes an empty object.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.safetensors import Entry, Weights

_DTYPES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
_LOCAL_HEADER = 30  # bytes before the name of an entry of a zip archive


class _Tensor(NamedTuple):
    """What the pickle says of a tensor."""

    key: str
    dtype: np.dtype | None
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Nothing:
    """What stands for anything that is no tensor: it takes all and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        """Take."""

    def __setstate__(self, _: Any) -> None:
        """Take."""

    def __setitem__(self, *_: Any) -> None:
        """Take."""

    def append(self, *_: Any) -> None:
        """Take."""

    extend = append


def _rebuild(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Any:
    key, dtype = storage
    return _Tensor(key, dtype, offset, tuple(shape), tuple(strides))


def _parameter(tensor: Any, *_: Any) -> Any:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Makes dicts, lists and tensors; every other class is _Nothing."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name of the pickle stands for. Nothing is imported."""
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name.endswith("Storage"):
            return type(name, (), {"dtype": _DTYPES.get(name)})
        return _Nothing

    def persistent_load(self, pid: Any) -> Any:
        """Return a storage: where its bytes are, and their dtype."""
        _, kind, key, *_ = pid
        return str(key), getattr(kind, "dtype", None)


def open_file(file: Path) -> Weights:
    """The tensors of a file by name, the levels of nested dicts joined by dots: `model.text_encoder.weight`.

    Raises:
        HubError: the file is not there, of PyTorch before 1.6, or damaged.
    """
    if not file.is_file():
        raise HubError(f"{file}: no such file")
    try:
        with zipfile.ZipFile(file) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            pickled = next((name for name in infos if name.endswith("/data.pkl")), None)
            if pickled is None:
                raise HubError(f"{file}: a zip archive without data.pkl, so not one of torch.save")
            tree = _Unpickler(io.BytesIO(archive.read(pickled))).load()
    except zipfile.BadZipFile:
        raise HubError(
            f"{file}: not a file that PyTorch 1.6 or later saved, or cut short; download it again, or save it anew: "
            "torch.save(torch.load(old, map_location='cpu'), new)"
        ) from None
    except (pickle.UnpicklingError, EOFError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise HubError(f"{file}: damaged ({error}); download it again") from error
    root = pickled.removesuffix("data.pkl") + "data/"
    entries, starts = {}, {}
    for name, tensor in _tensors(tree):
        if tensor.dtype is None:
            continue
        if tensor.key not in starts:
            starts[tensor.key] = _start(file, infos, root + tensor.key)
        entries[name] = _entry(file, name, tensor, *starts[tensor.key])
    return Weights(entries)


def _tensors(tree: Any, prefix: str = "") -> list[tuple[str, _Tensor]]:
    found: list[tuple[str, _Tensor]] = []
    if not isinstance(tree, Mapping):
        return found
    for key, value in tree.items():
        if isinstance(value, _Tensor):
            found.append((f"{prefix}{key}", value))
        else:
            found += _tensors(value, f"{prefix}{key}.")
    return found


def _start(file: Path, infos: Mapping[str, zipfile.ZipInfo], name: str) -> tuple[int, int]:
    """Where the bytes of an entry begin, and how many there are."""
    info = infos.get(name)
    if info is None or info.compress_type != zipfile.ZIP_STORED:
        raise HubError(f"{file}: the bytes of {name} are missing or compressed; download it again")
    with file.open("rb") as stream:
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return info.header_offset + _LOCAL_HEADER + lengths, info.file_size


def _entry(file: Path, name: str, tensor: _Tensor, start: int, size: int) -> Entry:
    """One tensor, its range of bytes checked."""
    count = int(np.prod(tensor.shape, dtype=np.int64))
    begin, width = tensor.offset * tensor.dtype.itemsize, tensor.dtype.itemsize
    if begin < 0 or begin + count * width > size:
        raise HubError(f"{file}: the bytes of tensor {name} {list(tensor.shape)} are not all there")
    if count > 1 and not _dense(tensor):
        raise HubError(
            f"{file}: tensor {name} {list(tensor.shape)} does not lie in order; save it anew with .contiguous()"
        )
    return Entry(file, tensor.dtype, tensor.shape, start + begin)


def _dense(tensor: _Tensor) -> bool:
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
