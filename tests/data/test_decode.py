"""The fast JPEG decoder against Pillow, its fallback, and decoding at a share of the size."""

import io
import threading
import tracemalloc

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image

from vlmjax.data import augment, images
from vlmjax.data.pictures import decode, jpeg
from vlmjax.errors import BadRecord, DataError


def pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with some grain."""
    grain = np.random.default_rng(seed).normal(0, 6, (height, width, 1))
    return np.clip(picture(seed, height, width) + grain, 0, 255).astype(np.uint8)


KINDS = [
    {}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"progressive": True}, {"optimize": True},
    {"restart_marker_rows": 1}, {"keep_rgb": True},
]  # fmt: skip


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(64, 80), (61, 83), (1, 1), (7, 200)])
def test_ordinary_jpegs_are_pillows_pixels(options, shape):
    data = encoded(textured(*shape), "JPEG", **options)
    assert isinstance(images.open_image(data), images.Jpeg)
    difference = np.abs(images.decode(data).astype(int) - pillow(data))
    assert difference.max() <= 2 and difference.mean() <= 0.01
    grey = encoded(textured(*shape)[..., 0], "JPEG", **{k: v for k, v in options.items() if k != "keep_rgb"})
    assert isinstance(images.open_image(grey), images.Jpeg)
    assert np.abs(images.decode(grey).astype(int) - pillow(grey)).max() <= 1


def test_the_fast_decoder_is_asked_and_the_variable_turns_it_off(monkeypatch):
    import simplejpeg

    data, calls = encoded(picture(0), "JPEG"), []
    real = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: calls.append(1) or real(*a, **k))
    images.decode(data)
    assert len(calls) == 1 and images.backend()["decode"].startswith("simplejpeg ")
    decode.decoder.cache_clear()
    monkeypatch.setenv("VLMJAX_DECODE", "pillow")
    assert isinstance(images.open_image(data), np.ndarray) and len(calls) == 1
    assert images.backend()["decode"] == f"pillow {Image.__version__}"
    decode.decoder.cache_clear()
    monkeypatch.setenv("VLMJAX_DECODE", "nvjpeg")
    with pytest.raises(DataError, match="VLMJAX_DECODE='nvjpeg' is not a decoder; known: simplejpeg, pillow"):
        images.decode(data)
    decode.decoder.cache_clear()


def test_slightly_damaged_jpegs_are_accepted_as_pillow_accepts_them():
    """Stray bytes before a marker make libjpeg warn; Pillow lets that pass."""
    import simplejpeg

    data = encoded(textured(90, 120), "JPEG")
    damaged = data[:-2] + b"\x5a" * 18 + data[-2:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(damaged)
    np.testing.assert_array_equal(images.decode(damaged), pillow(damaged))
    out, box = images.open_image(damaged).covering((0, 0, 120, 90), (10, 10))
    np.testing.assert_array_equal(out, pillow(damaged))
    assert box == (0, 0, 120, 90), "whole, though a quarter would have done"


def test_truncated_jpegs_are_refused_when_their_pixels_are_wanted():
    data = encoded(textured(90, 120), "JPEG")
    image = images.open_image(data[: len(data) // 2])
    for read in (image.pixels, lambda: image.covering((0, 0, 120, 90), (9, 9)), lambda: np.asarray(image)):
        with pytest.raises(BadRecord) as caught:
            read()
        assert caught.value.reason == "truncated"
    with pytest.raises(BadRecord):
        augment.TrainTransform(16)(image, np.random.default_rng(0))


def test_a_size_that_changes_behind_the_header_takes_no_memory():
    """A second frame header of another size must not get past the bound."""
    data = encoded(picture(0, 40, 48), "JPEG")
    start = data.index(b"\xff\xc0")
    length = int.from_bytes(data[start + 2 : start + 4], "big") + 2
    huge = bytearray(data[start : start + length])
    huge[5:9] = (60_000).to_bytes(2, "big") * 2
    for crafted in (
        data[:start] + bytes(huge) + data[start:],
        data[: start + length] + bytes(huge) + data[start + length :],
    ):
        tracemalloc.start()
        try:
            images.decode(crafted, max_pixels=10_000)
        except BadRecord as error:
            assert error.reason in ("bomb", "undecodable", "truncated", "not_an_image")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
        tracemalloc.stop()


def test_pixels_of_another_size_than_the_header_are_refused():
    data = encoded(textured(40, 48), "JPEG")
    for size in ((56, 40), (48, 48), (40, 40)):
        with pytest.raises(BadRecord, match="a header of"):
            images.Jpeg(data, size, 1, 10_000).pixels()
    assert images.Jpeg(data, (48, 40), 1, 10_000).pixels().shape == (40, 48, 3)


def test_headers_are_read_as_pillow_reads_them(shared_path):
    """Where the quick look gives a size it is Pillow's, and there is no turn to miss."""
    files = [path.read_bytes() for path in sorted(shared_path("data/weird_images").glob("*.jpg"))]
    files += [stored(textured(20, 30), turn) for turn in range(1, 9)]
    files += [encoded(textured(20, 30), "JPEG", **options) for options in KINDS]
    quick = 0
    for data in files:
        size = jpeg.plain_size(data)
        if size is not None:
            quick += 1
            image = decode._open(data, 1 << 40)[0]
            assert image.size == size and decode._orientation(image) == 1 and image.mode in ("RGB", "L")
    assert quick >= len(KINDS) + 4
    plain = encoded(textured(20, 30), "JPEG")
    for cut in range(0, plain.index(b"\xff\xda") + 2, 7):
        assert jpeg.plain_size(plain[:cut]) is None
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    turned = plain[:2] + b"\xff\xe1" + (len(xmp) + 2).to_bytes(2, "big") + xmp + plain[2:]
    assert jpeg.plain_size(turned) is None and images.open_image(turned).shape == (30, 20, 3)


