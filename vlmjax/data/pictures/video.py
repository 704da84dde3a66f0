"""Videos and animations to a few frames: which frames, and their pixels and times."""

import bisect
import functools
import io
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmjax.data import images
from vlmjax.data.pictures.signatures import format_of
from vlmjax.errors import BadRecord, DataError, RecipeError

_FORM = re.compile(r"\s*(?:uniform\(\s*(\d+)\s*\)|fps\(\s*(\d+(?:\.\d+)?)\s*,\s*(\d+)\s*\))\s*")
_USUAL_DELAY = 0.1  # seconds that viewers show a frame of an animation that states none
_EXTRA = "reading videos needs PyAV: pip install 'vlmjax[video]'"

Sampling = Callable[[np.ndarray], np.ndarray]


class Clip(NamedTuple):
    """Frames of one video.

    Attributes:
        frames: uint8 [frames, height, width, 3].
        seconds: float64 [frames], when each is shown, from the video's first frame.
    """

    frames: np.ndarray
    seconds: np.ndarray


def uniform(seconds: np.ndarray, count: int) -> np.ndarray:
    """Indices of the frames in the middle of `count` parts of equally many frames: int64 [count].

    Of fewer than `count` frames some are taken more than once: the result has the same length for every video.
    """
    return np.floor((np.arange(count) + 0.5) * len(seconds) / count).astype(np.int64)


def fps(seconds: np.ndarray, rate: float, most: int) -> np.ndarray:
    """Indices of the frames on screen every 1 / `rate` seconds, at most `most`: int64 [1 to most].

    seconds: float64 [frames], when each frame of the video is shown, ascending; rates may vary. A video that has
    more such moments than `most` gives `most` frames evenly spaced in time instead.

    Qwen2-VL samples otherwise: its count is frames / average rate x 2, rounded down to an even number (its vision
    tower joins frames in pairs) between 4 and 768 and never above the number of frames, and its indices are
    `round(linspace(0, frames - 1, count))`, so that first and last frame are always among them.
    """
    length = seconds[-1] - seconds[0]
    count = int(math.floor(length * rate + 1e-9)) + 1
    if count <= most:
        moments = seconds[0] + np.arange(count) / rate
    else:
        moments = seconds[0] + (np.arange(most) + 0.5) * length / most
    return np.maximum(np.searchsorted(seconds, moments + 1e-6, side="right") - 1, 0).astype(np.int64)


def sampling(text: str) -> Sampling:
    """'uniform(8)', or 'fps(2, 32)' for two frames a second and at most 32: from all times to indices.

    Raises:
        RecipeError: any other form or number.
    """
    match = _FORM.fullmatch(text)
    if match and match[1] and int(match[1]):
        return functools.partial(uniform, count=int(match[1]))
    if match and match[2] and float(match[2]) and int(match[3]):
        return functools.partial(fps, rate=float(match[2]), most=int(match[3]))
    raise RecipeError(f"sampling {text!r} is neither 'uniform(frames)' nor 'fps(rate, most frames)'")


def decode(
    data: bytes,
    sample: Sampling,
    *,
    shortest: int | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int = images.MAX_PIXELS,
) -> Clip:
    """The frames of a video, or of an animated GIF, WebP or PNG, that `sample` picks.

    Args:
        data: the file's bytes. Animations are read by Pillow, everything else by PyAV (the extra `video`).
        sample: from float64 [frames], the times of all frames in seconds, to the int64 indices wanted.
        shortest: frames are scaled down to this shorter side as they come.
        background: what shows through transparent pixels of animations.
        max_pixels: bound on the width times height of a frame; a clip, scaled down, may have four times that.

    Raises:
        BadRecord: reasons `empty`, `not_a_video`, `truncated`, `bomb`, `undecodable`.
        DataError: PyAV is not installed.
    """
    if not data:
        raise BadRecord("empty", detail="no bytes")
    if format_of(data) in ("gif", "png", "webp"):
        return _animation(data, sample, shortest, background, max_pixels)
    return _video(data, sample, shortest, max_pixels)


def _small(pixels: np.ndarray, shortest: int | None) -> np.ndarray:
    return pixels if shortest is None else images.shrink(pixels, shortest)


def _picked(sample: Sampling, seconds: list[float]) -> tuple[list[int], np.ndarray]:
    """Indices, and the times of all frames from the first one's on."""
    if not seconds:
        raise BadRecord("truncated", detail="no frames")
    times = np.asarray(seconds, np.float64)
    return [int(i) for i in sample(times - times[0])], times - times[0]


