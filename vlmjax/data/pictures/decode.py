"""Encoded images to RGB pixels, whatever the file holds."""

import functools
import io
import math
import os
import re
import warnings
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import numpy as np
import PIL
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from vlmjax.data.pictures import jpeg
from vlmjax.errors import BadRecord, DataError

Box = tuple[float | int, ...]  # x0, y0, x1, y1

# Pillow's own mark for a suspicious picture: 268 MB as RGB. Decoding keeps within a few times that.
MAX_PIXELS = 89_478_485
_BAND = 1 << 18  # pixels
VARIABLE = "VLMJAX_DECODE"

# Only plain raster formats: Pillow would also start Ghostscript for EPS files.
_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "TIFF",
    "AVIF",
    "BMP",
    "JPEG2000",
    "PPM",
    "ICO",
    "TGA",
    "SGI",
    "PCX",
)
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
# What brings an image upright for each value of EXIF's orientation tag but 1.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Where the upright image's left, and its top, is the right or the bottom edge of what the file stores.
_FROM_RIGHT, _FROM_BELOW = (2, 3, 6, 7), (3, 4, 7, 8)
_JPEG_SHRINK = 4  # a baseline JPEG of up to 16 x max_pixels is decoded at a half or a quarter of its size
_MOST_SCANS = 100  # of a JPEG; progressive ones have about ten
_MOST_WORK = 16  # times max_pixels that all scans of a JPEG may go over together
_QUIET_PIL = ("ignore", None, Warning, re.compile(r"PIL\."), 0)


def decode(
    data: bytes | np.ndarray,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    keep_alpha: bool = False,
) -> np.ndarray:
    """An encoded image as pixels: RGB, upright, 8 bits, first frame.

    EXIF orientation is applied. Transparency is laid over `background` (or kept, see below). Grey, palette,
    CMYK, 1-bit and 16-bit images are converted; 16 bits map by the full range (65535 -> 255). Pictures of
    more than `max_pixels` are refused by their header, before memory is taken, except baseline JPEGs of up to
    16 times that, which are decoded at a half or a quarter of their size. JPEGs of more than a hundred scans, or
    whose scans go over 16 times `max_pixels` together, are refused before time is taken.

    Args:
        data: the file's bytes; a uint8 array [height, width, 3 or 4] passes through (alpha handled as above).
        background: what shows through transparent pixels.
        max_pixels: bound on width times height.
        keep_alpha: give [height, width, 4] where the image has transparency.

    Returns:
        uint8 [height, width, 3] (or 4 with `keep_alpha`).

    Raises:
        BadRecord: reasons `empty`, `not_an_image`, `truncated`, `bomb`, `undecodable`.
    """
    image = open_image(data, background=background, max_pixels=max_pixels, keep_alpha=keep_alpha)
    return image if isinstance(image, np.ndarray) else image.pixels()


def open_image(
    data: bytes | np.ndarray,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = MAX_PIXELS,
    keep_alpha: bool = False,
) -> "np.ndarray | Jpeg":
    """As `decode`, but an ordinary JPEG is only opened: a crop of it may need fewer pixels than it has.

    Returns:
        A `Jpeg`, whose decoding may still raise BadRecord; of anything else, its pixels.
    """
    if isinstance(data, np.ndarray):
        return _pixels_given(data, background, keep_alpha)
    if not data:
        raise BadRecord("empty", detail="no bytes")
    fast = decoder() != "pillow"
    size = jpeg.plain_size(data) if fast else None
    if size is not None and size[0] * size[1] <= max_pixels:
        _bound_scans(data, size, max_pixels)
        return Jpeg(data, size, 1, max_pixels)
    _quiet()
    image, whole = _open(data, max_pixels)
    if image.format == "JPEG":
        _bound_scans(data, image.size, max_pixels)
    if fast and whole and image.format == "JPEG" and image.mode in ("RGB", "L"):
        return Jpeg(data, image.size, _orientation(image), max_pixels)
    return _by_pillow(image, background, keep_alpha)


