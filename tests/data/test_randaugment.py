"""Random policies: each operation against slow numpy, the draws, and the strings of recipes."""

import numpy as np
import pytest
from helpers import picture

from vlmjax.data import augment
from vlmjax.data.pictures import randaugment
from vlmjax.data.pictures.randaugment import POLICIES, parse
from vlmjax.errors import RecipeError

LUMA = np.array([0.299, 0.587, 0.114])


def apply(policy: str, name: str, pixels: np.ndarray, level: float) -> np.ndarray:
    from PIL import Image

    return np.asarray(POLICIES[policy][0][name](Image.fromarray(pixels), level))


def grainy(seed: int = 0, height: int = 41, width: int = 56) -> np.ndarray:
    grain = np.random.default_rng(seed).normal(0, 12, (height, width, 3))
    return np.clip(picture(seed, height, width) * 0.7 + 30 + grain, 0, 255).astype(np.uint8)


def sampled(pixels: np.ndarray, inverse) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear values of the places that `inverse(x, y)` gives for each pixel, pixel centres whole numbers.

    Second: which pixels lie wholly inside, and which wholly outside (1, -1, else 0).
    """
    height, width = pixels.shape[:2]
    out, where = np.zeros(pixels.shape), np.zeros((height, width), int)
    for v in range(height):
        for u in range(width):
            x, y = inverse(u, v)
            if 0 <= x <= width - 1 and 0 <= y <= height - 1:
                i, j = min(int(y), height - 2), min(int(x), width - 2)
                a, b = y - i, x - j
                square = pixels[i : i + 2, j : j + 2].astype(float)
                out[v, u] = (1 - a) * ((1 - b) * square[0, 0] + b * square[0, 1])
                out[v, u] += a * ((1 - b) * square[1, 0] + b * square[1, 1])
                where[v, u] = 1
            elif not (-1 <= x <= width and -1 <= y <= height):
                where[v, u] = -1
    return out, where


def turn(angle: float, x0: float, y0: float):
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return lambda u, v: (
        x0 + cos * (u - x0) + sin * (v - y0),
        y0 - sin * (u - x0) + cos * (v - y0),
    )


def geometry(policy: str, name: str, level: float, height: int, width: int):
    """Where the value of pixel (u, v) comes from, pixel centres whole numbers."""
    x, y, slant = (width - 1) / 2, (height - 1) / 2, 0.3 * level
    if policy == "blip":  # OpenCV's matrices, which lead from source to result, turned round
        return {
            "ShearX": lambda u, v: (u - slant * v, v), "ShearY": lambda u, v: (u, v - slant * u),
            "TranslateX": lambda u, v: (u + 10 * level, v), "TranslateY": lambda u, v: (u, v + 10 * level),
            "Rotate": turn(30 * level, width / 2, height / 2),
        }[name]  # fmt: skip
    return {
        "ShearX": lambda u, v: (u + slant * (v - y), v), "ShearY": lambda u, v: (u, v + slant * (u - x)),
        "TranslateX": lambda u, v: (u + 150 / 331 * level * width, v),
        "TranslateY": lambda u, v: (u, v + 150 / 331 * level * height), "Rotate": turn(30 * level, x, y),
    }[name]  # fmt: skip


@pytest.mark.parametrize("policy", ["randaugment", "blip"])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_geometry(policy, name):
    pixels = grainy(1)
    for level in (0.5, -0.5, 0.9, -1.0):
        out = apply(policy, name, pixels, level)
        expected, where = sampled(pixels, geometry(policy, name, level, *pixels.shape[:2]))
        assert (where == 1).mean() > 0.3
        assert np.abs(out - expected)[where == 1].max() <= 1.01
        assert (out[where == -1] == 128).all()


def blend(pixels, other, factor):
    return np.clip(other + factor * (pixels.astype(float) - other), 0, 255)


def smooth(pixels):
    """3 x 3 with a heavy middle; the outermost pixels stay."""
    out, kernel = pixels.astype(float), np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    for i in range(1, pixels.shape[0] - 1):
        for j in range(1, pixels.shape[1] - 1):
            out[i, j] = np.einsum("ab,abc->c", kernel, pixels[i - 1 : i + 2, j - 1 : j + 2].astype(float))
    return np.floor(out + 0.5)


@pytest.mark.parametrize("level", [0.9, -0.9, 0.3, 0.0, 1.5, -1.5])
def test_enhancements(level):
    pixels, factor = grainy(2), max(0.0, 1 + 0.9 * level)
    grey = np.floor(pixels @ LUMA + 0.5)[..., None]
    for name, other in {
        "Color": grey, "Contrast": np.floor(grey.mean() + 0.5), "Brightness": 0.0, "Sharpness": smooth(pixels),
    }.items():  # fmt: skip
        out = apply("randaugment", name, pixels, level)
        assert np.abs(out - blend(pixels, other, factor)).max() <= 2.5, name
    for name, other in {"Brightness": 0.0, "Sharpness": smooth(pixels)}.items():
        out = apply("blip", name, pixels, level)
        assert np.abs(out - blend(pixels, other, 0.1 + 1.8 * abs(level))).max() <= 2.5, name


def test_blips_magnitude_of_five_leaves_brightness_and_sharpness_alone():
    for name in ("Brightness", "Sharpness"):
        np.testing.assert_array_equal(apply("blip", name, grainy(), 0.5), grainy())


@pytest.mark.parametrize("policy", ["randaugment", "blip"])
def test_histogram_operations(policy):
    pixels = grainy(3)
    np.testing.assert_array_equal(apply(policy, "Identity", pixels, 0.7), pixels)
    stretched, even = np.zeros_like(pixels), np.zeros_like(pixels)
    for c in range(3):
        values = pixels[..., c]
        low, high = float(values.min()), float(values.max())
        stretched[..., c] = np.clip((values - low) * (255 / (high - low)) + 1e-9, 0, 255)
        counts = [int((values == v).sum()) for v in range(256)]
        step = (sum(counts) - [n for n in counts if n][-1]) // 255
        even[..., c] = np.array([min(255, (step // 2 + sum(counts[:v])) // step) for v in range(256)])[values]
    assert np.abs(apply(policy, "AutoContrast", pixels, 0.7).astype(int) - stretched).max() <= 1
    np.testing.assert_array_equal(apply(policy, "Equalize", pixels, 0.7), even)
    flat = np.full((9, 9, 3), 77, np.uint8)
    for name in ("AutoContrast", "Equalize"):
        np.testing.assert_array_equal(apply(policy, name, flat, 0.7), flat)


def test_solarize_and_posterize():
    pixels = grainy(4)
    for level, threshold, bits in ((0.0, 256, 8), (0.25, 192, 7), (0.5, 128, 6), (-1.0, 0, 4), (3.0, 0, 1)):
        inverted = np.where(pixels < threshold, pixels, 255 - pixels)
        np.testing.assert_array_equal(apply("randaugment", "Solarize", pixels, level), inverted)
        cut = pixels // 2 ** (8 - bits) * 2 ** (8 - bits)
        np.testing.assert_array_equal(apply("randaugment", "Posterize", pixels, level), cut)


def test_policies_hold_the_operations_of_their_papers():
    assert len(POLICIES["randaugment"][0]) == 14 and POLICIES["randaugment"][1] == 1.0
    blip = "Identity AutoContrast Brightness Sharpness Equalize ShearX ShearY TranslateX TranslateY Rotate"
    assert list(POLICIES["blip"][0]) == blip.split() and POLICIES["blip"][1] == 0.5


def test_draws(monkeypatch):
    """N draws with replacement, each operation as often as another, applied with the stated probability."""
    seen = []
    for policy, (operations, probability) in POLICIES.items():
        logged = {
            name: lambda image, level, name=name: seen.append((name, level)) or image for name in operations
        }
        monkeypatch.setitem(POLICIES, policy, (logged, probability))
        seen.clear()
        rng, pixels = np.random.default_rng(0), np.zeros((2, 2, 3), np.uint8)
        for _ in range(3000):
            parse(f"{policy}(3, 4)")(pixels, rng)
        assert abs(len(seen) - 9000 * probability) < 200
        for name in operations:
            share = sum(each == name for each, _ in seen) / len(seen)
            assert abs(share - 1 / len(operations)) < 0.02
        assert {abs(level) for _, level in seen} == {0.4}
        assert abs(sum(level > 0 for _, level in seen) / len(seen) - 0.5) < 0.03


@pytest.mark.parametrize("text", ["randaugment(2, 9)", "blip(2, 5)", "randaugment(5, 30)"])
@pytest.mark.parametrize("shape", [(32, 40), (1, 1), (3, 90)])
def test_policies_are_pure(text, shape):
    pixels, policy = grainy(5, *shape), parse(text)
    before = pixels.copy()
    outs = [policy(pixels, np.random.default_rng(seed)) for seed in range(30)]
    for seed, out in enumerate(outs):
        assert out.shape == pixels.shape and out.dtype == np.uint8
        np.testing.assert_array_equal(out, policy(pixels, np.random.default_rng(seed)))
    np.testing.assert_array_equal(pixels, before)
    assert len({out.tobytes() for out in outs}) > (1 if shape == (1, 1) else 8)
    mirrored = policy(pixels[:, ::-1], np.random.default_rng(0))
    np.testing.assert_array_equal(
        mirrored, policy(np.ascontiguousarray(pixels[:, ::-1]), np.random.default_rng(0))
    )


def test_strings():
    assert parse("") is None and parse("  ") is None
    for text in ("randaugment(2, 9)", " randaugment( 2 ,9 ) ", "randaugment(2,9.0)"):
        assert (
            parse(text) == randaugment.Policy("randaugment", 2, 9.0)
            and str(parse(text)) == "randaugment(2, 9)"
        )
    assert str(parse("blip(1, 7.5)")) == "blip(1, 7.5)" and parse(str(parse("blip(1, 7.5)"))) == parse(
        "blip(1, 7.5)"
    )
    for text, words in {
        "randaugment": "not of the form", "randaugment(2)": "not of the form", "randaugment(2, 9": "not of the form",
        "randaugment(2, 9) x": "not of the form", "randaugment(-2, 9)": "not of the form", "(2, 9)": "not of the form",
        "randaugment(2.5, 9)": "not of the form", "randaugment(2, 1e3)": "not of the form",
        "randaugmnet(2, 9)": "did you mean 'randaugment'", "zzz(2, 9)": "known: randaugment, blip",
        "randaugment(0, 9)": "count must be 1 to 20", "randaugment(21, 9)": "count must be 1 to 20",
        "blip(2, 30.5)": "magnitude must be 0 to 30",
    }.items():  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            parse(text)
    for wrong in (3, None, ("randaugment", 2, 9), True):
        with pytest.raises(RecipeError, match="policy=.* must be a string"):
            augment.Augmentation.from_recipe({"policy": wrong})


def test_as_a_setting_of_the_training_transform():
    recipe = augment.Augmentation.from_recipe({"policy": "randaugment(2,9)", "flip": 0.5})
    assert recipe.policy == "randaugment(2, 9)"
    pixels = grainy(6, 60, 60)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0)}
    with_policy = augment.TrainTransform(60, {**whole, "policy": "randaugment(2, 9)"})
    without = augment.TrainTransform(60, whole)
    changed = 0
    for seed in range(20):
        rng, other = np.random.default_rng(seed), np.random.default_rng(seed)
        expected = parse("randaugment(2, 9)")(without(pixels, rng), rng)
        out = with_policy(pixels, other)
        np.testing.assert_array_equal(out, expected)
        changed += (out != pixels).any()
    assert changed > 15
    rgba = picture(0, 50, 50, 4)
    assert augment.TrainTransform(24, {"policy": "blip(2, 5)", "background": 1.0})(rgba, rng).shape == (
        24,
        24,
        3,
    )
