"""Width and height from headers: Pillow, which decodes the whole file, is the oracle."""

import io

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image, ImageOps

from vlmjax.data.pictures import image_header

KINDS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM")


def upright(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).size


@pytest.mark.parametrize("kind", KINDS)
def test_plain_files(kind):
    for height, width in ((40, 48), (1, 1), (300, 7)):
        assert image_header.size(encoded(picture(0, height, width), kind)) == (width, height)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x010E] = "a description that stands before the orientation"
    exif[0x0112] = orientation
    data = encoded(picture(0), kind, exif=exif)
    assert image_header.size(data) == upright(data) == ((48, 40) if orientation < 5 else (40, 48))


def test_forms_of_jpeg_and_webp():
    pixels = picture(0, 33, 65)
    for options in (
        {"progressive": True},
        {"optimize": True},
        {"icc_profile": b"x" * 200_000},
        {"comment": b"c" * 99},
    ):
        assert image_header.size(encoded(pixels, "JPEG", **options)) == (65, 33)
    out = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(out, "JPEG")
    assert image_header.size(out.getvalue()) == (65, 33)
    assert image_header.size(encoded(pixels, "WEBP", lossless=True)) == (65, 33)
    assert image_header.size(encoded(np.dstack([pixels, pixels[..., 0]]), "WEBP")) == (65, 33)
    # Fill bytes before a marker are allowed (T.81, B.1.1.2).
    data = encoded(pixels, "JPEG")
    assert image_header.size(data[:2] + b"\xff\xff" + data[2:]) == (65, 33)


def test_only_headers_are_read():
    data, asked = encoded(picture(0, 500, 600), "JPEG"), []

    def read(at: int, count: int) -> bytes:
        asked.append(count)
        return data[at : at + count]

    assert image_header.size(read) == (600, 500) and sum(asked) < 1000 < len(data)


def test_what_is_no_image_gives_none():
    whole = encoded(picture(0), "JPEG")
    assert image_header.size(whole[:20]) is None
    for data in (
        b"",
        b"\xff\xd8",
        b"<html>",
        b"\x89PNG\r\n\x1a\n",
        b"RIFF....WEBP",
        b"BM",
        b"\xff\xd8" + b"\xff\xe0\0\2" * 999,
    ):
        assert image_header.size(data) is None


def test_reference_images(shared_path):
    folder, told = shared_path("data/weird_images"), 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        found = image_header.size(data)
        try:
            expected = upright(data)
        except Exception:
            continue  # not decodable: what the header says does not matter
        assert found == expected, path.name
        told += 1
    assert told > 25
