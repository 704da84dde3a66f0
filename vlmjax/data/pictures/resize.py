"""Antialiased resize of 8-bit pixels by the fastest kernel there is, with Pillow's results."""

import ctypes
import dataclasses
import functools
import logging
import os
import threading
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np
import PIL
from PIL import Image

from vlmjax.data.pictures import native
from vlmjax.errors import DataError

VARIABLE = "VLMJAX_RESIZE"
BICUBIC = int(Image.Resampling.BICUBIC)
_C_KERNELS = tuple(
    int(k) for k in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
)
_WHOLE = 1 << 24  # pixels: 50 MB
_log = logging.getLogger(__name__)
_lock = threading.Lock()

Box = tuple[float | int, ...]  # x0, y0, x1, y1
Window = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to resize.

    Attributes:
        name: as `choose` takes it and `images.backend()` reports it.
        exact: True when every result equals Pillow's.
        run: (pixels uint8 [h, w, 3], (height, width), box, kernel, window, mirror) -> uint8 [rows, columns, 3],
            or None where it cannot do what is asked.
    """

    name: str
    exact: bool
    run: Callable[[np.ndarray, tuple[int, int], Box, int, Window, bool], np.ndarray | None]


def resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    box: Box | None = None,
    resample: int = BICUBIC,
    *,
    window: Window | None = None,
    mirror: bool = False,
    exact: bool = False,
    backend: str | None = None,
) -> np.ndarray:
    """Antialiased resize of an image, or a part of it, in the arithmetic of Pillow's `Image.resize`.

    Args:
        pixels: uint8 [h, w, 3 or 4].
        size: (height, width) that the whole `box` is resized to.
        box: (x0, y0, x1, y1) of what is taken, in pixels, fractions allowed; everything by default.
        resample: Pillow's number of the kernel, 3 is bicubic.
        window: (top, left, bottom, right) of the part of the result that is wanted; the rest is not made.
        mirror: swap left and right of the result.
        exact: insist on Pillow's values, which a backend without them leaves to Pillow.
        backend: see `choose`.

    Returns:
        uint8 [bottom - top, right - left, 3 or 4]; `pixels` itself where nothing changes.

    Raises:
        DataError: `backend` names one that is unknown or cannot run here.
    """
    height, width = pixels.shape[:2]
    whole = (0, 0, *size)
    if box is None and (height, width) == tuple(size) and window in (None, whole) and not mirror:
        return pixels
    box = (0.0, 0.0, float(width), float(height)) if box is None else box
    window = whole if window is None else window
    chosen = choose(backend)
    out = None
    if pixels.shape[2] == 3 and (chosen.exact or not exact):
        out = chosen.run(pixels, size, box, int(resample), window, mirror)
    return _pillow(pixels, size, box, int(resample), window, mirror) if out is None else out


def choose(name: str | None = None) -> Backend:
    """The backend of that name; without one, $VLMJAX_RESIZE, or the best that runs: c, kornia, pillow.

    Raises:
        DataError: the name is unknown, or the backend cannot run here (with the reason).
    """
    name = name or os.environ.get(VARIABLE) or ""
    with _lock:  # threads that come at once compile once
        return _chosen(name)


@functools.cache
def _chosen(name: str) -> Backend:
    makers: dict[str, Callable[[], Backend | str]] = {
        "c": _make_c,
        "kornia": _make_kornia,
        "pillow": _make_pillow,
    }
    if name and name not in makers:
        raise DataError(f"{VARIABLE}={name!r} is not a way to resize; known: {', '.join(makers)}")
    reasons = []
    for each in [name] if name else makers:
        made = makers[each]()
        if isinstance(made, Backend):
            if reasons:
                _log.warning("images are resized by %s: %s", made.name, "; ".join(reasons))
            return made
        reasons.append(f"{each}: {made}")
    raise DataError(f"cannot resize by {'; '.join(reasons)}; unset {VARIABLE} to use what there is")


def _make_pillow() -> Backend:
    return Backend(f"pillow {PIL.__version__}", True, _pillow)


def _make_kornia() -> Backend | str:
    try:
        import kornia_rs  # noqa: F401
    except ImportError as error:
        return f"{error} (pip install kornia_rs)"
    return Backend(f"kornia_rs {metadata.version('kornia_rs')}", False, _kornia)


def _make_c() -> Backend | str:
    library, reason = native.load("resize")
    if library is None:
        return reason
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.vlmjax_resize.argtypes = [pointer, ctypes.c_int64, number, number, ctypes.c_float * 4]
    library.vlmjax_resize.argtypes += [number] * 10 + [pointer]
    library.vlmjax_resize.restype = library.vlmjax_vectors.restype = number
    vectors = library.vlmjax_vectors()
    for height_first in (_much_less_height, _strip, _never):
        run = functools.partial(_c, library.vlmjax_resize, vectors, height_first)
        worst = _worst_difference(run)
        if worst == 0:
            return Backend("c", True, run)
    return Backend("c", False, run) if worst <= 2 else f"its results are {worst} levels from Pillow's"


def _worst_difference(run: Callable[..., Any]) -> int:
    """Largest difference to the installed Pillow on a few small images, which tell its order of passes too."""
    worst, rng = 0, np.random.default_rng(0)
    for shape, size, box in (
        ((61, 53), (24, 24), (3.25, 4.5, 50.0, 60.0)),
        ((61, 53), (20, 50), (0, 0, 53, 61)),
        ((61, 53), (90, 97), (2, 3, 44, 33)),
        ((404, 4), (300, 2), (0, 0, 4, 404)),
    ):
        noise, whole = rng.integers(0, 256, (*shape, 3)).astype(np.uint8), (0, 0, *size)
        for kernel in _C_KERNELS:
            out = run(noise, size, box, kernel, whole, False).astype(int)
            worst = max(worst, int(np.abs(out - _pillow(noise, size, box, kernel, whole, False)).max()))
    return worst


# Which pass comes first matters to the last bit, as 8 bits are kept in between. Up to Pillow 12.2 it is the width.


def _much_less_height(height: int, width: int, to_height: int, to_width: int) -> bool:
    """Pillow 13: the height comes first where that takes away more than twice the pixels that the width loses."""
    return to_height < height and height - to_height > 2 * (width - to_width)


def _strip(height: int, width: int, to_height: int, to_width: int) -> bool:
    """Pillow 12.3: the height comes first where it is over a hundred times the width."""
    return to_height < height and height > 100 * width


def _never(*_: int) -> bool:
    return False


def _c(
    function: Any,
    vectors: int,
    height_first: Callable[[int, int, int, int], bool],
    pixels: np.ndarray,
    size: tuple[int, int],
    box: Box,
    resample: int,
    window: Window,
    mirror: bool,
) -> np.ndarray | None:
    """The kernel of csrc/resize.c, which runs without the interpreter's lock."""
    height, width = pixels.shape[:2]
    inside = 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height
    if resample not in _C_KERNELS or not inside:
        return None  # Pillow has the other kernels, and the words for a wrong box
    if pixels.strides[1:] != (3, 1) or pixels.strides[0] < 3 * width:
        pixels = np.ascontiguousarray(pixels)
    top, left, bottom, right = window
    if mirror:
        left, right = size[1] - right, size[1] - left
    out = np.empty((bottom - top, right - left, 3), np.uint8)
    failed = function(
        pixels.ctypes.data, pixels.strides[0], height, width, (ctypes.c_float * 4)(*box), *size,
        top, left, bottom - top, right - left, resample, height_first(height, width, *size), mirror, vectors,
        out.ctypes.data,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no room to resize {width} x {height} pixels to {size[1]} x {size[0]}")
    return out


def _kornia(
    pixels: np.ndarray, size: tuple[int, int], box: Box, resample: int, window: Window, mirror: bool
) -> np.ndarray | None:
    """kornia_rs's bicubic; it takes whole pixels and whole results."""
    if resample != BICUBIC or window != (0, 0, *size) or any(edge != int(edge) for edge in box):
        return None
    import kornia_rs

    x0, y0, x1, y1 = map(int, box)
    part = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    out = np.asarray(kornia_rs.imgproc.resize(part, size, "bicubic"))
    return np.ascontiguousarray(out[:, ::-1]) if mirror else out


def _pillow(
    pixels: np.ndarray, size: tuple[int, int], box: Box, resample: int, window: Window, mirror: bool
) -> np.ndarray:
    top, left, bottom, right = window
    if mirror:
        left, right = size[1] - right, size[1] - left
    y, x = top, left
    if size[0] * size[1] > _WHOLE and window != (0, 0, *size):
        (y0, y1, y), (x0, x1, x) = (
            _with_margin(top, bottom, size[0], box[3] - box[1]),
            _with_margin(left, right, size[1], box[2] - box[0]),
        )
        ys, xs = (box[3] - box[1]) / size[0], (box[2] - box[0]) / size[1]
        box = (
            box[0] + x0 * xs,
            box[1] + y0 * ys,
            min(box[0] + x1 * xs, box[2]),
            min(box[1] + y1 * ys, box[3]),
        )
        size = (y1 - y0, x1 - x0)
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling(resample), box=box)
    image = (
        image
        if image.size == (right - left, bottom - top)
        else image.crop((x, y, x + right - left, y + bottom - top))
    )
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image)


def _with_margin(first: int, last: int, out: int, full: float) -> tuple[int, int, int]:
    """Grow [first, last) of `out` resized pixels by the widest kernel (lanczos, 3): start, end, offset."""
    margin = int(3 * max(1.0, out / full)) + 2
    start, end = max(0, first - margin), min(out, last + margin)
    return start, end, first - start
