"""Whole input pipelines beside ours, in turn in one run: CPU time per image, memory, time to the first batch.

`python benchmarks/peers.py --tokenizer=CLIP_FOLDER --out=peers.json` draws JPEG shards once (`--folder`), then runs
each pipeline as a process of its own, `--rounds` times in turn, and prints medians. All read the same pictures at
batch 64, crop and resize to 224 and make CLIP's tokens, with 2 workers or threads:

- open_clip: its own `open_clip_train.data.get_wds_dataset`, transform and tokenizer, as its trainer arranges them.
- tf_data_bicubic, tf_data_bilinear: tf.data over TFRecords of the same files, decode_and_crop, as big_vision does;
  tokens by our tokenizer, since TensorFlow has none.
- ours, and ours_processes: vlmjax.data.pipeline in threads and in two processes.
- ours_kornia, ours_pillow: ours where there is no C compiler, with and without kornia_rs.
- ours_nothing: ours without decoding and resizing, to see what the frame alone takes.

CPU time and memory are of the whole family of processes (memory shared between them counts once), after the first
batches. A pipeline whose packages are missing (`pip install 'vlmjax[peers,kornia]'`) is left out and named.
"""

import argparse
import importlib.util
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

BATCH, SIZE, LENGTH, WARM = 64, 224, 77, 12
SHARDS = 4
NEEDS = {
    "open_clip": ("open_clip", "open_clip_train", "webdataset"),
    "tf_data_bicubic": ("tensorflow",),
    "tf_data_bilinear": ("tensorflow",),
    "ours": (),
    "ours_processes": (),
    "ours_kornia": ("kornia_rs",),
    "ours_pillow": (),
    "ours_nothing": (),
}


def draw(folder: Path, count: int) -> None:
    """The corpus: SHARDS tars of 500 x 375 JPEGs with captions of about 13 words."""
    from input_pipeline import SIZES, jpegs

    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    height, width, _, fall = SIZES["500x375"]
    pictures = jpegs(height, width, min(count, 512), fall)  # more would only take longer to draw
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("etaoinshrdlucmfwyp"), rng.integers(2, 10))) for _ in range(20_000)]
    ranks = np.minimum(rng.zipf(1.3, (count, 26)) - 1, len(words) - 1)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, count, SHARDS):
                text = " ".join(words[r] for r in ranks[i, : rng.integers(6, 21)]).encode()
                for name, data in ((f"{i:07d}.jpg", pictures[i % len(pictures)]), (f"{i:07d}.txt", text)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (folder / "done").write_text("")


def open_clip(folder: Path, count: int, tokenizer: str):
    """open_clip's own loader, with replacement of shards as its documentation advises for webdataset."""
    import torch

    for name in (
        "nms",
        "qnms",
    ):  # without torchvision's compiled part (no CPU wheel has it) these are not declared
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        except RuntimeError:
            pass
    import open_clip as peer
    from open_clip.transform import image_transform
    from open_clip_train.data import get_wds_dataset

    torch.set_num_threads(1)
    args = SimpleNamespace(
        train_data=f"{folder}/{{00000..{SHARDS - 1:05d}}}.tar",
        train_num_samples=count * 1000,
        train_data_upsampling_factors=None,
        dataset_resampled=True,
        seed=0,
        batch_size=BATCH,
        workers=2,
        world_size=1,
    )
    transform = image_transform(SIZE, is_train=True)
    return iter(get_wds_dataset(args, transform, True, tokenizer=peer.get_tokenizer("ViT-L-14")).dataloader)


def _tfrecords(folder: Path) -> None:
    """The same files as TFRecords, one per tar, unless they are there."""
    import tensorflow as tf

    def feature(data: bytes):
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[data]))

    for path in sorted(folder.glob("*.tar")):
        if (target := path.with_suffix(".tfrecord")).exists():
            continue
        with tarfile.open(path) as tar, tf.io.TFRecordWriter(f"{target}.part") as out:
            members = [tar.extractfile(member).read() for member in tar]
            for image, text in zip(members[::2], members[1::2], strict=True):
                features = tf.train.Features(feature={"image": feature(image), "text": feature(text)})
                out.write(tf.train.Example(features=features).SerializeToString())
        os.replace(f"{target}.part", target)


