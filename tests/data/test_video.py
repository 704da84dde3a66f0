"""Which frames of a video, their pixels and times, and damaged files."""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, picture
from PIL import Image

from vlmjax.data.pictures import video
from vlmjax.errors import BadRecord, DataError, RecipeError


def regular(frames: int, rate: float = 10.0) -> np.ndarray:
    return np.arange(frames) / rate


def everything(seconds):
    return np.arange(len(seconds))


def reason(data: bytes, **options) -> str:
    with pytest.raises(BadRecord) as caught:
        video.decode(data, everything, **options)
    return caught.value.reason


def test_uniform():
    assert video.uniform(regular(10), 5).tolist() == [1, 3, 5, 7, 9]
    assert video.uniform(regular(9), 3).tolist() == [1, 4, 7]
    assert video.uniform(regular(3), 6).tolist() == [0, 0, 1, 1, 2, 2]
    assert video.uniform(regular(1), 4).tolist() == [0] * 4
    for frames in range(1, 40):
        for count in range(1, 20):
            picked = video.uniform(regular(frames), count)
            assert len(picked) == count and picked.min() >= 0 and picked.max() < frames
            assert (np.diff(picked) >= 0).all() and abs(picked.mean() - (frames - 1) / 2) <= 0.5


def on_screen(seconds, moment):
    """The last frame that is shown by then."""
    return max([i for i, time in enumerate(seconds) if time <= moment + 1e-6], default=0)


def test_fps_takes_what_is_on_screen():
    rng = np.random.default_rng(0)
    for times in (
        regular(50),
        regular(50, 29.97),
        np.cumsum(rng.uniform(0.01, 0.4, 60)),
        regular(1),
        regular(2, 3.0),
    ):
        for rate in (0.5, 1.0, 2.0, 24.0):
            count = int((times[-1] - times[0]) * rate + 1e-9) + 1
            expected = [on_screen(times, times[0] + k / rate) for k in range(count)]
            assert video.fps(times, rate, 10_000).tolist() == expected
            length = times[-1] - times[0]
            for most in (1, 3, 7):
                picked = video.fps(times, rate, most).tolist()
                spread = [on_screen(times, times[0] + (k + 0.5) * length / most) for k in range(most)]
                assert picked == (expected if count <= most else spread)
    assert video.fps(regular(31), 2.0, 32).tolist() == [0, 5, 10, 15, 20, 25, 30]


def test_strings():
    np.testing.assert_array_equal(video.sampling("uniform(3)")(regular(9)), [1, 4, 7])
    np.testing.assert_array_equal(video.sampling(" fps( 0.5 , 9 ) ")(regular(41)), [0, 20, 40])
    for wrong in ("", "uniform", "uniform()", "uniform(0)", "uniform(2, 3)", "uniform(-1)", "uniform(1.5)", "fps(2)",
                  "fps(0, 3)", "fps(2, 0)", "fps(2, 3.5)", "fps(nan, 3)", "every(2)", "uniform(2) x"):  # fmt: skip
        with pytest.raises(RecipeError, match="is neither 'uniform"):
            video.sampling(wrong)


def animation(kind: str, frames: int = 7, durations=None, **options) -> tuple[bytes, list[np.ndarray]]:
    pixels = [np.full((20, 30, 3), 30 * i + 10, np.uint8) for i in range(frames)]
    for i, each in enumerate(pixels):
        each[:10, :10] = (255 - 30 * i, 0, 0)
    out = io.BytesIO()
    images = [Image.fromarray(each) for each in pixels]
    images[0].save(out, kind, save_all=True, append_images=images[1:], duration=durations or 200, **options)
    return out.getvalue(), pixels


@pytest.mark.parametrize("kind, tolerance", [("GIF", 8), ("WEBP", 0), ("PNG", 0)])
def test_animations(kind, tolerance):
    durations = [100, 250, 30, 400, 120, 60, 90]
    data, pixels = animation(kind, 7, durations, **({"lossless": True} if kind == "WEBP" else {}))
    clip = video.decode(data, everything)
    assert clip.frames.shape == (7, 20, 30, 3) and clip.frames.dtype == np.uint8
    np.testing.assert_allclose(clip.seconds, np.cumsum([0, *durations[:-1]]) / 1000, atol=1e-9)
    assert np.abs(clip.frames.astype(int) - np.stack(pixels)).max() <= tolerance
    some = video.decode(data, lambda seconds: np.array([5, 0, 5]))
    np.testing.assert_array_equal(some.frames, clip.frames[[5, 0, 5]])
    np.testing.assert_array_equal(some.seconds, clip.seconds[[5, 0, 5]])
    small = video.decode(data, video.sampling("uniform(4)"), shortest=10)
    assert small.frames.shape == (4, 10, 15, 3)


def test_pictures_and_transparency():
    still = video.decode(encoded(picture(0)), video.sampling("uniform(3)"))
    np.testing.assert_array_equal(still.frames, np.stack([picture(0)] * 3))
    assert still.seconds.tolist() == [0, 0, 0]
    rgba = picture(1, channels=4)
    out = io.BytesIO()
    frames = [Image.fromarray(rgba), Image.fromarray(np.ascontiguousarray(rgba[::-1]))]
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    from vlmjax.data.images import composite

    clip = video.decode(out.getvalue(), everything, background=(1, 2, 3))
    assert np.abs(clip.frames[1].astype(int) - composite(rgba[::-1], (1, 2, 3))).max() <= 2


