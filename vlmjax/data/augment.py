"""Training transforms: crops, colours and small distortions, each a pure function of pixels and generator."""

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from vlmjax.data import images
from vlmjax.data.pictures import randaugment
from vlmjax.errors import RecipeError

_LUMA = np.array([0.299, 0.587, 0.114])
# RGB to YIQ (NTSC) and back: a turn of the IQ plane is a turn of hue that keeps brightness.
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a training image goes through, in this order. The defaults are a mild crop and nothing else.

    Attributes:
        crop_scale: smallest and largest share of the image's area that a crop keeps.
        crop_ratio: smallest and largest width / height of a crop before it is resized to the target.
        flip: probability of mirroring left and right. Not for data with text or "left of" captions.
        rotate: largest turn in degrees, either way.
        translate: largest shift as a share of the side.
        shear: largest slant in degrees.
        zoom: smallest and largest factor of a further scaling.
        background: probability that a transparent image gets a random colour behind it, not the usual one.
        policy: a random policy of whole-image changes, see `randaugment.parse`: "" for none, "randaugment(2, 9)",
            "blip(2, 5)".
        jitter: strength of brightness, contrast, saturation and hue changes: one number s for (s, s, s, s /
            4) as in SimCLR (Chen et al. 2020, appendix A), or the four numbers.
        grayscale: probability of losing all colour.
        blur: probability of a Gaussian blur, sigma 0.1 to 2 pixels at a side of 224, in proportion at others.
        sharpen: probability of sharpening.
        noise: largest standard deviation of Gaussian noise, in levels of 255.
        erase: probability that a rectangle of 2 to 20 % of the area becomes one random colour.
    """

    crop_scale: tuple[float, float] = (0.9, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate: float = 0.0
    translate: float = 0.0
    shear: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    background: float = 0.0
    policy: str = ""
    jitter: float | tuple[float, float, float, float] = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    sharpen: float = 0.0
    noise: float = 0.0
    erase: float = 0.0

    @classmethod
    def from_recipe(cls, recipe: "Mapping[str, Any] | Augmentation | None") -> "Augmentation":
        """Check a recipe's dictionary and build from it.

        Raises:
            RecipeError: an unknown name (with the nearest valid one), a wrong type or a value out of range.
        """
        if recipe is None or isinstance(recipe, Augmentation):
            return recipe or cls()
        names = [field.name for field in dataclasses.fields(cls)]
        for name in recipe:
            if name not in names:
                near = difflib.get_close_matches(str(name), names, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
                raise RecipeError(f"augmentation {name!r} is unknown; {hint}")
        return cls(**{name: _checked(name, recipe[name]) for name in recipe})


_PAIRS = {"crop_scale": (1e-4, 1.0), "crop_ratio": (0.01, 100.0), "zoom": (0.05, 20.0)}
_BOUNDS = {"rotate": 180.0, "shear": 60.0, "noise": 255.0}


def _checked(name: str, value: Any) -> Any:
    """The value of one setting in its field's type, or a RecipeError."""
    if name == "policy":
        policy = randaugment.parse(value)
        return "" if policy is None else str(policy)
    if name == "jitter" and not isinstance(value, (int, float)):
        strengths = _numbers(name, value, 4)
        return tuple(_in_range(name, strength, 0.0, 1.0) for strength in strengths)
    if name in _PAIRS:
        low, high = _numbers(name, value, 2)
        if low > high:
            raise RecipeError(f"augmentation {name}={value!r}: the first number must not exceed the second")
        return _in_range(name, low, *_PAIRS[name]), _in_range(name, high, *_PAIRS[name])
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"augmentation {name}={value!r} must be a number")
    return _in_range(name, float(value), 0.0, _BOUNDS.get(name, 1.0))


def _numbers(name: str, value: Any, count: int) -> list[float]:
    try:
        numbers = [float(number) for number in value]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        raise RecipeError(f"augmentation {name}={value!r} must be {count} numbers")
    return numbers


def _in_range(name: str, value: float, low: float, high: float) -> float:
    if not low <= value <= high:
        raise RecipeError(f"augmentation {name}: {value:g} is outside {low:g} to {high:g}")
    return value