def _tf_data(folder: Path, tokenizer: str, bicubic: bool):
    import tensorflow as tf

    _tfrecords(folder)

    from vlmjax.data import text

    words = text.load(tokenizer, LENGTH)

    def tokens(captions):
        return words([caption.decode() for caption in captions])["input_ids"]

    def parse(record):
        kinds = {name: tf.io.FixedLenFeature([], tf.string) for name in ("image", "text")}
        example = tf.io.parse_single_example(record, kinds)
        shape = tf.io.extract_jpeg_shape(example["image"])
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            shape, tf.zeros([0, 0, 4]), area_range=(0.9, 1.0), min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(example["image"], window, channels=3)
        method = "bicubic" if bicubic else "bilinear"
        image = tf.image.resize(image, (SIZE, SIZE), method, antialias=bicubic)
        image = tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)
        return image, example["text"]

    def batch(images, captions):
        ids = tf.numpy_function(tokens, [captions], tf.int32)
        return images, ids

    files = tf.data.Dataset.list_files(f"{folder}/*.tfrecord", seed=0)
    data = files.repeat().interleave(tf.data.TFRecordDataset, cycle_length=8, num_parallel_calls=2)
    data = data.shuffle(2000).map(parse, num_parallel_calls=2).batch(BATCH).map(batch).prefetch(2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 2
    return data.with_options(options).as_numpy_iterator()


def tf_data_bicubic(folder: Path, count: int, tokenizer: str):
    """tf.data with the mathematics of ours."""
    return _tf_data(folder, tokenizer, True)


def tf_data_bilinear(folder: Path, count: int, tokenizer: str):
    """tf.data as big_vision resizes: bilinear, without antialiasing."""
    return _tf_data(folder, tokenizer, False)


def _ours(folder: Path, tokenizer: str, transform=None, **options):
    from vlmjax.data import augment, text
    from vlmjax.data.pipeline import TrainData
    from vlmjax.data.sources import open_source

    source = open_source(f"{folder}/*.tar")
    transform = transform or augment.TrainTransform(SIZE, {"crop_scale": (0.9, 1.0)})
    return TrainData(source, transform, text.load(tokenizer, LENGTH), batch_size=BATCH, threads=2, **options)


def ours(folder: Path, count: int, tokenizer: str):
    """The pipeline of a training run, in two threads."""
    return _ours(folder, tokenizer)


def ours_processes(folder: Path, count: int, tokenizer: str):
    """The same in two processes."""
    return _ours(folder, tokenizer, processes=2)


def ours_kornia(folder: Path, count: int, tokenizer: str):
    """In two threads, resized by kornia_rs."""
    os.environ["VLMJAX_RESIZE"] = "kornia"
    return _ours(folder, tokenizer)


def ours_pillow(folder: Path, count: int, tokenizer: str):
    """In two threads, resized by Pillow."""
    os.environ["VLMJAX_RESIZE"] = "pillow"
    return _ours(folder, tokenizer)


class _Nothing:
    """A transform that chooses its crop, and makes no picture of it."""

    output_size = (SIZE, SIZE)
    takes_jpegs = True  # whose headers are read, not their pixels

    def __init__(self):
        self.pixels = np.zeros((*self.output_size, 3), np.uint8)

    def __call__(self, image, rng):
        from vlmjax.data import augment

        augment.random_box(image.shape[:2], rng, (0.9, 1.0))
        return self.pixels


def ours_nothing(folder: Path, count: int, tokenizer: str):
    """Everything but decoding and resizing: order, reads, headers, captions, tokens, crops, batches."""
    return _ours(folder, tokenizer, transform=_Nothing())


def work(name: str, folder: Path, count: int, tokenizer: str, batches: int) -> dict[str, float]:
    """Run one pipeline in this process: CPU ms per image, images/s, megabytes, seconds to the first batch."""
    import psutil

    def family():
        me = psutil.Process()
        return [me, *me.children(recursive=True)]

    def cpu() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in family())

    begin = time.perf_counter()
    data = globals()[name](folder, count, tokenizer)
    next(data)
    first = time.perf_counter() - begin
    for _ in range(WARM):
        next(data)
    begin, spent = time.perf_counter(), cpu()
    for _ in range(batches):
        next(data)
    seconds, spent = time.perf_counter() - begin, cpu() - spent
    images = batches * BATCH
    memory = sum(process.memory_full_info().pss for process in family())
    return {
        "cpu_ms_per_image": 1000 * spent / images,
        "images_per_second": images / seconds,
        "megabytes": memory / 1e6,
        "first_batch_seconds": first,
    }


def main() -> None:
    """The command; or, with --worker, one pipeline of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("/tmp/vlmjax-peers"))
    parser.add_argument("--tokenizer", required=True, help="a folder with CLIP's tokenizer")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="comma-separated names")
    parser.add_argument("--out")
    parser.add_argument("--worker", choices=NEEDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(
            json.dumps(work(given.worker, given.folder, given.images, given.tokenizer, given.batches)),
            flush=True,
        )
        os._exit(0)  # some pipelines wait for their workers for a long time
    draw(given.folder, given.images)
    names = given.only.split(",") if given.only else list(NEEDS)
    for name in [n for n in names if not all(map(importlib.util.find_spec, NEEDS[n]))]:
        print(f"left out: {name} needs {', '.join(NEEDS[name])}")
        names.remove(name)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(given.rounds):
        for name in names:
            command = [sys.executable, *sys.argv, f"--worker={name}"]
            env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            rows[name].append(json.loads(done.stdout.splitlines()[-1]))
    result = {n: {k: statistics.median(row[k] for row in all_) for k in all_[0]} for n, all_ in rows.items()}
    base = result.get("open_clip", {}).get("cpu_ms_per_image")
    print(f"{'':<18}{'CPU ms/image':>14}{'x open_clip':>13}{'images/s':>10}{'MB':>8}{'first batch s':>15}")
    for name, row in result.items():
        times = f"{base / row['cpu_ms_per_image']:.2f}" if base else ""
        print(
            f"{name:<18}{row['cpu_ms_per_image']:>14.2f}{times:>13}{row['images_per_second']:>10.0f}"
            f"{row['megabytes']:>8.0f}{row['first_batch_seconds']:>15.1f}"
        )
    if given.out:
        Path(given.out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