def test_a_reference_animation_is_drawn_as_viewers_draw_it(shared_path):
    data = (shared_path("data/weird_images") / "pillow_dispose_bgnd_transparency.gif").read_bytes()
    clip = video.decode(data, everything)
    assert clip.frames.shape == (10, 32, 38, 3) and len({frame.tobytes() for frame in clip.frames}) > 5
    assert (np.diff(clip.seconds) > 0).all()


def test_damaged_animations():
    data, _ = animation("GIF")
    assert reason(b"") == "empty"
    assert reason(data[:30]) in ("truncated", "undecodable", "not_an_image")
    assert reason(data[: len(data) // 3]) in ("truncated", "undecodable")
    assert reason(data, max_pixels=599) == "bomb"
    assert reason(data, max_pixels=600) == "bomb", "seven frames are more than four times one"
    assert video.decode(data, everything, max_pixels=600, shortest=10).frames.shape == (7, 10, 15, 3)


def movie(frames: int = 60, form: str = "mp4", **options) -> bytes:
    """A clip with a key frame every twelve, frames that lean on later ones, and its index in front."""
    av = pytest.importorskip("av")
    front = {"movflags": "faststart"} if form == "mp4" else {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "movie")  # with the index in front, a file is written twice
        with av.open(str(path), "w", format=form, options=front) as container:
            stream = container.add_stream("mpeg4", rate=25, options={"g": "12", "bf": "2", **options})
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 64, 48, "yuv420p", 2_000_000
            base = picture(3, 48, 128)
            for i in range(frames):
                pixels = np.ascontiguousarray(base[:, i % 64 : i % 64 + 64])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        return path.read_bytes()


@pytest.mark.parametrize("form", ["mp4", "matroska", "avi"])
def test_jumping_gives_the_frames_of_decoding_everything(form):
    av = pytest.importorskip("av")
    data = movie(form=form, **({"bf": "0"} if form == "avi" else {}))
    with av.open(io.BytesIO(data)) as container:
        decoded = list(container.decode(video=0))
    assert len(decoded) == 60
    order = np.argsort([frame.pts for frame in decoded])
    whole = np.stack([decoded[i].to_ndarray(format="rgb24") for i in order])
    clip = video.decode(data, everything)
    np.testing.assert_array_equal(clip.frames, whole)
    np.testing.assert_allclose(clip.seconds, np.arange(60) / 25, atol=0.002)
    rng = np.random.default_rng(0)
    for picked in (
        [59],
        [0],
        [40, 3, 40],
        [11, 12, 13],
        *(rng.integers(0, 60, 5).tolist() for _ in range(6)),
    ):
        some = video.decode(data, lambda seconds, picked=picked: np.array(picked))
        np.testing.assert_array_equal(some.frames, whole[picked])
        np.testing.assert_allclose(some.seconds, np.array(picked) / 25, atol=0.002)
    small = video.decode(data, video.sampling("fps(5, 6)"), shortest=24)
    assert small.frames.shape == (6, 24, 32, 3)
    assert reason(data, max_pixels=64 * 48 - 1) == "bomb" and reason(data, max_pixels=64 * 48) == "bomb"


def test_jumping_decodes_little(monkeypatch):
    """The last of 600 frames costs its group of twelve, not the film."""
    av = pytest.importorskip("av")
    data, seen = movie(frames=600), []
    real = video._frames

    class Counting:
        def __init__(self, container):
            self.seek, self._decode = container.seek, container.decode

        def decode(self, stream):
            for frame in self._decode(stream):
                seen.append(1)
                yield frame

    monkeypatch.setattr(video, "_frames", lambda container, *rest: real(Counting(container), *rest))
    assert av and video.decode(data, lambda seconds: np.array([300, 599])).frames.shape[0] == 2
    assert len(seen) <= 2 * 14


def test_damaged_videos():
    data = movie()
    assert reason(b"<!DOCTYPE html><html>" * 50) == "not_a_video"
    for share in (0.9, 0.5, 0.2):
        cut = data[: int(len(data) * share)]
        assert reason(cut) == "truncated"
        with pytest.raises(BadRecord, match="truncated: "):  # though the frame asked for is there
            video.decode(cut, lambda seconds: np.array([0]))
    av = pytest.importorskip("av")
    out = io.BytesIO()
    with av.open(out, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert reason(out.getvalue()) == "not_a_video"


def test_without_pyav_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'vlmjax\[video\]'"):
        video.decode(b"\x00\x00\x00\x20ftypisom" + bytes(100), everything)
    data, _ = animation("GIF")
    assert len(video.decode(data, everything).frames) == 7, "animations need Pillow alone"


def test_reference_video(shared_path):
    pytest.importorskip("av")
    data = (shared_path("data/video") / "maxtext_test_video.mp4").read_bytes()
    clip = video.decode(data, video.sampling("fps(2, 32)"), shortest=60)
    assert clip.frames.shape == (11, 63, 60, 3) and clip.frames.std() > 10
    np.testing.assert_allclose(clip.seconds, np.arange(11) / 2, atol=1e-6)
    assert reason(data[: len(data) // 2]) == "truncated"