def _bounded(size: tuple[int, int], count: int, shortest: int | None, max_pixels: int) -> None:
    width, height = size
    scale = 1.0 if shortest is None else min(1.0, shortest / max(1, min(width, height)))
    if width * height > max_pixels or width * height * scale * scale * count > 4 * max_pixels:
        raise BadRecord(
            "bomb", detail=f"{count} frames of {width} x {height} pixels, bound {max_pixels}; see `shortest`"
        )


def _animation(
    data: bytes, sample: Sampling, shortest: int | None, background: tuple[int, int, int], max_pixels: int
) -> Clip:
    """Frames as they are seen, drawn over their forerunners; times are sums of the frames' own durations."""
    images.decode(
        data, max_pixels=max_pixels
    )  # the bound, and the reasons of files that are no images at all
    try:
        with Image.open(io.BytesIO(data)) as image:
            seconds, count = [0.0], getattr(image, "n_frames", 1)
            for i in range(count):
                image.seek(i)
                image.load()  # WebP tells a frame's duration then
                seconds.append(seconds[-1] + (image.info.get("duration", 0) / 1000 or _USUAL_DELAY))
            wanted, times = _picked(sample, seconds[:-1])
            _bounded(image.size, len(wanted), shortest, max_pixels)
            made: dict[int, np.ndarray] = {}
            for i in sorted(set(wanted)):
                image.seek(i)
                made[i] = _small(images.composite(np.asarray(image.convert("RGBA")), background), shortest)
    except BadRecord:
        raise
    except Exception as error:  # Pillow's decoders raise nearly every built-in class on damaged input
        reason = "truncated" if "truncated" in str(error).lower() else "undecodable"
        raise BadRecord(reason, detail=f"{type(error).__name__}: {error}") from error
    return Clip(np.stack([made[i] for i in wanted]), times[wanted])


def _video(data: bytes, sample: Sampling, shortest: int | None, max_pixels: int) -> Clip:
    try:
        import av
    except ImportError as error:
        raise DataError(_EXTRA) from error
    try:
        container = av.open(io.BytesIO(data))
    except av.FFmpegError as error:
        cut = "moov" in str(error) or b"ftyp" in data[4:12]  # an index at the end that is missing
        raise BadRecord("truncated" if cut else "not_a_video", detail=str(error)) from error
    try:
        with container:
            if not container.streams.video:
                raise BadRecord("not_a_video", detail="there is no video stream")
            stream = container.streams.video[0]
            shown, keys = _times(container, stream)
            wanted, times = _picked(sample, [float(time * stream.time_base) for time in shown])
            _bounded((stream.width, stream.height), len(wanted), shortest, max_pixels)
            made = _frames(container, stream, [shown[i] for i in sorted(set(wanted))], keys, shortest)
    except av.FFmpegError as error:
        raise BadRecord("undecodable", detail=str(error)) from error
    return Clip(np.stack([made[shown[i]] for i in wanted]), times[wanted])


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """Presentation times of all frames, and of those that need no other, from the packets alone."""
    shown, keys, damaged = [], [], False
    for packet in container.demux(stream):
        if packet.pts is None or packet.is_discard:
            continue
        damaged |= packet.is_corrupt
        shown.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    if damaged or len(shown) < stream.frames:
        raise BadRecord("truncated", detail=f"{len(shown)} of {stream.frames} frames")
    return sorted(set(shown)), sorted(keys)


def _frames(
    container: Any, stream: Any, wanted: list[int], keys: list[int], shortest: int | None
) -> dict[int, np.ndarray]:
    """Decode the frames of these times, jumping to a key frame wherever that leaves some undecoded."""
    made: dict[int, np.ndarray] = {}
    frames, position = iter(()), None
    for time in wanted:
        key = keys[max(0, bisect.bisect_right(keys, time) - 1)] if keys else None
        if position is None or (key is not None and key > position):
            container.seek(key if key is not None else 0, stream=stream, backward=True)
            frames = container.decode(stream)
        for frame in frames:
            if frame.pts is None:
                continue
            position = frame.pts
            if position >= time:
                break
        if position != time:
            raise BadRecord("truncated", detail=f"no frame at {float(time * stream.time_base):.3f} s")
        upright = np.rot90(frame.to_ndarray(format="rgb24"), round((frame.rotation or 0) / 90))
        made[time] = _small(np.ascontiguousarray(upright), shortest)
    return made