def _with_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan is there again and again."""
    data = encoded(textured(side, side), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


@pytest.mark.parametrize("fast", [True, False])
def test_a_jpeg_of_hundreds_of_scans_is_refused_before_it_is_decoded(monkeypatch, fast):
    monkeypatch.setattr(decode, "decoder", lambda: "simplejpeg" if fast else "pillow")
    assert images.decode(_with_scans(100)).shape == (64, 64, 3)
    with pytest.raises(BadRecord, match="bomb: more than 100 scans of 64 x 64"):
        images.decode(_with_scans(101))
    with pytest.raises(BadRecord, match="bomb: more than 16 scans"):  # a large picture has fewer
        images.decode(_with_scans(17), max_pixels=64 * 64)


def test_scans_are_counted_where_decoders_read_them():
    plain, progressive = (encoded(textured(64, 64), "JPEG", progressive=p) for p in (False, True))
    assert jpeg.scans(plain, 100) == 1 and jpeg.scans(progressive, 100) == progressive.count(b"\xff\xda") > 5
    assert jpeg.scans(progressive + _with_scans(300), 100) == jpeg.scans(progressive, 100)  # behind the end
    hidden = (
        b"\xff\xe2" + (702).to_bytes(2, "big") + b"\xff\xda" * 350
    )  # in a segment of an application's own
    assert jpeg.scans(progressive[:2] + hidden + progressive[2:], 100) == jpeg.scans(progressive, 100)
    assert jpeg.scans(_with_scans(5000), 100) == 101 and jpeg.scans(progressive[:300], 100) <= 1
    restarts = encoded(textured(64, 64), "JPEG", progressive=True, restart_marker_blocks=1)
    assert b"\xff\xd3" in restarts and jpeg.scans(restarts, 100) == restarts.count(b"\xff\xda")


def test_cmyk_and_other_files_come_as_pixels():
    cmyk = io.BytesIO()
    Image.fromarray(picture(0)).convert("CMYK").save(cmyk, "JPEG")
    for data in (cmyk.getvalue(), encoded(picture(0)), encoded(picture(0), "WEBP"), picture(0)):
        assert isinstance(images.open_image(data), np.ndarray)


def stored(pixels: np.ndarray, orientation: int, quality: int = 95) -> bytes:
    """A JPEG that the tag turns upright."""
    turns = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(np.ascontiguousarray(turns[orientation](pixels)), "JPEG", exif=exif, quality=quality)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_share_of_the_size_shows_the_same_crop(orientation):
    """Odd sizes, all orientations: the crop from 1/2, 1/4 or 1/8 lies where the crop from the whole lies."""
    pixels = textured(301, 413, 1)
    pixels[100:104] = pixels[:, 200:204] = 255  # lines that would show a shift
    image = images.open_image(stored(pixels, orientation))
    assert image.shape == (301, 413, 3)
    whole = image.pixels()
    for size, divisor in (((60, 80), 2), ((30, 40), 4), ((15, 20), 8), ((9, 12), 8), ((100, 120), 1)):
        for box in ((0, 0, 413, 301), (13, 21, 413, 301), (1, 2, 400, 290)):
            part, moved = image.covering(box, size)
            room = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]) / 2
            expected = max(d for d in (1, 2, 4, 8) if d == 1 or d <= room)
            assert expected <= divisor and part.shape[:2] == (-(-301 // expected), -(-413 // expected))
            assert (
                min(moved[2] - moved[0] - 2 * size[1], moved[3] - moved[1] - 2 * size[0]) >= 0
                or expected == 1
            )
            got = images.take(image, box, size).astype(float)
            want = images.take(whole, box, size).astype(float)
            assert np.abs(got - want).mean() < 1.2
            for shift in ((0, 1), (1, 0)):  # as right in place as the true one, not half a pixel beside
                other = np.roll(got, shift, (0, 1))
                assert np.abs(got - want).mean() < 0.5 * np.abs(other - want).mean()


def test_covering_takes_the_least_that_holds_twice_the_size():
    image = images.open_image(encoded(textured(512, 640), "JPEG"))
    for size, divisor in ((257, 1), (256, 1), (129, 1), (128, 2), (65, 2), (64, 4), (33, 4), (32, 8), (4, 8)):
        pixels, box = image.covering((0, 0, 512, 512), (size, size))
        assert pixels.shape == (512 // divisor, 640 // divisor, 3)
        assert box == (0, 0, 512 / divisor, 512 / divisor)
    assert image.covering((0, 0, 640, 256), (32, 8))[0].shape[0] == 128, "the tighter direction decides"


def test_training_from_files_is_pure_and_near_training_from_pixels():
    data = encoded(textured(600, 800, 2), "JPEG", quality=90)
    transform = augment.TrainTransform(48, {"crop_scale": (0.3, 1.0), "flip": 0.5})
    for seed in range(10):
        one, two = (transform(images.open_image(data), np.random.default_rng(seed)) for _ in range(2))
        np.testing.assert_array_equal(one, two)
        whole = transform(images.decode(data), np.random.default_rng(seed))
        assert np.abs(one.astype(int) - whole).mean() < 1.0
    small = encoded(textured(80, 90), "JPEG")
    np.testing.assert_array_equal(
        transform(images.open_image(small), np.random.default_rng(0)),
        transform(images.decode(small), np.random.default_rng(0)),
    )
    np.testing.assert_array_equal(
        images.EvalTransform(32, (32, 32))(images.open_image(data)),
        images.EvalTransform(32, (32, 32))(pillow(data)),
    )


def test_threads_decode_side_by_side():
    files = [encoded(textured(100 + n, 120, n), "JPEG") for n in range(6)]
    expected, outs = [images.decode(data) for data in files], [None] * 6

    def work(n):
        for _ in range(15):
            outs[n] = images.decode(files[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out, want in zip(outs, expected, strict=True):
        np.testing.assert_array_equal(out, want)


def test_real_jpegs_are_pillows_pixels(shared_path):
    folder = shared_path("data/weird_images")
    fast = 0
    for path in sorted(folder.glob("*.jpg")):
        data = path.read_bytes()
        try:
            image = images.open_image(data, max_pixels=2 * 10**7)
            if isinstance(image, np.ndarray):
                continue
            out = image.pixels()
        except BadRecord:
            continue
        fast += 1
        want = decode._by_pillow(decode._open(data, 2 * 10**7)[0], (255, 255, 255), False)
        assert out.shape == want.shape and np.abs(out.astype(int) - want).mean() < 0.05, path.name
    assert fast >= 10
