"""C code of this room, compiled once by the machine's own compiler into the user's cache and loaded with ctypes."""

import contextlib
import ctypes
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from vlmjax.data.storage import files

SOURCES = pathlib.Path(__file__).with_name("csrc")
# No contraction: a fused multiply-add rounds once where the arithmetic that is to be equalled rounds twice.
# No -march=native either: a home folder may be shared by machines of several kinds; the code asks the processor.
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fPIC", "-shared")
_PLAIN = "-DVLMJAX_PLAIN"  # for compilers without x86 intrinsics
_SECONDS = 120


def load(name: str, cache: str | os.PathLike[str] | None = None) -> tuple[ctypes.CDLL | None, str]:
    """The library of `csrc/<name>.c`, or None and the reason why there is none.

    The first call on a machine compiles it (about a second) with $CC, a program or a whole command, or `cc`, into
    <cache>/native; the name carries a hash of source, compiler and machine. It appears under that name only when
    complete, so any number of processes may do this at once. Where the cache cannot be used, a private copy serves
    this process.
    """
    try:
        source = (SOURCES / f"{name}.c").read_bytes()
    except OSError as error:
        return None, f"its source is not installed: {error}"
    compiler = _compiler()
    made_by = f"{' '.join(compiler)}|{sys.platform}|{platform.machine()}|{platform.libc_ver()}|{_FLAGS}"
    digest = hashlib.sha256(source + made_by.encode()).hexdigest()[:16]
    reasons = []
    for folder in (files.cache_folder(cache) / "native", None):
        try:
            with _folder(folder) as place:
                return _loaded(place / f"{name}-{digest}.so", compiler, source), ""
        except (OSError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    return None, "; ".join(dict.fromkeys(reasons))


def _compiler() -> list[str]:
    """$CC, or `cc`, as the words of a command; none where there is no such program."""
    given = os.environ.get("CC") or "cc"
    if whole := shutil.which(given):
        return [whole]
    try:
        command, *arguments = shlex.split(given)
    except ValueError:  # blank, or quotes without an end
        return []
    found = shutil.which(command)
    return [found, *arguments] if found else []


@contextlib.contextmanager
def _folder(folder: pathlib.Path | None) -> Iterator[pathlib.Path]:
    """The folder, made, or one that is gone when the library in it has been loaded."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="vlmjax-native-") as temporary:
        yield pathlib.Path(temporary)


def _loaded(target: pathlib.Path, compiler: list[str], source: bytes) -> ctypes.CDLL:
    """The library of that name; made where it is not, or is damaged. Raises OSError and SubprocessError."""
    if target.exists():
        if target.stat().st_uid not in (os.getuid(), 0):  # code is not loaded from just anybody
            raise OSError(f"{target} is another user's")
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(target))
    _compile(compiler, source, target)
    return ctypes.CDLL(str(target))


def _compile(compiler: list[str], source: bytes, target: pathlib.Path) -> None:
    """Raises OSError with the compiler's words, or SubprocessError when it hangs."""
    if not compiler:
        raise OSError("no C compiler (set CC, or install cc)")
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".", suffix=".part")
    os.close(descriptor)
    try:
        for extra in ((), (_PLAIN,)):
            command = [*compiler, *_FLAGS, *extra, "-x", "c", "-", "-o", temporary, "-lm"]
            done = subprocess.run(command, input=source, capture_output=True, timeout=_SECONDS)
            if not done.returncode:
                break
        else:
            words = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(
                f"{' '.join(compiler)} failed: {words[-1] if words else f'status {done.returncode}'}"
            )
        os.chmod(temporary, 0o755)
        with open(temporary, "rb") as made:
            os.fsync(made.fileno())  # a library cut short by a power cut would kill the process that loads it
        os.replace(temporary, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
