"""Encoded images to RGB pixels, whatever the file holds, and the exact preprocessing of evaluation."""

import dataclasses
import io
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError

from vlmjax.errors import BadRecord, DataError

# Pillow's own mark for a suspicious picture: 268 MB as RGB. Decoding keeps within about twice that.
MAX_PIXELS = 89_478_485
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

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
_JPEG_SHRINK = 4  # a baseline JPEG of up to 16 x max_pixels is decoded at a half or a quarter of its size
_WHOLE_RESIZE = 1 << 24  # pixels: 50 MB
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
    16 times that, which are decoded at a half or a quarter of their size.

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
    if isinstance(data, np.ndarray):
        return _pixels_given(data, background, keep_alpha)
    if not data:
        raise BadRecord("empty", detail="no bytes")
    _quiet()
    image = _open(data, max_pixels)
    try:
        return _to_pixels(_upright(image), background, keep_alpha)
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


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header, check it, and ask a huge JPEG to come smaller."""
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
    if width * height > max_pixels:
        shrink = math.isqrt(-(-width * height // max_pixels) - 1) + 1
        progressive = image.info.get("progressive") or image.info.get("progression")
        if image.format != "JPEG" or progressive or shrink > _JPEG_SHRINK:
            raise BadRecord("bomb", detail=f"{width} x {height} pixels, at most {max_pixels} are decoded")
        image.draft(
            None, (max(1, width // 4), max(1, height // 4)) if shrink > 2 else (width // 2, height // 2)
        )
    return image


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return image
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_pixels(image: Image.Image, background: tuple[int, int, int], keep_alpha: bool) -> np.ndarray:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode))
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        if rgba[..., 3].min() < 255:
            return rgba if keep_alpha else composite(rgba, background)
        return np.ascontiguousarray(rgba[..., :3])
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _to_8_bits(values: np.ndarray, mode: str) -> np.ndarray:
    """16-bit grey by its full range (as it is where it holds bytes); others by their maximum."""
    values = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if mode == "F" and top <= 1.0:
        values = values * 255.0
    elif top > 255.0:
        values = values / 257.0 if mode != "F" and top <= 65535.0 else values * (255.0 / top)
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def composite(rgba: np.ndarray, background: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    """Lay uint8 [height, width, 4] over one colour: uint8 [height, width, 3], correctly rounded."""
    alpha = rgba[..., 3:].astype(np.uint16)  # a mean of two bytes times 255, plus 127, fits in 16 bits
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.uint16) * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _pixels_given(pixels: np.ndarray, background: tuple[int, int, int], keep_alpha: bool) -> np.ndarray:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not pixels.size:
        raise BadRecord(
            "undecodable", detail=f"pixels are {pixels.dtype} {pixels.shape}, not uint8 [h, w, 3]"
        )
    return pixels if keep_alpha or pixels.shape[2] == 3 else composite(pixels, background)


def resize(
    pixels: np.ndarray,
    size: tuple[int, int],
    box: tuple[float | int, ...] | None = None,
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Antialiased resize of uint8 [h, w, 3 or 4], or its `box` (x0, y0, x1, y1), to `size` (height, width)."""
    if box is None and pixels.shape[:2] == tuple(size):
        return pixels
    image = Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling(resample), box=box)
    return np.asarray(image)


