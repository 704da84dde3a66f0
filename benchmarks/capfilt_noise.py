"""CapFilt's whole loop where the noise is known: what its captions are worth, and what a model learns from them.

`python benchmarks/capfilt_noise.py --out=noise.json` draws pictures, gives 40 of 100 the caption of another, and goes
through `configs/blip_scenes.py:web`, `:captioner` and `:filter`, `vlmjax.capfilt caption` and `filter`, and a new model
on what was kept. `--rounds=2` does it all again with that model in the place of the first.

The world: one plain thing, medium or large, in one of twelve colours, on one of eight backgrounds, 32 pixels; texts
name the two colours and leave the shape open ("a picture of something red on a dark blue background"): shapes take a
small model longer than there is time here. 4,000 pictures of the "web", of which 40 % were given each other's captions;
1,000 others with right captions, the "COCO". Models are judged on 512 pictures that nobody has seen. A caption is true
if what it names is what was drawn, whoever wrote it.
"""

import argparse
import io
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from vlmjax.data.formats import tar_writer
from vlmjax.data.record import Record
from vlmjax.data.scenes import Scene, scene
from vlmjax.data.scenes.dice import Dice
from vlmjax.data.scenes.vocabulary import article
from vlmjax.data.scenes.words import OPENINGS

ROOT = Path(__file__).resolve().parents[1]
TONES = ("cream", "sky blue", "pale green", "pale pink", "tan", "dark blue", "dark green", "dark red")
SIDE = 32  # pixels
TRUTH = "truth"  # in a record's json: what was drawn
JUDGED = {"retrieval": "plain.tar", "zeroshot": "plain.tar", "matching": "plain.tar", "caption": "every.tar"}


def drawn(split: str, seed: int) -> Iterator[tuple[int, Scene]]:
    """The scenes of this world, and their numbers, without end."""
    for number in itertools.count():
        one = scene(seed, number, split, style="single", image_size=SIDE)
        thing = one.world.groups[0]
        if thing.texture == "solid" and thing.size != "small" and one.world.background.tone in TONES:
            yield number, one


def said(one: Scene) -> str:
    """What was drawn, as far as texts of this world go."""
    return f"something {one.world.groups[0].colour} on {article(one.world.background.tone)} background"


def plain(number: int, one: Scene) -> tuple[str, ...]:
    """That alone."""
    return (said(one),)


def opened(number: int, one: Scene) -> tuple[str, ...]:
    """The same, begun in one of several ways."""
    return (Dice(0, 7, number).pick(OPENINGS) + said(one),)


def every(number: int, one: Scene) -> tuple[str, ...]:
    """All captions that are true."""
    return tuple(dict.fromkeys(opening + said(one) for opening in OPENINGS))


def write(path: Path, split: str, seed: int, count: int, words: Callable, noise: float = 0.0) -> None:
    """One shard, with captions by `words` of number and scene; a share `noise` of them goes to another record each."""
    scenes = list(itertools.islice(drawn(split, seed), count))
    captions = {at: words(number, one) for at, (number, one) in enumerate(scenes)}
    wrong = np.random.default_rng(seed).permutation(count)[: round(noise * count)].tolist()
    captions |= {to: captions[of] for to, of in zip(wrong, wrong[1:] + wrong[:1], strict=True)}
    with tar_writer.Writer(str(path)) as out:
        for at, (number, one) in enumerate(scenes):
            image = io.BytesIO()
            Image.fromarray(one.image).save(image, "PNG")
            key = f"{split}-{number}"
            out.write(Record(key, image.getvalue(), captions[at], {TRUTH: said(one)}))


def world(folder: Path, web: int, human: int) -> None:
    """All shards."""
    folder.mkdir(parents=True)
    write(folder / "web.tar", "train", 0, web, opened, noise=0.4)
    write(folder / "human.tar", "train", 1, human, plain)
    write(folder / "plain.tar", "val", 2, 512, plain)
    write(folder / "every.tar", "val", 2, 512, every)


def is_true(text: str, truth: str) -> bool:
    """Whether a caption names what was drawn and nothing else; however it begins, and with white space as it likes."""
    words = " ".join(text.split())
    return words in {opening + truth for opening in OPENINGS}


def command(*arguments: str) -> float:
    """Run a command of vlmjax; seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def train(form: str, workdir: Path, data: Path, train: str, *overrides: str) -> dict[str, float]:
    """Train a form of the recipe; what it reached on other pictures, and the seconds of the whole command."""
    names = {"web": JUDGED, "captioner": ("caption",), "filter": ("retrieval", "zeroshot", "matching")}[form]
    evals = [f"--config.evals.{name}.data={data / JUDGED[name]}" for name in names]
    seconds = command(
        "vlmjax.main", f"--config=configs/blip_scenes.py:{form}", f"--workdir={workdir}",
        f"--config.data.train={train}", *evals, *overrides,
    )  # fmt: skip
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {"seconds": seconds} | {
        name: value for row in rows for name, value in row.items() if name.startswith("eval/")
    }


def judged(notes: Sequence[dict], truths: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of captions from the web, written ones and both: how many, how many true, kept, and true and kept."""
    counts: dict[str, Counter] = {"web": Counter(), "synthetic": Counter(), "all": Counter()}
    for note in notes:
        for line in note["captions"]:
            true = is_true(line["text"], truths[note["index"]])
            for kind in (line["origin"], "all"):
                counts[kind].update(captions=1, true=true, kept=line["kept"], kept_true=true and line["kept"])
    return {kind: rates(own) for kind, own in counts.items()}


