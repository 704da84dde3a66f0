"""Training transforms: pure, in range, and doing what their names say."""

import math
import time

import numpy as np
import pytest
from helpers import picture
from PIL import Image

from vlmjax.data import augment, images
from vlmjax.errors import RecipeError

EVERYTHING = {
    "crop_scale": (0.4, 1.0), "crop_ratio": (0.7, 1.4), "flip": 0.5, "rotate": 15, "translate": 0.1, "shear": 5,
    "zoom": (0.9, 1.2), "background": 0.5, "jitter": 0.4, "grayscale": 0.2, "blur": 0.5, "sharpen": 0.5, "noise": 6,
    "erase": 0.5,
}  # fmt: skip


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("shape", [(40, 48), (1, 1), (3, 200), (90, 17)])
def test_everything_at_once_is_pure(shape, channels):
    pixels = picture(1, *shape, channels)
    before = pixels.copy()
    transform = augment.TrainTransform((32, 24), EVERYTHING)
    outs = [transform(pixels, _rng(seed)) for seed in range(20)]
    for seed, out in enumerate(outs):
        assert out.shape == (32, 24, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
        np.testing.assert_array_equal(out, transform(pixels, _rng(seed)))
    np.testing.assert_array_equal(pixels, before)
    assert len({out.tobytes() for out in outs}) > 15


def test_names_and_values_are_checked():
    with pytest.raises(RecipeError, match="'croop_scale' is unknown; did you mean 'crop_scale'"):
        augment.TrainTransform(32, {"croop_scale": (0.5, 1.0)})
    with pytest.raises(RecipeError, match="known: crop_scale"):
        augment.TrainTransform(32, {"zzz": 1})
    for wrong in (
        {"flip": 2}, {"flip": "yes"}, {"flip": True}, {"crop_scale": 0.5}, {"crop_scale": (1.0, 0.5)}, {"rotate": 400},
        {"crop_scale": (0.0, 1.0)}, {"jitter": (0.1, 0.1)}, {"jitter": (0.1, 0.1, 0.1, 3.0)}, {"zoom": None},
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=next(iter(wrong))):
            augment.TrainTransform(32, wrong)
    config_dict = pytest.importorskip("ml_collections").ConfigDict({"crop_scale": (0.5, 1.0), "flip": 1})
    assert augment.Augmentation.from_recipe(config_dict).crop_scale == (0.5, 1.0)


def test_whole_crop_is_plain_resize():
    pixels = picture(2, 60, 60)
    out = augment.random_resized_crop(pixels, _rng(), (24, 24), (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(out, Image.fromarray(pixels).resize((24, 24), Image.Resampling.BICUBIC))


def test_crops_have_the_stated_areas_and_ratios():
    """Colours tell where a crop was: red is the column, green the row."""
    rows, columns = np.mgrid[0:200, 0:200]
    pixels = np.stack([columns, rows, rows * 0], -1).astype(np.uint8)
    areas, ratios = [], []
    for seed in range(300):
        out = augment.random_resized_crop(pixels, _rng(seed), (50, 50), (0.3, 0.8), (0.5, 2.0)).astype(float)
        width, height = np.ptp(out[25, :, 0]) / 0.98, np.ptp(out[:, 25, 1]) / 0.98
        areas.append(width * height / 200**2)
        ratios.append(width / height)
    assert 0.27 < min(areas) < 0.34 and 0.75 < max(areas) < 0.84
    assert 0.45 < min(ratios) < 0.6 and 1.7 < max(ratios) < 2.2
    assert abs(np.mean(np.log(ratios))) < 0.06


def test_boxes_are_those_of_the_plain_rule():
    """Boxes and what is drawn after them stay what `Generator.uniform` gives: a run goes on with the crops it had."""

    def plain(shape, rng, scale, ratio):
        height, width = shape
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                y, x = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
                return x, y, x + w, y + h
        return None

    none = 0
    for seed in range(600):
        left, right = _rng(seed), _rng(seed)
        shape = ((375, 500), (500, 333), (64, 64), (90, 700))[seed % 4]
        scale, ratio = (((0.9, 1.0), (3 / 4, 4 / 3)), ((0.08, 1.0), (0.5, 2.0)))[seed // 4 % 2]
        box, expected = augment.random_box(shape, left, scale, ratio), plain(shape, right, scale, ratio)
        none += expected is None
        assert expected in (None, box) and left.random() == right.random()
    assert 0 < none < 300


def test_affine_turns_the_right_way_and_fills_with_the_border():
    pixels = np.full((41, 41, 3), 200, np.uint8)
    pixels[5:9, 18:23] = 0
    for seed in range(20):
        turned = augment.random_affine(pixels, _rng(seed), rotate=90.0)
        assert abs(int(turned.max()) - 200) <= 1
        assert np.abs(turned[[0, 0, -1, -1], [0, -1, 0, -1]].astype(int) - 200).max() <= 1
        ys, xs = np.nonzero(turned[..., 0] < 100)
        angle = _rng(seed).uniform(-1, 1, 2)[0] * 90
        expected = np.array([np.sin(np.radians(angle)), -np.cos(np.radians(angle))]) * 13.5
        got = np.array([xs.mean() - 20, ys.mean() - 20])
        assert min(np.abs(got - expected).max(), np.abs(got - expected * [-1, 1]).max()) < 1.0
    clear = augment.random_affine(picture(0, 40, 40, 4), _rng(5), rotate=45.0)
    assert abs(_rng(5).uniform(-1, 1)) > 0.5 and (clear[0, 0] == 0).all()


def test_affine_shift_and_zoom():
    pixels = np.zeros((41, 41, 3), np.uint8)
    pixels[20, 20] = 255
    moved = augment.random_affine(pixels, _rng(0), translate=0.2)
    ys, xs = np.nonzero(moved[..., 0] > 20)
    assert abs(ys.mean() - 20) < 9 and abs(xs.mean() - 20) < 9 and (ys.mean(), xs.mean()) != (20, 20)
    block = np.zeros((41, 41, 3), np.uint8)
    block[15:26, 15:26] = 255
    bigger = augment.random_affine(block, _rng(0), zoom=(2.0, 2.0))
    assert abs((bigger[20, :, 0] > 127).sum() - 22) <= 1


def test_background_is_random_where_asked():
    rgba = np.zeros((8, 8, 4), np.uint8)
    usual = [augment.random_background(rgba, _rng(s), 0.0, (1, 2, 3))[0, 0].tolist() for s in range(5)]
    assert usual == [[1, 2, 3]] * 5
    colors = {tuple(augment.random_background(rgba, _rng(s), 0.5)[0, 0].tolist()) for s in range(200)}
    share = np.mean([augment.random_background(rgba, _rng(s), 0.5)[0, 0].min() == 255 for s in range(200)])
    assert len(colors) > 60 and 0.38 < share < 0.62
    assert (
        augment.TrainTransform(8, {"background": 0.5}).needs_alpha
        and not augment.TrainTransform(8).needs_alpha
    )


def test_color_jitter_is_the_stated_map():
    pixels = picture(3).astype(np.uint8) // 2 + 64  # nothing is cut at 0 or 255
    luma = np.array([0.299, 0.587, 0.114])
    for seed in range(5):
        out = augment.color_jitter(pixels, _rng(seed), (0.1, 0.1, 0.1, 0.0))
        b, c, s, _ = _rng(seed).uniform(-1, 1, 4) * 0.1 + 1
        x = pixels * b
        x = (x - (x @ luma).mean()) * c + (x @ luma).mean()
        x = x * s + (x @ luma)[..., None] * (1 - s)
        assert np.abs(out - x).max() < 1.2
    assert np.abs(augment.color_jitter(pixels, _rng(0), 0.0).astype(int) - pixels).max() <= 1


def test_hue_keeps_brightness_and_greys():
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, 2)
    assert np.abs(augment.color_jitter(grey, _rng(0), (0.0, 0.0, 0.0, 0.5)).astype(int) - grey).max() <= 1
    red = np.full((4, 4, 3), (150, 100, 100), np.uint8)
    out = augment.color_jitter(red, _rng(3), (0.0, 0.0, 0.0, 0.5))
    assert (
        abs(out[0, 0] @ [0.299, 0.587, 0.114] - 114.95) < 1.5
        and np.abs(out[0, 0] - [150, 100, 100.0]).max() > 5
    )
    colorless = augment.color_jitter(picture(1), _rng(0), 0.0, grayscale=1.0).astype(int)
    assert np.ptp(colorless, axis=2).max() <= 1


def test_blur_sharpen_noise_erase():
    pixels = picture(4, 64, 64)
    edge = np.zeros((64, 64, 3), np.uint8)
    edge[:, 32:] = 200
    wide = np.repeat(np.repeat(edge, 6, 0), 6, 1)
    for sharp, steepest in ((edge, 190), (wide, 80)):  # sigma 0.5 and 3
        soft = augment.gaussian_blur(sharp, _rng(5)).astype(int)[1:-1]
        assert 20 < np.abs(np.diff(soft, axis=1)).max() < steepest and abs(soft.mean() - sharp.mean()) < 2
    assert (
        augment.sharpen(edge, _rng(0))[5, 32, 0] > 200 and (augment.sharpen(edge, _rng(0))[:, :30] == 0).all()
    )
    noisy = augment.gaussian_noise(np.full((64, 64, 3), 128, np.uint8), _rng(1), 10.0).astype(float)
    deviation = _rng(1)
    deviation.standard_normal((64, 64, 3), np.float32)
    assert abs(noisy.std() - deviation.uniform(0, 10)) < 0.3 and abs(noisy.mean() - 128) < 0.3
    changed = (augment.random_erase(pixels, _rng(0)) != pixels).any(-1).mean()
    assert 0.01 < changed < 0.22


def test_transforms_are_fast_at_64_pixels():
    """At most 0.3 ms each on a quiet core; the bound here allows for a busy one."""
    pixels = picture(0, 72, 72)
    for function in (
        lambda rng: augment.random_resized_crop(pixels, rng, (64, 64), (0.5, 1.0)),
        lambda rng: augment.random_affine(pixels, rng, 10.0, 0.1),
        lambda rng: augment.color_jitter(pixels, rng),
        lambda rng: augment.gaussian_blur(pixels, rng),
        lambda rng: augment.sharpen(pixels, rng),
        lambda rng: augment.gaussian_noise(pixels, rng, 5.0),
        lambda rng: augment.random_erase(pixels, rng),
        lambda rng: images.composite(picture(0, 72, 72, 4), (1, 2, 3)),
    ):
        rng, best = _rng(), 1.0
        for _ in range(5):
            start = time.thread_time()
            for _ in range(10):
                function(rng)
            best = min(best, (time.thread_time() - start) / 10)
        assert best < 0.002