def shrink(pixels: np.ndarray, shortest: int) -> np.ndarray:
    """Scale down so that the shorter side is `shortest`; smaller images stay as they are."""
    height, width = pixels.shape[:2]
    if min(height, width) <= shortest:
        return pixels
    scale = shortest / min(height, width)
    return resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """Hugging Face's CLIP image processor (its Pillow form): resize, centre crop, and normalise.

    Attributes:
        size: the shorter side after resizing, or (height, width) to resize to whatever the shape was.
        crop: (height, width) of the centre crop; None for no crop. Black fills up where there is no image.
        mean, std: per channel, of values in [0, 1].
        resample: Pillow's number of the resize kernel, 3 is bicubic.
        background: what shows through transparent pixels, RGB. Hugging Face's files have no place for it.
    """

    size: int | tuple[int, int] = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = 3
    background: tuple[int, int, int] = (255, 255, 255)

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every output; None when images keep their own shape."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 crop. `rng` is not used: evaluation has no randomness."""
        height, width = self._resized(*pixels.shape[:2])
        if self.crop is None:
            return resize(pixels, (height, width), None, self.resample)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        rows = (max(top, 0), min(top + self.crop[0], height))
        columns = (max(left, 0), min(left + self.crop[1], width))
        part = resize_part(pixels, (height, width), rows, columns, self.resample)
        if part.shape[:2] == self.crop:
            return part
        out = np.zeros((*self.crop, 3), np.uint8)
        above, before = max(-top, 0), max(-left, 0)
        out[above : above + part.shape[0], before : before + part.shape[1]] = part
        return out

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short, long = min(height, width), max(height, width)
        other = int(self.size * long / short)
        return (self.size, other) if height <= width else (other, self.size)

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] -> float32, (value / 255 - mean) / std."""
        scale = np.asarray(self.std, np.float32) * np.float32(255.0)
        return pixels.astype(np.float32) / scale - np.asarray(self.mean, np.float32) / np.asarray(
            self.std, np.float32
        )

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `preprocessor_config.json` that means the same to transformers."""
        size = self.size
        edge = {"height": size[0], "width": size[1]} if isinstance(size, tuple) else {"shortest_edge": size}
        crop = self.crop or (self.size if isinstance(self.size, tuple) else (self.size, self.size))
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": edge,
            "resample": self.resample,
            "do_center_crop": self.crop is not None,
            "crop_size": {"height": crop[0], "width": crop[1]},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "EvalTransform":
        """Read a `preprocessor_config.json` (old forms with plain numbers as sizes too).

        Raises:
            DataError: the file asks for something this transform does not do.
        """
        if not config.get("do_resize", True):
            raise DataError(
                "preprocessor_config.json: do_resize=false is not supported, images have to be resized"
            )
        if abs(config.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3 or not config.get("do_rescale", True):
            raise DataError("preprocessor_config.json: only rescale_factor=1/255 is supported")
        size = _size_of(config.get("size", {"shortest_edge": 224}))
        crop = _size_of(config.get("crop_size", 224)) if config.get("do_center_crop", True) else None
        crop = (crop, crop) if isinstance(crop, int) else crop
        plain = not config.get("do_normalize", True)
        mean = (0.0, 0.0, 0.0) if plain else tuple(config.get("image_mean", CLIP_MEAN))
        std = (1.0, 1.0, 1.0) if plain else tuple(config.get("image_std", CLIP_STD))
        return cls(size, crop, mean, std, int(config.get("resample", 3)))


def _size_of(value: Any) -> int | tuple[int, int]:
    """A size as Hugging Face writes it: a number, {"shortest_edge"}, or {"height", "width"}."""
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        return int(value["height"]), int(value["width"])
    raise DataError(f"preprocessor_config.json: size {value!r} is neither shortest_edge nor height and width")


def resize_part(
    pixels: np.ndarray,
    size: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    resample: int = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """Rows and columns of `resize(pixels, size)`, without making the rest where that would be huge.

    A strip of 1 x 20000 pixels scaled to a shorter side of 224 has a billion: there only the part wanted is made,
    with a margin as wide as the kernel around it that is cut off again. Pillow keeps the place of the part in
    single precision, which costs up to two grey levels; so ordinary images are resized whole.
    """
    if size[0] * size[1] <= _WHOLE_RESIZE:
        return resize(pixels, size, None, resample)[rows[0] : rows[1], columns[0] : columns[1]]
    (y0, y1, top), (x0, x1, left) = (
        _with_margin(*span, out, full)
        for span, out, full in ((rows, size[0], pixels.shape[0]), (columns, size[1], pixels.shape[1]))
    )
    ys, xs = pixels.shape[0] / size[0], pixels.shape[1] / size[1]
    box = (x0 * xs, y0 * ys, min(x1 * xs, pixels.shape[1]), min(y1 * ys, pixels.shape[0]))
    part = resize(pixels, (y1 - y0, x1 - x0), box, resample)
    return part[top : top + rows[1] - rows[0], left : left + columns[1] - columns[0]]


def _with_margin(first: int, last: int, out: int, full: int) -> tuple[int, int, int]:
    """Grow [first, last) of `out` resized pixels by the widest kernel (lanczos, 3): start, end, offset."""
    margin = math.ceil(3 * max(1.0, out / full)) + 1
    start, end = max(0, first - margin), min(out, last + margin)
    return start, end, first - start
