"""Images as the rest of the room uses them: decoding and resizing by name, and the preprocessing of evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vlmjax.data.pictures import decode as _decoding
from vlmjax.data.pictures import resize as _resizing
from vlmjax.data.pictures.decode import MAX_PIXELS, Jpeg, composite, decode, open_image
from vlmjax.data.pictures.resize import resize
from vlmjax.errors import BadRecord, DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

__all__ = ["MAX_PIXELS", "Jpeg", "composite", "decode", "open_image", "resize"]


def backend() -> dict[str, str]:
    """What makes the pixels here: {"decode": "simplejpeg 1.9.0", "resize": "c", "pillow": "13.0.0"}.

    Runs that must repeat each other to the last bit need the same three. $VLMJAX_DECODE (simplejpeg, pillow) and
    $VLMJAX_RESIZE (c, kornia, pillow) choose.

    Raises:
        DataError: a variable names what does not exist or cannot run here.
    """
    return {**_decoding.versions(), "resize": _resizing.choose().name}


def take(image: np.ndarray | Jpeg, box: tuple, size: tuple[int, int], mirror: bool = False) -> np.ndarray:
    """A part of an image, box (x0, y0, x1, y1), resized to `size` (height, width), perhaps mirrored: uint8.

    Raises:
        BadRecord: the image is a `Jpeg` that turns out to be damaged.
    """
    pixels, box = (image, box) if isinstance(image, np.ndarray) else image.covering(box, size)
    return resize(pixels, size, box, mirror=mirror)


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
        pad: make every image a square first, see `squared`: as LLaVA-1.5 does, so that nothing is cut off.
    """

    takes_jpegs: ClassVar[bool] = True  # as augment.TrainTransform does; here they are decoded whole
    size: int | tuple[int, int] = 224
    crop: tuple[int, int] | None = (224, 224)
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    resample: int = 3
    background: tuple[int, int, int] = (255, 255, 255)
    pad: bool = False

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every output; None when images keep their own shape."""
        return self.crop or (self.size if isinstance(self.size, tuple) else None)

    def __call__(self, image: np.ndarray | Jpeg, rng: np.random.Generator | None = None) -> np.ndarray:
        """uint8 [h, w, 3], or a `Jpeg`, -> uint8 crop. `rng` is not used: evaluation has no randomness."""
        pixels = np.asarray(image)
        pixels = squared(pixels, self.mean) if self.pad else pixels
        height, width = self._resized(*pixels.shape[:2])
        if self.crop is None:
            return resize(pixels, (height, width), None, self.resample, exact=True)
        top, left = (height - self.crop[0]) // 2, (width - self.crop[1]) // 2
        window = (max(top, 0), max(left, 0), min(top + self.crop[0], height), min(left + self.crop[1], width))
        part = resize(pixels, (height, width), None, self.resample, window=window, exact=True)
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
        kind = {"image_processor_type": "CLIPImageProcessor"}
        if self.pad:
            kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
        return {
            **kind,
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
        pad = bool(config.get("do_pad", False))
        if pad and not str(config.get("image_processor_type", "")).startswith("LlavaImageProcessor"):
            raise DataError(
                f"preprocessor_config.json: do_pad of {config.get('image_processor_type')!r} is not supported, only "
                "LlavaImageProcessor's, which makes squares"
            )
        return cls(size, crop, mean, std, int(config.get("resample", 3)), pad=pad)


def squared(pixels: np.ndarray, colour: Sequence[float]) -> np.ndarray:
    """An image in the middle of a square of its longer side (LLaVA-1.5, 2310.03744, section 3.2; expand2square there).

    Args:
        pixels: uint8 [h, w, 3 or 4].
        colour: of the rest, in [0, 1]: the mean, which normalisation makes nearly 0. Rounded down; opaque.

    Raises:
        BadRecord: a strip so long that its square would be too large.
    """
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    side = max(height, width)
    if side * side > MAX_PIXELS:
        raise BadRecord("too_long", "", f"{width} x {height} pixels cannot be padded to a square")
    out = np.full((side, side, pixels.shape[2]), 255, np.uint8)
    out[..., :3] = [int(value * 255) for value in colour]
    top, left = (side - height) // 2, (side - width) // 2
    out[top : top + height, left : left + width] = pixels
    return out


def _size_of(value: Any) -> int | tuple[int, int]:
    """A size as Hugging Face writes it: a number, {"shortest_edge"}, or {"height", "width"}."""
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping) and set(value) == {"shortest_edge"}:
        return int(value["shortest_edge"])
    if isinstance(value, Mapping) and set(value) == {"height", "width"}:
        return int(value["height"]), int(value["width"])
    raise DataError(f"preprocessor_config.json: size {value!r} is neither shortest_edge nor height and width")