class Jpeg:
    """A JPEG whose header has been read and whose pixels wait; as an array it is `decode`'s.

    Attributes:
        shape: (height, width, 3) of the upright image.
    """

    def __init__(self, data: bytes, size: tuple[int, int], orientation: int, max_pixels: int):
        """`size` is (width, height) as stored, within `max_pixels`; `orientation` is EXIF's number."""
        self._data, self._size, self._turn, self._most = data, size, orientation, max_pixels
        width, height = size
        self.shape = (width, height, 3) if orientation >= 5 else (height, width, 3)

    def pixels(self) -> np.ndarray:
        """uint8 [height, width, 3]. Raises BadRecord."""
        return self._decoded(1)[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `numpy.asarray` sees."""
        return np.asarray(self.pixels(), dtype)

    def covering(self, box: Box, size: tuple[int, int]) -> tuple[np.ndarray, Box]:
        """Pixels of which `box` is to become `size` (height, width), and where the box lies in them.

        A box of four times the size or more comes from an image decoded at a half, a quarter or an eighth, the
        smallest that still holds twice the size: what the resize then sees differs by under a level in the mean,
        for a third of the time. For training; evaluation takes whole images. Raises BadRecord.
        """
        room = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / 2
        pixels, divisor = self._decoded(next((d for d in (8, 4, 2) if d <= room), 1))
        height, width = (n * divisor for n in pixels.shape[:2])  # with the blocks that stand over the edge
        right = width - self.shape[1] if self._turn in _FROM_RIGHT else 0
        below = height - self.shape[0] if self._turn in _FROM_BELOW else 0
        x0, y0, x1, y1 = ((edge + (below if i % 2 else right)) / divisor for i, edge in enumerate(box))
        return pixels, (x0, y0, x1, y1)

    def _decoded(self, divisor: int) -> tuple[np.ndarray, int]:
        """Upright pixels at a share of the size, and that share: 1 where only Pillow takes the file."""
        import simplejpeg

        width, height = (-(-side // divisor) for side in self._size)
        out = np.empty(
            (height, width, 3), np.uint8
        )  # of the size that was checked, whatever the file says next
        try:
            pixels = simplejpeg.decode_jpeg(self._data, min_height=height, min_width=width, buffer=out)
        except ValueError:  # damaged, a little or much: Pillow draws that line
            pixels = None
        if pixels is None or pixels.shape != out.shape:
            _quiet()
            pixels = _by_pillow(_open(self._data, self._most)[0], (255, 255, 255), False)
            if pixels.shape != self.shape:
                raise BadRecord("undecodable", detail=f"a header of {self.shape} on pixels of {pixels.shape}")
            return pixels, 1
        turn = _TURNS.get(self._turn)
        return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn)), divisor


@functools.cache
def decoder() -> str:
    """What decodes JPEGs: "simplejpeg", or "pillow" where $VLMJAX_DECODE says so.

    Raises:
        DataError: the variable holds anything else.
    """
    name = os.environ.get(VARIABLE) or "simplejpeg"
    if name not in ("simplejpeg", "pillow"):
        raise DataError(f"{VARIABLE}={name!r} is not a decoder; known: simplejpeg, pillow")
    return name


def versions() -> dict[str, str]:
    """The decoders in use with their versions."""
    pillow = PIL.__version__
    fast = "pillow " + pillow if decoder() == "pillow" else f"simplejpeg {metadata.version('simplejpeg')}"
    return {"decode": fast, "pillow": pillow}


def _by_pillow(image: Image.Image, background: tuple[int, int, int], keep_alpha: bool) -> np.ndarray:
    try:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return _to_pixels(image if turn is None else image.transpose(turn), background, keep_alpha)
    except Exception as error:  # Pillow's decoders raise nearly every built-in class on damaged input
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadRecord(reason, detail=f"{type(error).__name__}: {error}") from error


def _quiet() -> None:
    """Put a filter for Pillow's warnings in front, unless it is there.

    `warnings.catch_warnings` swaps the list of the whole process, so threads that overlap would restore each
    other's state; one filter that stays does no such harm.
    """
    if not warnings.filters or warnings.filters[0][3] != _QUIET_PIL[3]:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def _open(data: bytes, max_pixels: int) -> tuple[Image.Image, bool]:
    """Read the header, check it, and ask a huge JPEG to come smaller: the image, and whether it comes whole."""
    try:
        if data[:3] == b"\xff\xd8\xff":  # straight to the plugin: no size check of Pillow's, and faster
            image: Image.Image = JpegImagePlugin.JpegImageFile(io.BytesIO(data))
        else:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadRecord("bomb", detail=str(error)) from error
    except (UnidentifiedImageError, SyntaxError) as error:
        raise BadRecord("not_an_image", detail=f"begins with {data[:12]!r}") from error
    except Exception as error:
        raise BadRecord("undecodable", detail=f"{type(error).__name__}: {error}") from error
    width, height = image.size
    if width * height <= max_pixels:
        return image, True
    shrink = math.isqrt(-(-width * height // max_pixels) - 1) + 1
    progressive = image.info.get("progressive") or image.info.get("progression")
    if image.format != "JPEG" or progressive or shrink > _JPEG_SHRINK:
        raise BadRecord("bomb", detail=f"{width} x {height} pixels, at most {max_pixels} are decoded")
    size = (max(1, width // 4), max(1, height // 4)) if shrink > 2 else (width // 2, height // 2)
    image.draft(None, size)
    return image, False


def _bound_scans(data: bytes, size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a JPEG of far more scans than encoders write: each goes over all pixels again. Raises BadRecord."""
    most = min(_MOST_SCANS, _MOST_WORK * max_pixels // max(1, size[0] * size[1]))
    if jpeg.scans(data, most) > most:
        raise BadRecord("bomb", detail=f"more than {most} scans of {size[0]} x {size[1]} pixels")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how the image is stored: 1 is upright, 5 to 8 lie on their side."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1
    return value if value in _TURNS else 1


def _to_pixels(image: Image.Image, background: tuple[int, int, int], keep_alpha: bool) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        if rgba[..., 3].min() < 255:
            return rgba if keep_alpha else composite(rgba, background)
        return np.ascontiguousarray(rgba[..., :3])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _bands(pixels: np.ndarray) -> Iterator[slice]:
    """Rows of a picture some at a time: arithmetic in wider numbers than bytes then takes little memory."""
    step = max(1, _BAND // max(1, pixels.shape[1]))
    return (slice(start, start + step) for start in range(0, len(pixels), step))


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey by its full range (as it is where it holds bytes); others by their maximum."""

    def wide(rows: slice) -> np.ndarray:
        return np.nan_to_num(values[rows].astype(np.float64), posinf=0.0, neginf=0.0)

    top = max((float(wide(rows).max(initial=0.0)) for rows in _bands(values)), default=0.0)
    scale = 1.0
    if mode == "F" and top <= 1.0:
        scale = 255.0
    elif top > 255.0:
        scale = 1 / 257.0 if mode != "F" and top <= 65535.0 else 255.0 / top
    out = np.empty(values.shape, np.uint8)
    for rows in _bands(values):
        out[rows] = np.clip(np.rint(wide(rows) * scale), 0, 255)
    return out


def composite(rgba: np.ndarray, background: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    """Lay uint8 [height, width, 4] over one colour: uint8 [height, width, 3], correctly rounded."""
    out, colour = np.empty((*rgba.shape[:2], 3), np.uint8), np.asarray(background, np.uint16)
    for rows in _bands(rgba):
        alpha = rgba[rows, :, 3:].astype(
            np.uint16
        )  # a mean of two bytes times 255, plus 127, fits in 16 bits
        out[rows] = (rgba[rows, :, :3] * alpha + colour * (255 - alpha) + 127) // 255
    return out


def _pixels_given(pixels: np.ndarray, background: tuple[int, int, int], keep_alpha: bool) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not pixels.size:
        raise BadRecord(
            "undecodable", detail=f"pixels are {pixels.dtype} {pixels.shape}, not uint8 [h, w, 3]"
        )
    return pixels if keep_alpha or pixels.shape[2] == 3 else composite(pixels, background)