def rates(own: Counter) -> dict[str, float]:
    """Counts with the precision before and after, and the recall."""
    return {
        **own,
        "precision_before": own["true"] / own["captions"],
        "precision": own["kept_true"] / max(1, own["kept"]),
        "recall": own["kept_true"] / max(1, own["true"]),
    }


def truths_of(shard: Path) -> list[str]:
    """What was drawn, record by record."""
    from vlmjax.data.sources import open_source

    source = open_source(str(shard))
    return [json.loads(source[at].extra["json"])[TRUTH] for at in range(len(source))]


def one_round(folder: Path, base: Path, data: Path, args: argparse.Namespace) -> dict:
    """Captioner and filter of a pretrained model, captions written and filtered, and a new model on what was kept."""
    from vlmjax.capfilt.shards import Notes

    human, web = data / "human.tar", data / "web.tar"
    start = f"--config.init_from={base}/hf"
    captioner = train("captioner", folder / "captioner", data, str(human), start)
    judge = train("filter", folder / "filter", data, str(human), start)
    seconds = command(
        "vlmjax.capfilt", "caption", str(web), f"--out={folder}/captioned", f"--model={folder}/captioner/hf",
        "--max_new_tokens=10",
    )  # fmt: skip
    seconds += command(
        "vlmjax.capfilt", "filter", f"{folder}/captioned/*.tar", f"--out={folder}/kept", f"--model={folder}/filter/hf",
        f"--threshold={args.threshold}", f"--least_cosine={args.least_cosine}",
    )  # fmt: skip
    seconds += command("vlmjax.capfilt", "merge", f"{folder}/kept/*.tar,{human}", f"--out={folder}/merged")
    captions = judged(list(Notes(str(folder / "kept"))), truths_of(web))
    model = train("web", folder / "model", data, f"{folder}/merged/*.tar")
    return {
        "captioner": captioner, "filter": judge, "seconds": seconds, "captions": captions, "model": model,
    }  # fmt: skip


def table(first: dict, rounds: Sequence[dict]) -> str:
    """The rows of the benchmark, in Markdown."""
    names = {
        "R@1": "eval/retrieval/text_to_image_r1", "R@10": "eval/retrieval/text_to_image_r10",
        "zero-shot": "eval/zeroshot/top1", "matching": "eval/matching/accuracy", "caption exact": "eval/caption/exact",
    }  # fmt: skip
    heads = ["learned from", "captions", "true", "of the true ones", *names]
    before = rounds[0]["captions"]["web"]
    rows = [("the web as it is", before["captions"], before["precision_before"], 1.0, first)]
    for number, one in enumerate(rounds, 1):
        for kind, words in (("web", "the web's own"), ("synthetic", "written"), ("all", "all that was kept")):
            own, model = one["captions"][kind], one["model"] if kind == "all" else {}
            rows.append((f"round {number}: {words}", own["kept"], own["precision"], own["recall"], model))
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, count, precision, recall, model in rows:
        scores = [f"{model[key]:.1%}" if key in model else "" for key in names.values()]
        lines.append(f"| {' | '.join([name, f'{count:,}', f'{precision:.1%}', f'{recall:.1%}', *scores])} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--runs", help="empty folder that keeps the runs, their reports and the shards")
    parser.add_argument("--rounds", type=int, default=1, help="of CapFilt (1, as in the paper)")
    parser.add_argument("--web", type=int, default=4000, help="pictures with noisy captions (4000)")
    parser.add_argument("--human", type=int, default=1000, help="pictures with right captions (1000)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the filter (0.5)")
    parser.add_argument("--least_cosine", type=float, default=-1.0, help="of the filter (-1: any)")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    results = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}",
        "jax": metadata.version("jax"),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.runs or temporary).absolute()
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")  # both models are one program
        data = folder / "data"
        world(data, args.web, args.human)
        results["first"] = train("web", folder / "first", data, f"{data}/web.tar,{data}/human.tar")
        results["rounds"], base = [], folder / "first"
        for number in range(1, args.rounds + 1):
            results["rounds"].append(one_round(folder / f"round{number}", base, data, args))
            base = folder / f"round{number}" / "model"
    print(json.dumps(results, indent=2))
    print(table(results["first"], results["rounds"]))
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
