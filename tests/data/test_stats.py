"""The figures of `stats` against data made with known ones; hashes against slow ways of finding the same pairs."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, picture, tokenizer, write_tar
from PIL import Image

from vlmjax.data import hashes, stats, tally
from vlmjax.data.pictures.signatures import format_of
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord

ROOT = Path(__file__).resolve().parents[2]


def natural(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Noise whose strength falls with its frequency, as in photographs: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width)[None] * width
    waves = rng.normal(size=(height, width, 2)) @ [1, 1j] / np.maximum(1, np.hypot(fy, fx))
    grey = np.fft.ifft2(waves).real
    grey = 128 + 45 * (grey - grey.mean()) / grey.std()
    return np.clip(grey[..., None] + rng.uniform(-20, 20, 3), 0, 255).astype(np.uint8)


def changed(data: bytes) -> bytes:
    """The same picture, smaller and recompressed."""
    image = Image.open(io.BytesIO(data))
    out = io.BytesIO()
    image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(out, "JPEG", quality=80)
    return out.getvalue()


@pytest.fixture(name="shard")
def _shard(tmp_path):
    """Twelve records: 8 pictures, two again as they are, one again recompressed, one damaged."""
    pictures = [encoded(natural(i, 60 + i, 90)) for i in range(8)]
    pictures += [pictures[2], pictures[2], changed(pictures[5]), pictures[3][:200]]
    members = {}
    for i, data in enumerate(pictures):
        members[f"{i:02d}.{'jpg' if i == 10 else 'png'}"] = data
        if i != 6:
            members[f"{i:02d}.txt"] = ["a red star", "two blue squares", "a"][i % 3].encode()
    return write_tar(tmp_path / "x.tar", members)


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vlmjax.data.stats", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def test_figures_of_a_shard(shard, tmp_path, capsys):
    tokenizer(tmp_path / "tokenizer")
    out = tmp_path / "new" / "stats.json"
    arguments = [str(shard), f"--out={out}", f"--tokenizer={tmp_path / 'tokenizer'}", "--max_length=4"]
    stats.main([*arguments, "--threads=3"])
    found = json.loads(out.read_text())
    assert (found["records"], found["of"], found["readable"]) == (12, 12, 11)
    assert found["unreadable"] == {"truncated": 1} and found["unreadable_keys"] == {"truncated": ["11"]}
    assert found["exact_duplicates"] == 2 and found["exact_duplicate_keys"] == [["02", "08"], ["02", "09"]]
    assert found["near_duplicates"] == 1 and found["near_duplicate_keys"] == [["05", "10"]]
    assert (found["without_caption"], found["captions"], found["equal_captions"]) == (1, 10, 7)
    assert found["formats"] == {"png": 10, "jpeg": 1} and not found["stopped_early"]
    heights = [60, 61, 62, 63, 64, 65, 66, 67, 62, 62, 48]
    assert found["height"] == {
        "min": 48,
        "p5": round(float(np.percentile(heights, 5)), 4),
        "median": 62,
        "p95": round(float(np.percentile(heights, 95)), 4),
        "max": 67,
        "mean": round(float(np.mean(heights)), 4),
    }
    assert found["width"]["min"] == 67 and found["aspect"]["max"] == 1.5
    words = [3, 3, 1, 3, 3, 1, 3, 1, 3, 3]  # of records 0-5 and 7-10
    assert (
        found["caption_words"]["mean"]
        == round(np.mean([3, 3, 1, 3, 3, 3, 1, 3, 1, 3]), 4)
        == np.mean(words) + 0.0
    )
    assert found["caption_characters"]["max"] == 16 and found["caption_tokens"]["min"] == 3
    assert found["captions_too_long"] == sum(n != 1 for n in words)
    shown = capsys.readouterr().out
    for text in ("12 records of", "unreadable: truncated", "02 = 08", "caption, tokens", f"wrote {out}"):
        assert text in shown.replace("\n", "")


def test_a_part_is_spread_over_all(shard, tmp_path):
    assert list(stats.spread(10, None)) == list(stats.spread(10, 99)) == list(range(10))
    assert list(stats.spread(10, 3)) == [0, 3, 6] and len(stats.spread(10**9, 7)) == 7
    stats.main([str(shard), f"--out={tmp_path / 's.json'}", "--limit=4"])
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["records"], found["of"], found["stopped_early"]) == (4, 12, False)


def test_mistakes_are_one_line(tmp_path, shard):
    for arguments, words in (
        ([tmp_path / "none.tar"], "no such data file"),
        ([shard, f"--out={shard}/x.json"], "cannot be written"),
        ([shard, "--max_length=3"], "name a --tokenizer"),
    ):
        done = run(*arguments)
        assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert run(shard, "--limit=0").returncode == 2


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from vlmjax.data import stats; stats.make_parser(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "PIL", "transformers", "grain", "rich"} & set(eval(done.stdout))
    assert "--limit" in run("--help").stdout


class Slow:
    """A source that interrupts its own process after some records."""

    name, fingerprint = "slow", "slow"

    def __len__(self) -> int:
        return 10_000

    def key(self, i: int) -> str:
        return str(i)

    def __getitem__(self, i: int) -> Record:
        if i == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return Record(str(i), picture(i % 5, 8, 8), ("a",))


def test_ctrl_c_reports_what_was_counted():
    options = stats.make_parser().parse_args(["x", "--threads=2"])
    before = signal.getsignal(signal.SIGINT)
    found = stats.collect(Slow(), options)
    assert found["stopped_early"] and 1 <= found["records"] < 5000 and found["of"] == 10_000
    assert (
        found["exact_duplicates"] == max(0, found["records"] - 5)
        and signal.getsignal(signal.SIGINT) is before
    )


def test_records_of_every_kind():
    one, two = picture(1, 20, 30), picture(2, 20, 20)
    records = [
        Record("pair", one, ("a", "b")),
        Record("several", one, (), {"images": (one, two)}),
        Record("document", b"", (), {}, ("text", two, "more", encoded(one))),
        Record("talk", b"", (), {"conversations": [{"from": "human", "value": "hi"}]}),
        Record("nothing", b"", ("a",)),
        BadRecord("gone", "k5"),
        Record("broken", np.zeros((2, 2), np.uint8), ()),
    ]

    class Source:
        def key(self, i):
            return f"k{i}"

        def __getitem__(self, i):
            if isinstance(records[i], BadRecord):
                raise records[i]
            return records[i]

    found = tally.Tally()
    for i in range(len(records)):
        found.add(tally.examine(Source(), i))
    with_error = tally.examine([], 3)
    assert with_error.reason == "error_IndexError" and with_error.key == "example 3"
    result = found.result(4)
    assert result["unreadable"] == {"empty": 1, "gone": 1, "undecodable": 1}
    assert result["unreadable_keys"]["gone"] == ["k5"] and result["unreadable_keys"]["empty"] == ["nothing"]
    assert (result["readable"], result["without_image"], result["without_caption"]) == (4, 1, 3)
    assert result["formats"] == {"pixels": 4, "png": 1} and result["captions_per_record"]["max"] == 2
    assert result["exact_duplicates"] == 0 and result["near_duplicate_keys"] == [["pair", "several"]]
    assert tally.Tally().result(4)["width"] is None


def test_formats_by_their_first_bytes():
    pixels = picture(0)
    for kind, name in (("PNG", "png"), ("JPEG", "jpeg"), ("GIF", "gif"), ("WEBP", "webp"), ("BMP", "bmp"),
                       ("TIFF", "tiff"), ("AVIF", "avif"), ("JPEG2000", "jpeg 2000"), ("PPM", "other")):  # fmt: skip
        assert format_of(encoded(pixels, kind)) == name
    assert format_of(b"") == "other"


def test_look_survives_what_changes_no_picture():
    rng = np.random.default_rng(0)
    for seed in range(20):
        pixels = natural(seed)
        seen = hashes.look(pixels)
        noisy = np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
        brighter = np.clip(pixels.astype(int) + 5, 0, 255).astype(np.uint8)
        smaller = np.asarray(Image.open(io.BytesIO(changed(encoded(pixels)))))
        for other in (noisy, brighter, smaller):
            again = hashes.look(other)
            both = np.array([seen.hash, again.hash], np.uint64), np.array([seen.colors, again.colors])
            assert hashes.near_pairs(*both).tolist() == [[0, 1]]
        others = [hashes.look(natural(seed + 100)), hashes.look(pixels[:, ::-1])]
        for other in others:
            both = np.array([seen.hash, other.hash], np.uint64), np.array([seen.colors, other.colors])
            assert len(hashes.near_pairs(*both)) == 0
    flat = [hashes.look(np.full((30, 40, 3), value, np.uint8)) for value in (0, 200, 204)]
    assert [one.hash for one in flat] == [0, 0, 0]
    both = np.array([one.hash for one in flat], np.uint64), np.array([one.colors for one in flat])
    assert hashes.near_pairs(*both).tolist() == [[1, 2]]


@pytest.mark.parametrize("bits", [0, 1, 4, 8])
def test_near_pairs_are_all_pairs(bits):
    rng = np.random.default_rng(bits)
    base = rng.integers(0, 2**63, 40, dtype=np.uint64)
    values, colors = [], []
    for _ in range(300):
        value = int(base[rng.integers(40)])
        for bit in rng.permutation(64)[: rng.integers(0, 7)]:
            value ^= 1 << int(bit)
        values.append(value)
        colors.append(np.full(hashes.COLORS, rng.integers(100, 120)) + rng.integers(0, 4, hashes.COLORS))
        if rng.random() < 0.2:
            colors[-1][rng.integers(hashes.COLORS)] = 200
    colors = np.array(colors, np.uint8)
    values[50:53], colors[50:53] = [values[7]] * 3, colors[7]
    wanted = set()
    for b in range(300):
        for a in range(b):
            apart = np.abs(colors[a].astype(int) - colors[b])
            if (values[a] ^ values[b]).bit_count() <= bits and apart.mean() <= 8 and apart.max() <= 32:
                wanted.add((a, b))
    equal = {7, 50, 51, 52}
    wanted = {
        (a, b) for a, b in wanted if not ({a, b} & {50, 51, 52}) or (a == 7 and b in equal)
    }  # of equal ones the first stands for all
    found = hashes.near_pairs(np.array(values, np.uint64), colors, bits)
    assert {tuple(pair) for pair in found.tolist()} == wanted and len(wanted) > (3 if bits < 4 else 100)


def test_repeats_and_digests():
    assert hashes.repeats(np.array([3, 1, 3, 1, 2])).tolist() == [0, 1, 0, 1, 4]
    pixels = picture(0)
    assert hashes.digest(pixels) == hashes.digest(pixels.copy()) != hashes.digest(pixels.reshape(48, 40, 3))
    assert len(hashes.digest(b"a")) == 16 != hashes.digest(b"b")


def test_real_data(shared_path, tmp_path, monkeypatch):
    """The shared drawings: equal files are those that their bytes say."""
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "cache"))
    path = shared_path("data/nlvr")
    stats.main([str(path), f"--out={tmp_path / 's.json'}"])
    found = json.loads((tmp_path / "s.json").read_text())
    assert (found["readable"], found["exact_duplicates"], found["near_duplicates"]) == (700, 2, 0)
