"""Captions per second and core: the tokenizer of the pipeline, `tokenizers` alone, and a byte-pair loop in Python.

`python benchmarks/tokenization.py --tokenizer=FOLDER` takes a CLIP folder with its `tokenizer.json`. Every method
meets the first half of the captions to warm its memory and is timed on the second half, in turns, on one core; the
table holds the medians of CPU time. Ids are compared before anything is timed. Captions are drawn by Zipf's law from
the words of the vocabulary, 13 on average, with capitals, digits, punctuation and some accents; `--captions=FILE`
takes the lines of a file instead.
"""

import argparse
import html
import json
import os
import platform
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path

import numpy as np

from vlmjax.data import text
from vlmjax.data.vocabularies import byte_letters

ROOT = Path(__file__).resolve().parents[1]


class PythonLoop:
    """Byte-pair encoding in plain Python with a memory of words, as CLIP codebases do it; ids of CLIP's tokenizer.

    Each caption is cleaned (ftfy where it is installed, HTML entities, spaces, case), cut into words by CLIP's
    regular expression, each word's merges are looked up, each merge's id is looked up, and a row is filled.
    """

    def __init__(self, folder: Path, length: int):
        """Read vocabulary and merges from the `tokenizer.json` of a folder."""
        import regex  # the standard library's has no classes of letters; transformers brings this one

        try:
            from ftfy import fix_text
        except ImportError:
            self.fix, self.name = str, "without ftfy"
        else:
            self.fix, self.name = fix_text, "with ftfy"
        model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        pairs = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        self.rank, self.ids = {pair: i for i, pair in enumerate(pairs)}, model["vocab"]
        self.letters, self.length, self.memory = byte_letters(), length, {}
        words = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
        self.words = regex.compile(words, regex.IGNORECASE)
        self.first, self.last = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]

    def pieces(self, word: str) -> list[str]:
        """The entries that a word of byte letters falls into: the best-ranked pair is joined until none is left."""
        if word not in self.memory:
            parts = [*word[:-1], word[-1] + "</w>"]
            while len(parts) > 1:
                ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:], strict=False)]
                best = min(range(len(ranks)), key=ranks.__getitem__)
                if ranks[best] == len(self.rank):
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            self.memory[word] = parts
        return self.memory[word]

    def encode(self, caption: str) -> list[int]:
        """Ids of one caption without special tokens."""
        clean = html.unescape(html.unescape(self.fix(caption))).strip()
        out = []
        for word in self.words.findall(" ".join(clean.split()).lower()):
            letters = "".join(self.letters[byte] for byte in word.encode("utf-8"))
            out += [self.ids[piece] for piece in self.pieces(letters)]
        return out

    def __call__(self, captions: list[str]) -> np.ndarray:
        """Ids of a batch: int [captions, length]."""
        out = np.full((len(captions), self.length), self.last, np.int64)
        for row, caption in enumerate(captions):
            ids = [self.first, *self.encode(caption)[: self.length - 2], self.last]
            out[row, : len(ids)] = np.array(ids)
        return out


def library(folder: Path, length: int):
    """`tokenizers` alone: one call per batch, padded by the library."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|endoftext|>")
    backend.enable_truncation(length)
    backend.enable_padding(length=length, pad_id=end, pad_token="<|endoftext|>")
    return lambda captions: np.array([one.ids for one in backend.encode_batch(captions)])


def library_unpadded(folder: Path, length: int):
    """`tokenizers` in its fastest form: no offsets, padded by numpy."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    end = backend.token_to_id("<|endoftext|>")
    backend.enable_truncation(length)

    def encode(captions: list[str]) -> np.ndarray:
        out = np.full((len(captions), length), end, np.int32)
        for row, one in enumerate(backend.encode_batch_fast(captions)):
            out[row, : len(one.ids)] = one.ids
        return out

    return encode


def make_captions(folder: Path, count: int, seed: int = 0) -> list[str]:
    """Captions of words of the vocabulary and compounds of two, the frequent ones first in its order of merges."""
    rng = np.random.default_rng(seed)
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    plain = [word[:-4] for word in vocabulary if word.endswith("</w>")]
    common = [word for word in plain if word.isascii() and word.isalpha()]
    accented = [word + tail for word in common[:400] for tail in ("é", "ß", "ö")]
    compounds = ["".join(pair) for pair in rng.choice(common, (40_000, 2))]
    choice = np.array(common + accented + compounds)
    weights = 1.0 / np.arange(3, len(choice) + 3)
    lengths = rng.integers(4, 23, count)
    drawn = rng.choice(choice, int(lengths.sum()), p=weights / weights.sum())
    kind = rng.random(len(drawn))
    tails = rng.choice(np.array([",", ".", "'s", "!", " (2019)", " #1", " -"]), len(drawn))
    out, at = [], 0
    for length in lengths:
        words = []
        for place in range(at, at + length):
            word = str(drawn[place])
            word = word.capitalize() if kind[place] < 0.1 else word
            words.append(word + str(tails[place]) if kind[place] > 0.9 else word)
        out.append(" ".join(words))
        at += length
    return out


def batches(captions: list[str], size: int = 64) -> list[list[str]]:
    """Consecutive batches."""
    return [captions[i : i + size] for i in range(0, len(captions), size)]


def main() -> None:
    """Compare the ids, time the methods in turns, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True, type=Path, help="CLIP folder with its tokenizer.json")
    parser.add_argument("--captions", help="file with a caption per line")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=77)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}  # read at the first batch
    if args.captions:
        captions = Path(args.captions).read_text(encoding="utf-8").split("\n")[: 2 * args.count]
    else:
        captions = make_captions(args.tokenizer, 2 * args.count)
    half = len(captions) // 2
    ours, python = text.load(args.tokenizer, args.length), PythonLoop(args.tokenizer, args.length)
    methods = {
        f"Python loop, warm memory, {python.name}": python,
        "tokenizers, encode_batch, padded": library(args.tokenizer, args.length),
        "tokenizers, encode_batch_fast, padded by numpy": library_unpadded(args.tokenizer, args.length),
        "vlmjax": lambda batch: ours(batch)["input_ids"],
    }
    rows = {
        name: np.concatenate([encode(batch) for batch in batches(captions[:half])])
        for name, encode in methods.items()
    }
    differ = {
        name: int((found != rows["tokenizers, encode_batch, padded"]).any(1).sum())
        for name, found in rows.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    timed = batches(captions[half:])
    for _ in range(args.rounds):
        for name, encode in methods.items():
            start = time.process_time()
            for batch in timed:
                encode(batch)
            seconds[name].append(time.process_time() - start)
    rate = {name: (len(captions) - half) / statistics.median(times) for name, times in seconds.items()}
    base = rate["vlmjax"]
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    print(
        f"{half:,} captions to warm, {len(captions) - half:,} timed, {words:.1f} words on average, length {args.length}"
    )
    print(f"{'':50} captions/s/core   vlmjax is   rows with other ids")
    for name, value in rate.items():
        print(f"{name:50} {value:15,.0f} {base / value:10.1f}x {differ[name]:21,}")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "tokenizers": metadata.version("tokenizers"),
        "python": platform.python_version(),
        "machine": f"{os.cpu_count()} x {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}",
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    if args.out:
        result = facts | {"captions_per_second": rate, "rows_with_other_ids": differ, "words": words}
        Path(args.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
