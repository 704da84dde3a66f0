"""Gzipped shards: which they are, what they are called and how long they are when unpacked."""

import os

from vlmjax.data.storage import files, remote

_TAIL = 4  # bytes


def is_gzipped(path: str) -> bool:
    """By the ending of its name."""
    return (path.split("?")[0] if files.is_remote(path) else path).endswith((".gz", ".tgz"))


def plain_name(name: str) -> str:
    """The name of what is unpacked."""
    return name.removesuffix(".gz") if name.endswith(".gz") else name.replace(".tgz", ".tar")


def unpacked_size(path: str, packed: int) -> int:
    """Bytes that a gzipped file of `packed` bytes unpacks to, by its last four bytes (RFC 1952); at least `packed`.

    They count modulo 2^32, and the last part alone where several were joined: it may become more, but seldom does.
    """
    if files.is_remote(path):
        tail = remote.end_of(path, packed, _TAIL)
    else:
        with open(path, "rb") as file:
            file.seek(-_TAIL if os.fstat(file.fileno()).st_size >= _TAIL else 0, os.SEEK_END)
            tail = file.read(_TAIL)
    return max(packed, int.from_bytes(tail, "little"))
