"""Random policies of whole-image changes, named by strings: RandAugment and BLIP's RandomAugment."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from vlmjax.errors import RecipeError

_GREY = (128, 128, 128)
_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*\(\s*(\d+)\s*,\s*(\d+(?:\.\d+)?)\s*\)\s*")
_MOST, _STRONGEST = 20, 30.0

Operation = Callable[[Image.Image, float], Image.Image]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Some operations drawn with replacement from a list, each at one strength, on every image.

    Attributes:
        name: `randaugment` or `blip`, see POLICIES.
        count: operations drawn per image, N of the paper.
        magnitude: their strength, M of the paper: 0 to 30, where 10 is the full range of AutoAugment.
    """

    name: str
    count: int
    magnitude: float

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 [h, w, 3] -> uint8 [h, w, 3]; equal pixels and an equal generator give equal bytes."""
        operations, probability = POLICIES[self.name]
        names = list(operations)
        image = Image.fromarray(np.ascontiguousarray(pixels))
        for _ in range(self.count):
            # Always three draws, so that what comes later does not depend on which operations these are.
            name, applied, sign = (
                names[rng.integers(len(names))],
                rng.random() < probability,
                rng.random() < 0.5,
            )
            if applied:
                image = operations[name](image, -self.magnitude / 10 if sign else self.magnitude / 10)
        return np.asarray(image)

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.name}({self.count}, {self.magnitude:g})"


def parse(text: Any) -> Policy | None:
    """'randaugment(2, 9)' or 'blip(2, 5)': name, operations per image, magnitude. The empty string is None.

    Raises:
        RecipeError: any other form, an unknown name (with the nearest), or a number out of range.
    """
    if not isinstance(text, str):
        raise RecipeError(f"augmentation policy={text!r} must be a string such as 'randaugment(2, 9)'")
    if not text.strip():
        return None
    match = _FORM.fullmatch(text)
    if not match:
        raise RecipeError(
            f"augmentation policy={text!r} is not of the form name(count, magnitude), such as 'randaugment(2, 9)'"
        )
    name, count, magnitude = match[1], int(match[2]), float(match[3])
    if name not in POLICIES:
        near = difflib.get_close_matches(name, POLICIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(POLICIES)}"
        raise RecipeError(f"augmentation policy {name!r} is unknown; {hint}")
    if not 1 <= count <= _MOST:
        raise RecipeError(f"augmentation policy={text!r}: the count must be 1 to {_MOST}")
    if magnitude > _STRONGEST:
        raise RecipeError(f"augmentation policy={text!r}: the magnitude must be 0 to {_STRONGEST:g}")
    return Policy(name, count, magnitude)


# Every operation takes an RGB image and a level: 1 is the full range, the sign a direction where it has one.


def _identity(image: Image.Image, level: float) -> Image.Image:
    return image


def _auto_contrast(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.autocontrast(image)


def _equalize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.equalize(image)


def _solarize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.solarize(image, max(0, round(256 * (1 - abs(level)))))


def _posterize(image: Image.Image, level: float) -> Image.Image:
    return ImageOps.posterize(image, max(1, 8 - round(4 * abs(level))))


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """A change by a factor of 1 - 0.9 level to 1 + 0.9 level."""
    return lambda image, level: kind(image).enhance(max(0.0, 1 + 0.9 * level))


def _affine(image: Image.Image, *matrix: float | int) -> Image.Image:
    """`matrix` leads from a place in the result to one in the source, in pixels, their centres at halves."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def _turned(image: Image.Image, degrees: float, beside: float = 0.0) -> Image.Image:
    """A turn about a place so many pixels below and right of the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = image.width / 2 + beside, image.height / 2 + beside
    return _affine(image, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


_SHEAR, _SHIFT, _TURN = 0.3, 150 / 331, 30.0  # AutoAugment's table: 150 pixels of images with a side of 331

_RANDAUGMENT: dict[str, Operation] = {
    "Identity": _identity,
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Rotate": lambda image, level: _turned(image, _TURN * level),
    "Solarize": _solarize,
    "Color": _enhanced(ImageEnhance.Color),
    "Posterize": _posterize,
    "Contrast": _enhanced(ImageEnhance.Contrast),
    "Brightness": _enhanced(ImageEnhance.Brightness),
    "Sharpness": _enhanced(ImageEnhance.Sharpness),
    "ShearX": lambda image, level: _affine(
        image, 1, _SHEAR * level, -_SHEAR * level * image.height / 2, 0, 1, 0
    ),
    "ShearY": lambda image, level: _affine(
        image, 1, 0, 0, _SHEAR * level, 1, -_SHEAR * level * image.width / 2
    ),
    "TranslateX": lambda image, level: _affine(image, 1, 0, _SHIFT * level * image.width, 0, 1, 0),
    "TranslateY": lambda image, level: _affine(image, 1, 0, 0, 0, 1, _SHIFT * level * image.height),
}


def _blip_factor(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """BLIP's one-sided factor of 0.1 + 1.8 |level|: exactly 1, no change at all, at its magnitude of 5."""
    return lambda image, level: kind(image).enhance(0.1 + 1.8 * abs(level))


# BLIP moves by pixels, whatever the size, slants about the centre of the upper left pixel, and turns about the
# pixel below and right of the middle, as OpenCV's matrices have it.
_BLIP: dict[str, Operation] = {
    "Identity": _identity,
    "AutoContrast": _auto_contrast,
    "Brightness": _blip_factor(ImageEnhance.Brightness),
    "Sharpness": _blip_factor(ImageEnhance.Sharpness),
    "Equalize": _equalize,
    "ShearX": lambda image, level: _affine(image, 1, -_SHEAR * level, _SHEAR * level / 2, 0, 1, 0),
    "ShearY": lambda image, level: _affine(image, 1, 0, 0, -_SHEAR * level, 1, _SHEAR * level / 2),
    "TranslateX": lambda image, level: _affine(image, 1, 0, 10 * level, 0, 1, 0),
    "TranslateY": lambda image, level: _affine(image, 1, 0, 0, 0, 1, 10 * level),
    "Rotate": lambda image, level: _turned(image, _TURN * level, 0.5),
}

# Name: the operations to draw from, and the probability that a drawn one is applied.
#   randaugment  Cubuk et al. 2020 (arXiv:1909.13719), the 14 operations of section 3, at AutoAugment's ranges.
#                Libraries count differently: torchvision's 9 of 30 is a magnitude of 3 here.
#   blip         Li et al. 2022 (arXiv:2201.12086), RandomAugment(2, 5) of its pretraining and finetuning.
POLICIES: dict[str, tuple[dict[str, Operation], float]] = {
    "randaugment": (_RANDAUGMENT, 1.0),
    "blip": (_BLIP, 0.5),
}
