"""Decoding of every kind of file, and evaluation preprocessing against transformers."""

import csv
import io
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image

from vlmjax.data import images
from vlmjax.errors import BadRecord, DataError


def _save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _reason(data: bytes, **options) -> str:
    with pytest.raises(BadRecord) as caught:
        images.decode(data, **options)
    return caught.value.reason


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG", "JPEG2000", "PPM"])
def test_formats(kind):
    pixels = picture(0)
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    out = images.decode(encoded(pixels, kind, **options))
    assert out.dtype == np.uint8 and out.shape == pixels.shape and out.flags.c_contiguous
    tolerance = {"GIF": 40, "JPEG": 4}.get(kind, 0)
    assert np.abs(out.astype(int) - pixels).max() <= tolerance


def test_grey_palette_and_one_bit():
    pixels = picture(1)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    np.testing.assert_array_equal(images.decode(encoded(grey)), np.repeat(grey[..., None], 3, 2))
    palette = Image.fromarray(pixels).quantize(16)
    np.testing.assert_array_equal(images.decode(_save(palette)), np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(images.decode(_save(bits))[..., 0], np.asarray(bits) * np.uint8(255))


def test_cmyk():
    cmyk = Image.fromarray(picture(2)).convert("CMYK")
    out = images.decode(_save(cmyk, "JPEG", quality=100))
    assert np.abs(out.astype(int) - np.asarray(cmyk.convert("RGB"))).mean() < 3


def test_sixteen_bits_and_floats():
    ramp = np.linspace(0, 65535, 48 * 40).reshape(40, 48)
    expected = np.rint(ramp.astype(np.uint16) / 257.0)
    for kind in ("PNG", "TIFF"):
        out = images.decode(_save(Image.fromarray(ramp.astype(np.uint16)), kind))
        np.testing.assert_array_equal(out[..., 0], expected)
    as_int = images.decode(_save(Image.fromarray(ramp.astype(np.int32)), "TIFF"))
    np.testing.assert_array_equal(as_int[..., 1], expected)
    unit = images.decode(_save(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"))
    np.testing.assert_allclose(unit[..., 2], ramp / 257, atol=0.51)
    bytes_in_16 = np.arange(256, dtype=np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(images.decode(_save(Image.fromarray(bytes_in_16)))[..., 0], bytes_in_16)


def test_alpha_over_a_background():
    rgba = picture(3, channels=4)
    data = encoded(rgba)
    alpha = rgba[..., 3:] / 255.0
    for color in ((255, 255, 255), (10, 200, 30)):
        expected = np.floor(rgba[..., :3] * alpha + np.array(color) * (1 - alpha) + 0.5)
        assert np.abs(images.decode(data, background=color) - expected).max() <= 1e-9
        np.testing.assert_array_equal(
            images.decode(rgba, background=color), images.decode(data, background=color)
        )
    np.testing.assert_array_equal(images.decode(data, keep_alpha=True), rgba)
    opaque = rgba.copy()
    opaque[..., 3] = 255
    assert images.decode(encoded(opaque), keep_alpha=True).shape[2] == 3
    la = Image.fromarray(rgba).convert("LA")
    np.testing.assert_array_equal(
        images.decode(_save(la)), images.composite(np.asarray(la.convert("RGBA")), (255,) * 3)
    )


def test_transparent_colours():
    palette = Image.fromarray(picture(4)).quantize(8)
    data = _save(palette, transparency=0)
    clear = np.asarray(palette) == 0
    assert clear.any()
    out = images.decode(data, background=(1, 2, 3))
    np.testing.assert_array_equal(out[clear], np.broadcast_to([1, 2, 3], (clear.sum(), 3)))
    np.testing.assert_array_equal(out[~clear], np.asarray(palette.convert("RGB"))[~clear])
    rgb = np.full((4, 4, 3), 7, np.uint8)
    assert images.decode(_save(Image.fromarray(rgb), transparency=(7, 7, 7))).min() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(orientation, kind):
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    # How the camera stored it, so that turning by the tag gives `upright` back.
    turns = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    stored = np.ascontiguousarray(turns[orientation](upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = (
        {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    )
    out = images.decode(_save(Image.fromarray(stored), kind, exif=exif, **options))
    assert out.shape == upright.shape and np.abs(out.astype(int) - upright).max() < 12


def test_damaged_records_have_stable_reasons():
    jpeg, png = encoded(picture(0, 200, 200), "JPEG"), encoded(picture(0))
    assert _reason(b"") == "empty"
    assert _reason(b"<!DOCTYPE html><html>") == "not_an_image"
    assert _reason(jpeg[: len(jpeg) // 2]) == "truncated"
    assert _reason(png[: len(png) // 2]) == "truncated"
    assert _reason(jpeg[:20]) in ("truncated", "not_an_image")
    assert _reason(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n") == "not_an_image"
    assert _reason(np.zeros((4, 4), np.uint8)) == "undecodable"
    assert _reason(np.zeros((4, 4, 3), np.float32)) == "undecodable"


def _png_header(width: int, height: int) -> bytes:
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + part(b"IDAT", zlib.compress(b"\0" * 1000)) + part(b"IEND", b"")


def test_bombs_cost_no_memory():
    tracemalloc.start()
    assert _reason(_png_header(16_000, 16_000)) == "bomb"
    assert _reason(_png_header(2**30, 2**30)) == "bomb"
    assert _reason(encoded(picture(0, 40, 48)), max_pixels=40 * 48 - 1) == "bomb"
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_huge_jpegs_come_smaller():
    pixels = picture(0, 400, 640)
    data = encoded(pixels, "JPEG", quality=95)
    assert images.decode(data, max_pixels=400 * 640).shape == (400, 640, 3)
    half = images.decode(data, max_pixels=400 * 640 - 1)
    assert half.shape == (200, 320, 3)
    assert np.abs(half.astype(int) - images.resize(pixels, (200, 320))).mean() < 3
    assert images.decode(data, max_pixels=400 * 640 // 5).shape == (100, 160, 3)
    assert _reason(data, max_pixels=400 * 640 // 17) == "bomb"
    assert _reason(encoded(pixels, "JPEG", progressive=True), max_pixels=400 * 640 - 1) == "bomb"


def test_animations_give_their_first_frame():
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = _save(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(images.decode(data).astype(int) - 10).max() <= 2


def test_reference_oddities(shared_path):
    """Every file decodes where Pillow can, and is refused for a stable reason where it cannot."""
    folder = shared_path("data/weird_images")
    refused, plain = {}, ("sharp_big-height.webp", "sharp_giant-image.jpg")  # one colour all over
    with open(folder / "index.tsv", encoding="utf-8") as table:
        rows = list(csv.DictReader(table, delimiter="\t"))
    for row in rows:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                out = images.decode((folder / row["file"]).read_bytes(), max_pixels=2 * 10**7)
        except BadRecord as error:
            refused[row["file"]] = error.reason
            continue
        assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] == 3, row["file"]
        width, height = map(int, row["size"].split("x"))
        if out.size < 10**7:
            assert {out.shape[0], out.shape[1]} == {width, height}, row["file"]
        assert out.size < 10 or out.std() > 1 or row["file"] in plain, row["file"]
    assert refused == {
        "pillow_broken.png": "not_an_image",
        "pillow_broken_data_stream.png": "undecodable",
        "pillow_seek_too_large.tif": "undecodable",
        "sharp_truncated.jpg": "truncated",
        "sharp_truncated.png": "truncated",
        "sharp_vfile.v": "not_an_image",
    }


def test_reference_orientations(shared_path):
    """The same photograph stored in all ways comes out the same."""
    folder = shared_path("data/weird_images")
    first = images.decode((folder / "sharp_Landscape_3.jpg").read_bytes())
    for tag in (5, 6, 8):
        other = images.decode((folder / f"sharp_Landscape_{tag}.jpg").read_bytes())
        assert other.shape == first.shape
        assert np.abs(other.astype(int) - first).mean() < 4


SHAPES = [
    (300, 400),
    (400, 300),
    (224, 224),
    (37, 53),
    (1, 1),
    (1, 90),
    (700, 3),
    (223, 225),
    (640, 481),
    (2, 2),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings", ["clip", "small", "crop_larger", "square", "no_crop", "lanczos", "padded"]
)
def test_eval_transform_equals_transformers(shape, settings):
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    assert transformers
    transform = {
        "clip": images.EvalTransform(),
        "small": images.EvalTransform(33, (33, 33), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)),
        "crop_larger": images.EvalTransform(32, (40, 64)),
        "square": images.EvalTransform((30, 50), None),
        "no_crop": images.EvalTransform(20, None),
        "lanczos": images.EvalTransform(48, (31, 45), resample=1),
        "padded": images.EvalTransform(28, (28, 28), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), pad=True),
    }[settings]
    pixels = picture(5, *shape)
    config = transform.to_hf()
    processor = LlavaImageProcessorPil if transform.pad else CLIPImageProcessorPil
    hf = processor(**{k: v for k, v in config.items() if k != "image_processor_type"})
    expected = hf(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    out = transform(pixels)
    assert out.dtype == np.uint8 and transform.output_size in (None, out.shape[:2])
    level = 1 / 255 / np.array(transform.std)
    difference = np.abs(transform.normalize(out) - expected) / level[None, None, :]
    assert difference.shape == expected.shape and difference.max() <= 1.001
    assert difference.mean() < 0.02, "equal nearly everywhere"


def test_long_thin_images_stay_small():
    strip = np.full((1, 60_000, 3), 9, np.uint8)
    tracemalloc.start()
    out = images.EvalTransform()(strip)
    assert out.shape == (224, 224, 3) and (out == 9).all()
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_preprocessor_config_both_ways():
    for transform in (
        images.EvalTransform(),
        images.EvalTransform((64, 48), None),
        images.EvalTransform(40, (32, 36)),
        images.EvalTransform(40, (40, 40), pad=True),
    ):
        assert images.EvalTransform.from_hf(transform.to_hf()) == transform
    old = {"size": 224, "crop_size": 224, "do_normalize": True, "resample": 3}
    assert images.EvalTransform.from_hf(old) == images.EvalTransform()
    plain = images.EvalTransform.from_hf(
        {"size": {"height": 16, "width": 16}, "do_center_crop": False, "do_normalize": False}
    )
    assert plain.output_size == (16, 16) and plain.std == (1.0, 1.0, 1.0)
    with pytest.raises(DataError, match="longest_edge"):
        images.EvalTransform.from_hf({"size": {"longest_edge": 3}})
    with pytest.raises(DataError, match="only LlavaImageProcessor's"):
        images.EvalTransform.from_hf({"do_pad": True, "image_processor_type": "Idefics2ImageProcessor"})
    with pytest.raises(DataError, match="do_resize"):
        images.EvalTransform.from_hf({"do_resize": False})


def test_shrink():
    assert images.shrink(picture(0, 40, 80), 20).shape == (20, 40, 3)
    assert images.shrink(picture(0, 40, 80), 41).shape == (40, 80, 3)
    assert images.shrink(picture(0, 3, 900), 1).shape == (1, 300, 3)


def test_squares():
    wide = picture(1, 5, 9)
    out = images.squared(wide, (0.5, 0.25, 1.0))
    assert out.shape == (9, 9, 3) and (out[2:7] == wide).all()
    assert (out[:2] == (127, 63, 255)).all() and (out[7:] == (127, 63, 255)).all()
    tall = np.dstack([picture(2, 8, 3), np.full((8, 3), 7, np.uint8)])
    out = images.squared(tall, (0.0, 0.0, 0.0))
    assert out.shape == (8, 8, 4) and (out[:, 2:5] == tall).all() and (out[:, :2] == (0, 0, 0, 255)).all()
    assert images.squared(out, (0.0, 0.0, 0.0)) is out
    with pytest.raises(BadRecord, match="too_long"):
        images.squared(np.zeros((1, 60_000, 3), np.uint8), (0.0, 0.0, 0.0))