class TrainTransform:
    """Pixels to one training image: `transform(uint8 [h, w, 3 or 4], rng) -> uint8 [*size, 3]`."""

    takes_jpegs = True  # whose pixels wait: see images.open_image

    def __init__(
        self,
        size: int | tuple[int, int],
        recipe: Mapping[str, Any] | Augmentation | None = None,
        *,
        background: tuple[int, int, int] = (255, 255, 255),
        pad: Sequence[float] | None = None,
    ):
        """`size` is (height, width) or one number; `recipe` as Augmentation's attributes; `pad` of `images.squared`.

        Raises:
            RecipeError: see `Augmentation.from_recipe`.
        """
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.recipe = Augmentation.from_recipe(recipe)
        self.background, self._pad = background, pad
        self._policy = randaugment.parse(self.recipe.policy)

    @property
    def output_size(self) -> tuple[int, int]:
        """(height, width) of every output."""
        return self.size

    @property
    def needs_alpha(self) -> bool:
        """True when transparency has to reach the transform."""
        return self.recipe.background > 0

    def __call__(self, image: np.ndarray | images.Jpeg, rng: np.random.Generator) -> np.ndarray:
        """One augmented image; equal pixels, or equal files, and an equal generator give equal bytes."""
        r = self.recipe
        if self._pad is not None:
            image = images.squared(np.asarray(image), self._pad)
        box = random_box(image.shape[:2], rng, r.crop_scale, r.crop_ratio)
        mirror = bool(r.flip and rng.random() < r.flip)
        pixels = images.take(image, box, self.size, mirror)
        if r.rotate or r.translate or r.shear or r.zoom != (1.0, 1.0):
            pixels = random_affine(pixels, rng, r.rotate, r.translate, r.shear, r.zoom)
        if pixels.shape[2] == 4:
            pixels = random_background(pixels, rng, r.background, self.background)
        if self._policy is not None:
            pixels = self._policy(pixels, rng)
        if r.jitter or r.grayscale:
            pixels = color_jitter(pixels, rng, r.jitter, r.grayscale)
        if r.blur and rng.random() < r.blur:
            pixels = gaussian_blur(pixels, rng)
        if r.sharpen and rng.random() < r.sharpen:
            pixels = sharpen(pixels, rng)
        if r.noise:
            pixels = gaussian_noise(pixels, rng, r.noise)
        if r.erase and rng.random() < r.erase:
            pixels = random_erase(pixels, rng)
        return np.ascontiguousarray(pixels)


