"""Files that appear under their names when they are whole, here or in a bucket; what killed processes leave behind."""

import contextlib
import errno
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from vlmjax.errors import DataError

_TEMPORARY = "vlmjax-convert-"
_ABANDONED = 86_400.0  # seconds without a write, after which a part is waste whoever made it


def _filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path and the path in it. Raises DataError where there is no driver for it."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        scheme = path.split("://")[0]
        raise DataError(f"cannot write to {path}: no driver for {scheme}:// ({error})") from error


def exists(path: str) -> bool:
    """Whether there is such a file."""
    filesystem, inner = _filesystem(path)
    return filesystem.exists(inner)


def read(path: str) -> bytes | None:
    """All of a file, None where there is none."""
    filesystem, inner = _filesystem(path)
    try:
        return filesystem.cat_file(inner)
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextlib.contextmanager
def in_the_making(target: str) -> Iterator[str]:
    """A local path to write to, which becomes the target in one step: renamed or, where that is elsewhere, uploaded.

    Raises:
        DataError: it cannot be written, as on a full disk.
    """
    filesystem, inner = _filesystem(target)
    local, made = "file" in filesystem.protocol, ""
    try:
        filesystem.makedirs(os.path.dirname(inner), exist_ok=True)
        # Beside the target: a rename must not cross disks, and the temporary folder may be too small for a shard.
        made = f"{inner}.{_owner()}.part" if local else _temporary()
        yield made
        if local:
            os.replace(made, inner)
        else:
            filesystem.put_file(made, inner)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f"the disk of {os.path.dirname(made)} is full" if full else str(error)
        hint = "; name another folder for temporary files with TMPDIR" if full and not local else ""
        raise DataError(f"cannot write {target}: {where}{hint}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(made)


def _temporary() -> str:
    descriptor, path = tempfile.mkstemp(prefix=_TEMPORARY, suffix=f".{_owner()}.part")
    os.close(descriptor)
    return path


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def put(path: str, data: bytes) -> None:
    """Write a small file. Raises DataError."""
    with in_the_making(path) as made, open(made, "wb") as out:
        out.write(data)


def sweep(folder: str, start: str) -> None:
    """Remove what killed processes left of files called `start`..., in a folder and among the temporary files.

    A process of this host that is no more has left them; of another host's nobody knows, but none is at one file for
    a day without writing.
    """
    filesystem, inner = _filesystem(folder)
    places = {tempfile.gettempdir(): _TEMPORARY} | ({inner: start} if "file" in filesystem.protocol else {})
    for place, beginning in places.items():
        for entry in list(os.scandir(place)) if os.path.isdir(place) else []:
            with contextlib.suppress(OSError):
                if entry.name.startswith(beginning) and entry.name.endswith(".part") and _is_waste(entry):
                    os.unlink(entry.path)


def _is_waste(part: os.DirEntry) -> bool:
    owner, _, number = part.name.removesuffix(".part").rpartition("-")
    if owner.endswith("." + socket.gethostname()) and number.isdigit():
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
        except OSError:  # another user's, and alive
            pass
    return time.time() - part.stat().st_mtime > _ABANDONED
