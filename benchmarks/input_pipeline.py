"""CPU time of the input pipeline's parts beside what they replace, in turn in one run, with their quality.

`python benchmarks/input_pipeline.py --out=input.json` makes its own files, measures every part that the machine has
the packages for, and prints one table per part. `--parts=images --rounds=5` picks.
"""

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from vlmjax.data import augment, images
from vlmjax.data.pictures import resize
from vlmjax.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
SIZE = 224
# Height, width, files, and how fast amplitudes fall with frequency: files then have the 2.4 and 1.8 bits a pixel
# of photographs of these sizes at quality 90.
SIZES = {"500x375": (375, 500, 48, 1.5), "1600x1200": (1200, 1600, 10, 1.68)}
CROPS = {"0.9-1.0": (0.9, 1.0), "0.08-1.0": (0.08, 1.0)}


def in_turn(variants: dict[str, Callable[[int], object]], items: int, rounds: int) -> dict[str, float]:
    """CPU milliseconds (all threads of this process) per item of each variant, median over the rounds.

    Every variant gets the number of an item. They take turns item by item, in an order that moves on, so that
    whatever else the machine does falls on all alike.
    """
    spent = {name: [0.0] * rounds for name in variants}
    order = list(variants)
    for number in range(-1, rounds):  # the first round warms up
        for item in range(items):
            turn = (number + item) % len(order)
            for name in order[turn:] + order[:turn]:
                start = time.process_time()
                variants[name](item)
                if number >= 0:
                    spent[name][number] += time.process_time() - start
    return {name: 1000 * statistics.median(values) / items for name, values in spent.items()}