def random_resized_crop(
    image: np.ndarray | images.Jpeg,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A rectangle of random area and shape, see `random_box`, resized (bicubic, antialiased) to `size`."""
    return images.take(image, random_box(image.shape[:2], rng, scale, ratio), size)


def random_box(
    shape: tuple[int, int],
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """A rectangle (x0, y0, x1, y1) of random area and shape in an image of `shape` (height, width).

    The rule of Inception's crops (Szegedy et al. 2015) as torchvision has it: ten tries for a rectangle that
    fits, the ratio log-uniform; then the largest central one whose ratio is allowed.
    """
    height, width = shape
    narrow, wide = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        # As rng.uniform, which takes four times as long; a mild crop of a wide picture needs most of the ten tries.
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(narrow + (wide - narrow) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return x, y, x + w, y + h
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        w = max(1, min(width, round(height * ratio[1])))
    y, x = (height - h) // 2, (width - w) // 2
    return x, y, x + w, y + h


def random_affine(
    pixels: np.ndarray,
    rng: np.random.Generator,
    rotate: float = 0.0,
    translate: float = 0.0,
    shear: float = 0.0,
    zoom: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """Turn, shift, slant and scale about the centre; bare corners get the colour of the border, or none."""
    height, width = pixels.shape[:2]
    angle, slant = np.radians(rng.uniform(-1, 1, 2) * (rotate, shear))
    dx, dy = rng.uniform(-1, 1, 2) * translate * (width, height)
    factor = math.exp(rng.uniform(math.log(zoom[0]), math.log(zoom[1])))
    cos, sin, tan = math.cos(angle), math.sin(angle), math.tan(slant)
    # Pillow wants the way back: from a pixel of the result to its place in the source.
    a, b = cos / factor, (sin + cos * tan) / factor
    c, d = -sin / factor, (cos - sin * tan) / factor
    x, y = width / 2, height / 2
    matrix = (a, b, x - a * (x + dx) - b * (y + dy), c, d, y - c * (x + dx) - d * (y + dy))
    fill = (0, 0, 0, 0) if pixels.shape[2] == 4 else _border_color(pixels)
    image = Image.fromarray(np.ascontiguousarray(pixels))
    turned = image.transform(
        (width, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=fill
    )
    return np.asarray(turned)


def _border_color(pixels: np.ndarray) -> tuple[int, int, int]:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = border.mean(axis=0).round().astype(int).tolist()
    return red, green, blue


def random_background(
    rgba: np.ndarray,
    rng: np.random.Generator,
    probability: float = 1.0,
    usual: tuple[int, int, int] = (255, 255, 255),
) -> np.ndarray:
    """Lay uint8 [h, w, 4] over one colour, random with the given probability, else the usual one."""
    color = rng.integers(0, 256, 3) if probability and rng.random() < probability else np.asarray(usual)
    return images.composite(rgba, color)


def color_jitter(
    pixels: np.ndarray,
    rng: np.random.Generator,
    jitter: float | tuple[float, float, float, float] = 0.4,
    grayscale: float = 0.0,
) -> np.ndarray:
    """Random brightness, contrast, saturation and hue, then perhaps grey: one linear map of colours.

    Factors are uniform in 1 +- strength (hue: +- strength of a full turn). Everything is applied in floating
    point and cut to 0..255 once, at the end.
    """
    strengths = (jitter, jitter, jitter, jitter / 4) if isinstance(jitter, (int, float)) else jitter
    brightness, contrast, saturation, turn = rng.uniform(-1, 1, 4) * strengths
    matrix = _hue(turn) @ _saturation(1.0 + saturation) * ((1.0 + brightness) * (1.0 + contrast))
    if grayscale and rng.random() < grayscale:
        matrix = _saturation(0.0) @ matrix
    image = Image.fromarray(np.ascontiguousarray(pixels))
    # Contrast pulls towards the mean grey of the brightened image.
    grey = float(_LUMA @ image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))) * (1.0 + brightness)
    rows = [(*row, -contrast * grey) for row in matrix.tolist()]
    return np.asarray(image.convert("RGB", rows[0] + rows[1] + rows[2]))


def _saturation(factor: float) -> np.ndarray:
    return factor * np.eye(3) + (1.0 - factor) * _LUMA[None, :]


def _hue(turn: float) -> np.ndarray:
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    return _FROM_YIQ @ np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]]) @ _TO_YIQ


def gaussian_blur(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur with sigma 0.1 to 2 pixels at a side of 224, in proportion at others (SimCLR's range)."""
    sigma = rng.uniform(0.1, 2.0) * min(pixels.shape[:2]) / 224
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if sigma > 0.8:
        return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma)))
    # A narrow bell fits in 3 x 3, which is five times as fast; the outermost row of pixels stays as it is.
    side = math.exp(-0.5 / sigma**2)
    weights = [side * side, side, side * side, side, 1.0, side, side * side, side, side * side]
    return np.asarray(image.filter(ImageFilter.Kernel((3, 3), weights)))


def sharpen(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Add 0.3 to 2 times the difference to a 3 x 3 smoothing."""
    amount = rng.uniform(0.3, 2.0)
    kernel = [-amount / 13 * weight for weight in (1, 1, 1, 1, 5, 1, 1, 1, 1)]
    kernel[4] += 1.0 + amount
    mask = ImageFilter.Kernel((3, 3), kernel, scale=1.0)
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).filter(mask))


def gaussian_noise(pixels: np.ndarray, rng: np.random.Generator, largest: float) -> np.ndarray:
    """Independent noise on every value, its standard deviation uniform in 0..largest levels."""
    noise = rng.standard_normal(pixels.shape, np.float32)
    noise *= np.float32(rng.uniform(0, largest))
    noise += pixels
    noise += np.float32(0.5)
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def random_erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cover a rectangle of 2 to 20 % of the area with one random colour (Zhong et al. 2020)."""
    height, width = pixels.shape[:2]
    area, shape = (
        height * width * rng.uniform(0.02, 0.2),
        math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3))),
    )
    h = min(height, max(1, round(math.sqrt(area / shape))))
    w = min(width, max(1, round(math.sqrt(area * shape))))
    y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    out = pixels.copy()
    out[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return out