def table(title: str, rows: Sequence[dict[str, object]]) -> str:
    """Rows of equal keys as a Markdown table."""
    heads = list(rows[0])
    lines = [f"\n{title}\n", "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def photograph(seed: int, height: int, width: int, fall: float) -> np.ndarray:
    """Noise with about a photograph's spectrum, amplitudes as frequency ** -fall, and edges: uint8 [h, w, 3]."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    layers = []
    for _ in range(4):
        phases = rng.standard_normal((*frequency.shape, 2)) @ (1, 1j)
        layer = np.fft.irfft2(phases / frequency**fall, (height, width))
        layers.append(layer / layer.std())
    light = layers[3] + 1.5 * (layers[0] > 0.6) - 1.0 * (layers[1] < -0.9)
    colour = np.stack([light + 0.35 * layer for layer in layers[:3]], -1)
    return np.clip(colour * 42 + 118, 0, 255).astype(np.uint8)


def jpegs(height: int, width: int, count: int, fall: float) -> list[bytes]:
    """JPEG files of quality 90, one in eight of them a drawn scene."""
    from vlmjax.data.scenes import scene

    files = []
    for i in range(count):
        pixels = photograph(i, height, width, fall)
        if i % 8 == 7:
            drawn = scene(0, i, image_size=256).image
            pixels = images.resize(drawn, (height, width))
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90)
        files.append(out.getvalue())
    return files


def by_pillow(data: bytes, rng: np.random.Generator, scale: tuple[float, float]) -> np.ndarray:
    """As open_clip and torchvision do it: whole image, cut, bicubic."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = augment.random_box(image.size[::-1], rng, scale)
    return np.asarray(image.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def boxed(data: bytes, rng: np.random.Generator, scale: tuple[float, float]) -> np.ndarray:
    """What ours is meant to equal: Pillow's resize of a box, which sees a little beyond the box's edge."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    box = augment.random_box(image.size[::-1], rng, scale)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def everything(way: Callable, files: list[bytes]) -> list[np.ndarray]:
    """What one way makes of every file, each with a generator of its own."""
    return [way(data, np.random.default_rng(i)) for i, data in enumerate(files)]


def ours(
    data: bytes, rng: np.random.Generator, scale: tuple[float, float], backend: str, lazy: bool
) -> np.ndarray:
    """Our decoding and crop; `lazy` lets a large JPEG come at a share of its size."""
    image = images.open_image(data) if lazy else images.decode(data)
    box = augment.random_box(image.shape[:2], rng, scale)
    pixels, box = (image, box) if isinstance(image, np.ndarray) else image.covering(box, (SIZE, SIZE))
    return resize.resize(pixels, (SIZE, SIZE), box, backend=backend)


def available(names: Sequence[str]) -> list[str]:
    """The ways to resize that run here."""
    found = []
    for name in names:
        try:
            resize.choose(name)
        except DataError as error:
            print(f"left out: {error}")
        else:
            found.append(name)
    return found


def image_part(rounds: int) -> list[dict[str, object]]:
    """Decoding and a random-resized crop to 224, from files in memory; quality against Pillow's box resize."""
    rows = []
    backends = available(("c", "kornia", "pillow"))
    for name, kind in SIZES.items():
        files = jpegs(*kind)
        for crop, scale in CROPS.items():
            ways = {"pillow, crop then resize": lambda data, rng, s=scale: by_pillow(data, rng, s)}
            for backend in backends:
                ways[f"ours, {backend}"] = lambda d, rng, s=scale, b=backend: ours(d, rng, s, b, False)
            ways[f"ours, {backends[0]}, training"] = lambda d, rng, s=scale: ours(
                d, rng, s, backends[0], True
            )

            exact = np.stack(everything(lambda data, rng, s=scale: boxed(data, rng, s), files)).astype(int)
            timed = {
                label: lambda i, w=way, f=files: w(f[i], np.random.default_rng(i))
                for label, way in ways.items()
            }
            spent = in_turn(timed, len(files), rounds)
            first = next(iter(spent.values()))
            for label, way in ways.items():
                off = np.abs(np.stack(everything(way, files)) - exact)
                rows.append(
                    {
                        "files": name,
                        "kB": round(sum(map(len, files)) / len(files) / 1000),
                        "crop area": crop,
                        "variant": label,
                        "CPU ms": spent[label],
                        "x pillow": first / spent[label],
                        "mean off": float(off.mean()),
                        "p99": float(np.percentile(off, 99)),
                        "max": int(off.max()),
                    }
                )
    return rows


def step_part(rounds: int) -> list[dict[str, object]]:
    """The steps of the image part alone, on files of 500x375 and pixels of 224."""
    files = jpegs(*SIZES["500x375"])[:16]
    pixels, box = [images.decode(data) for data in files], (9, 5, 486, 364)
    small = [images.resize(each, (SIZE, SIZE)) for each in pixels]
    rng = np.random.default_rng(0)
    variants: dict[str, Callable[[int], object]] = {
        "decode, Pillow": lambda i: np.asarray(Image.open(io.BytesIO(files[i])).convert("RGB")),
        "decode, ours": lambda i: images.decode(files[i]),
    }
    for backend in available(("pillow", "kornia", "c")):
        variants[f"resize, {backend}"] = lambda i, b=backend: resize.resize(
            pixels[i], (SIZE, SIZE), box, backend=b
        )
    for text in ("randaugment(2, 9)", "blip(2, 5)"):
        policy = augment.randaugment.parse(text)
        variants[text] = lambda i, p=policy: p(small[i], rng)
    for function in (augment.color_jitter, augment.gaussian_blur, augment.sharpen, augment.random_erase):
        variants[function.__name__] = lambda i, f=function: f(small[i], rng)
    variants["gaussian_noise"] = lambda i: augment.gaussian_noise(small[i], rng, 6.0)
    variants["random_affine"] = lambda i: augment.random_affine(small[i], rng, 10.0, 0.1)
    variants["flip (within resize)"] = lambda i: resize.resize(pixels[i], (SIZE, SIZE), box, mirror=True)
    return [{"step": n, "CPU ms": spent} for n, spent in in_turn(variants, len(files), rounds).items()]


PARTS: dict[str, tuple[str, Callable[[int], list[dict[str, object]]]]] = {
    "images": ("Decode and random-resized crop to 224", image_part),
    "steps": ("Steps of one image", step_part),
}


def main() -> None:
    """Measure the parts asked for and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many is shown")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    results: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "backend": images.backend(),
        "numpy": metadata.version("numpy"),
    }
    print(json.dumps(results))
    for part in args.parts.split(","):
        title, measure = PARTS[part]
        results[part] = measure(args.rounds)
        print(table(title, results[part]), flush=True)
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
