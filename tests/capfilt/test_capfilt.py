"""CapFilt: captions by key alone, what a filter keeps, kills at any moment, and one line for every mistake."""

import base64
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests.capfilt.models import blip
from vlmjax import decode
from vlmjax.capfilt import __main__ as command
from vlmjax.capfilt import report, steps
from vlmjax.capfilt.models import Captioner, Scorer, filled
from vlmjax.capfilt.shards import Notes, Outcome, Shards
from vlmjax.data.formats import tar_writer
from vlmjax.data.record import Record
from vlmjax.data.sources import open_source
from vlmjax.data.storage import making
from vlmjax.decode import loop
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.writing import Writer, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def captioner(folder):
    return Captioner(
        str(folder), prompt="a picture of ", max_new_tokens=6, min_new_tokens=1, batch_size=4, number=2
    )


def picture(i):
    out = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def web(path, count=11, bad=()):
    """Shards as img2dataset writes them: a caption, and a json with more."""
    with tar_writer.Writer(str(path)) as out:
        for i in range(count):
            image = b"\x89PNG\r\n\x1a\nbroken" if i in bad else picture(i)
            body = json.dumps({"caption": f"caption {i}", "url": f"http://h/{i}", "width": 24}).encode()
            out.write(Record(f"k{i}", image, (f"caption {i}",), {"json": body}))
    return str(path)


def run(*arguments):
    command.run(command.make_parser().parse_args(list(map(str, arguments))))


def files(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(os.listdir(folder))
    }


@pytest.mark.slow
def test_captions_depend_on_the_key_and_the_seed_alone(captioner, folder):
    pixels = np.stack([captioner.pixels(picture(i)) for i in range(6)])
    keys = [f"k{i}" for i in range(6)]
    found = captioner(keys, pixels)
    assert all(1 <= len(own) <= 2 for own in found) and len({text for own in found for text in own}) > 4
    order = [4, 2, 0, 5, 1, 3]
    assert captioner([keys[at] for at in order], pixels[order]) == [found[at] for at in order]
    assert captioner(keys[3:4], pixels[3:4]) == [found[3]]
    again = Captioner(str(folder), max_new_tokens=6, min_new_tokens=1, batch_size=4, number=2, seed=7)
    assert again(keys, pixels) != found
    beams = Captioner(str(folder), max_new_tokens=6, min_new_tokens=1, batch_size=4, num_beams=3)
    assert beams(keys, pixels) == beams(keys, pixels) and all(len(own) == 1 for own in beams(keys, pixels))


def test_several_captions_are_drawn_from_one_look(captioner, monkeypatch):
    """Those that `generate` draws one after another; images are read into one cache for all of them."""
    reads, plainly = [], loop.prefill
    monkeypatch.setattr(loop, "prefill", lambda *given: reads.append(1) or plainly(*given))
    writer = Writer(captioner.model, captioner.transform, captioner.mesh)
    monkeypatch.setattr(captioner, "_writer", writer)
    keys, pixels = ["a", "b"], np.stack([captioner.pixels(picture(i)) for i in range(2)])
    found = captioner(keys, pixels)
    assert len(reads) == 1  # as the program is made
    monkeypatch.undo()
    prompt = np.tile(captioner._prompt, (2, 1))
    drawn = [
        decode.generate(
            captioner.model, captioner.params, pixel_values=captioner.transform.normalize(pixels), input_ids=prompt,
            do_sample=True, top_p=0.9, max_new_tokens=6, min_new_tokens=1, eos_token_id=captioner._end,
            pad_token_id=captioner.model.config.text.pad_token_id,
            seed=[zlib.crc32(f"0|{number}|{key}".encode()) for key in keys],
        )
        for number in range(2)
    ]  # fmt: skip
    for row, own in enumerate(found):
        ids = [until(np.asarray(tokens)[row], (captioner._end,)) for tokens in drawn]
        texts = [" ".join(captioner.tokenizer.decode(one).split()) for one in ids]
        assert own == list(dict.fromkeys(text for text in texts if text))


def test_a_record_gets_captions_and_keeps_what_it_knew(captioner, tmp_path):
    source = open_source(web(tmp_path / "w.tar", 3, bad=(1,)))
    made = list(steps.caption(captioner, [source[i] for i in range(3)]))
    assert [one.reason for one in made][1] != "" and made[1].record is None
    assert made[0].record.captions == ("caption 0",) and made[0].record.extra["url"] == "http://h/0"
    assert made[0].record.extra[steps.SYNTHETIC] == made[0].note[steps.SYNTHETIC]
    with tar_writer.Writer(str(tmp_path / "c.tar")) as out:
        out.write(made[0].record)
    back = open_source(str(tmp_path / "c.tar"))[0]
    assert back.captions == ("caption 0",)
    texts = steps.texts_of(back)
    assert texts == [
        (steps.WEB, "caption 0"),
        *((steps.SYNTHETIC, text) for text in made[0].note[steps.SYNTHETIC]),
    ]


class Memory:
    """Records as a source."""

    name = fingerprint = "memory"

    def __init__(self, records):
        """Keep them."""
        self._records = records

    def __len__(self):
        """How many there are."""
        return len(self._records)

    def __getitem__(self, i):
        """Number i."""
        return self._records[i]


class Told(Scorer):
    """Scores by the text: "good 0.9 0.2" is a match of 0.9 and a cosine of 0.2."""

    def __init__(self):
        """No model is read."""

    def pixels(self, image):
        if image == b"bad":
            raise BadRecord("not_an_image", "")
        return np.zeros((2, 2, 3), np.uint8)

    def __call__(self, pixels, texts):
        return [[tuple(map(float, text.split()[1:])) for text in own] for own in texts]


RECORDS = [
    Record("a", b"x", ("w 0.9 0.1", "v 0.4 0.9"), {steps.SYNTHETIC: ["s 0.5 0.3", "w 0.9 0.1"], "n": 1}),
    Record("b", b"x", ("w 0.1 0.8",), {steps.SYNTHETIC: ["s 0.2 0.8"]}),
    Record("c", b"bad", ("w 1 1",)),
]


def test_the_filter_keeps_what_matches():
    found = list(steps.filter_captions(Told(), RECORDS, 0.5, -1.0))
    assert found[0].record.captions == ("w 0.9 0.1", "s 0.5 0.3")
    assert found[0].record.extra == {"n": 1, steps.ORIGIN: ["web", "synthetic"]}
    assert [one.reason for one in found] == ["", "no_caption_kept", "not_an_image"]
    assert [line["kept"] for line in found[0].note["captions"]] == [True, False, True]
    strict = list(steps.filter_captions(Told(), RECORDS, 0.0, 0.3))
    assert strict[0].record.captions == ("v 0.4 0.9", "s 0.5 0.3")
    counts = report.told([one.note for one in found]).counts
    assert counts == {"synthetic": {"captions": 2, "kept": 1}, "web": {"captions": 3, "kept": 1}}


def test_a_report_reads_notes_one_shard_at_a_time(tmp_path, monkeypatch):
    """Counts, bins and examples of 300 notes in 30 shards, against all of them at once."""
    draw = random.Random(3)
    whole = [
        {
            "key": str(i),
            "captions": [
                {"text": f"{i} {j}", "origin": draw.choice(("web", "synthetic")), "kept": draw.random() < 0.7,
                 "match": draw.choice((0.0, 0.5, 1.0, draw.random())), "cosine": draw.uniform(-1, 1)}
                for j in range(draw.randrange(4))
            ],
        }
        for i in range(300)
    ]  # fmt: skip
    source = Memory([Record(str(i), b"", (), {}) for i in range(300)])
    shards = Shards(source, str(tmp_path), 10, {"step": "filter"})
    shards.run(lambda records: (Outcome(None, whole[int(record.key)], "x") for record in records))
    read, plainly = [], making.read
    monkeypatch.setattr(making, "read", lambda path: read.append(path) or plainly(path))
    notes = Notes(str(tmp_path))
    first = iter(notes)
    assert next(first)["key"] == "0" and len([path for path in read if path.endswith(".notes.jsonl")]) == 1
    lines = [line for note in whole for line in note["captions"]]
    found = report.told(notes)
    for origin, own in found.counts.items():
        mine = [line for line in lines if line["origin"] == origin]
        assert own == {"captions": len(mine), "kept": sum(line["kept"] for line in mine)}
    for name, edges in (("match", np.linspace(0, 1, 21)), ("cosine", np.linspace(-1, 1, 21))):
        for kept in (False, True):
            wanted = np.histogram([line[name] for line in lines if line["kept"] is kept], edges)[0]
            np.testing.assert_array_equal(found.scores[name][int(kept)], wanted)
    for kept, chosen in report._some(notes, found.sizes).items():
        mine = [line for line in lines if line["kept"] is kept]
        assert [line for _, line in chosen] == mine[:: len(mine) // 24][:24]


def test_ranking_keeps_the_most_alike():
    found = list(steps.rank(Told(), RECORDS[:2], 2))
    assert found[0].record.captions == ("v 0.4 0.9", "s 0.5 0.3")
    assert found[1].record.captions == ("w 0.1 0.8", "s 0.2 0.8")  # equal ones: the web's first
    assert list(steps.rank(Told(), RECORDS[1:2], 1))[0].record.captions == ("w 0.1 0.8",)


def test_scores_are_the_models_own(folder):
    """Of pairs in whatever batches, against one pair at a time."""
    scorer = Scorer(str(folder), matching=True, batch_size=4)
    pixels = np.stack([scorer.pixels(picture(i)) for i in range(3)])
    texts = [["a red star", "two hearts"], ["ring"], ["a blue circle", "grey", "star"]]
    found = scorer(pixels, texts)

    def one(module, values, ids, mask):
        states = module.encode_image(values)
        return module.match(states, ids, mask), (
            module.embed_image(states) * module.embed_text(module.encode_text(ids, mask))
        ).sum()

    score = jax.jit(lambda *given: scorer.model.apply({"params": scorer.params}, *given, method=one))
    for image, own in enumerate(texts):
        for text, (match, cosine) in zip(own, found[image], strict=True):
            tokens, values = scorer.tokenizer([text]), scorer.transform.normalize(pixels[[image]])
            logits, want = score(values, tokens["input_ids"], tokens["attention_mask"])
            odds = np.exp(np.asarray(logits[0], np.float64))
            np.testing.assert_allclose((match, cosine), (odds[1] / odds.sum(), want), atol=1e-5)
    alone = Scorer(str(folder), matching=False, batch_size=4)(pixels, texts)
    assert alone[0][0][0] == alone[0][0][1] == pytest.approx(found[0][0][1], abs=1e-6)


def test_batches_are_filled_with_their_own_rows():
    assert filled(np.array([5, 6, 7]), 8).tolist() == [5, 6, 7, 5, 6, 7, 5, 6]
    assert filled(np.array([5, 6, 7]), 2).tolist() == [5, 6]


def passed_on(records):
    for record in records:
        time.sleep(0.002)
        yield Outcome(record, {"key": record.key})


def test_shards_are_made_once_by_whom_they_belong_to(tmp_path):
    source = open_source(web(tmp_path / "w.tar", 11, bad=()))
    whole = Shards(source, str(tmp_path / "whole"), 3, {"step": "x"})
    assert whole.run(passed_on) == {"written": 11} and whole.count == 4 and whole.complete()
    parts = Shards(source, str(tmp_path / "parts"), 3, {"step": "x"})
    assert parts.run(passed_on, 1, 2) == {"written": 5} and not parts.complete()
    (tmp_path / "parts" / "data-00003.tar.json").write_text("{")  # cut off by a kill
    assert parts.run(passed_on, 0, 2) == {"written": 9}
    assert parts.run(passed_on, 1, 2) == {"written": 11}
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert [note["key"] for note in Notes(str(tmp_path / "whole"))] == [f"k{i}" for i in range(11)]
    first = Shards(source, str(tmp_path / "first"), 3, {"step": "x"}, limit=4)
    assert first.run(passed_on) == {"written": 4}
    with pytest.raises(DataError, match="holds another run: step was 'x' and is 'y'"):
        Shards(source, str(tmp_path / "whole"), 3, {"step": "y"}).run(passed_on)
    with pytest.raises(DataError, match="holds no run of capfilt"):
        Notes(str(tmp_path))


def test_from_web_captions_to_a_recipes_data(folder, tmp_path, capsys):
    spec = web(tmp_path / "w.tar", 7, bad=(2,))
    size = ["--records=3", "--batch_size=4"]
    run("caption", spec, f"--out={tmp_path / 'c'}", f"--model={folder}", *size, "--max_new_tokens=5")
    told = capsys.readouterr().out
    assert [line.split() for line in told.splitlines()] == [["1", "not_an_image"], ["6", "written"]]
    for step, more in (("filter", "--threshold=0.0"), ("rank", "--keep=1")):
        run(step, f"{tmp_path / 'c'}/*.tar", f"--out={tmp_path / step}", f"--model={folder}", *size, more)
        page = (tmp_path / step / "report.html").read_text()
        assert "Kept" in page and page.count("data:image/jpeg") >= 6
    kept = open_source(f"{tmp_path / 'filter'}/*.tar")
    assert len(kept) == 6 and all(len(kept[i].captions) == 2 for i in range(6))
    ranked = open_source(f"{tmp_path / 'rank'}/*.tar")
    assert all(len(ranked[i].captions) == 1 for i in range(6))
    human = web(tmp_path / "h.tar", 2)
    run("merge", f"{tmp_path / 'filter'}/*.tar,{human}", f"--out={tmp_path / 'm'}")
    assert len(open_source(f"{tmp_path / 'm'}/*.tar")) == 8
    run("report", spec, f"--out={tmp_path / 'filter'}", f"--html={tmp_path / 'x.html'}")
    assert "web" in capsys.readouterr().out and (tmp_path / "x.html").exists()


@pytest.mark.slow
def test_killed_ten_times_with_two_processes(folder, tmp_path):
    """Nothing is lost, nothing is twice: the folder is that of a run nobody disturbed, byte for byte."""
    spec = web(tmp_path / "w.tar", 40)
    base = [sys.executable, "-m", "vlmjax.capfilt", "caption", spec, f"--model={folder}", "--records=2"]
    base += ["--batch_size=4", "--max_new_tokens=6"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*base, f"--out={tmp_path / 'whole'}"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rng, kills = random.Random(0), 0

    def start(process):
        out = [f"--out={tmp_path / 'killed'}", f"--process={process}", "--processes=2"]
        return subprocess.Popen([*base, *out], env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    running = {process: start(process) for process in range(2)}
    while running:
        for process, one in list(running.items()):
            if one.poll() is not None:
                assert one.returncode == 0, one.stderr.read().decode()
                one.stderr.close()
                del running[process]
            elif (
                kills < 10 and one.stderr.readline() and rng.random() < 0.5
            ):  # between shards, and inside the next
                time.sleep(rng.random() * 0.05)
                one.send_signal(signal.SIGKILL)
                one.wait()
                one.stderr.close()
                kills += 1
                running[process] = start(process)
    assert kills == 10
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("filter", "scenes", "--out=x"), "--model"),
        (("caption", "scenes", "--out=x", "--model=nowhere"), "nowhere"),
        (
            ("caption", "scenes", "--out=x", "--model=m", "--process=2", "--processes=2"),
            "--process=2: expected 0 to 1",
        ),
        (("filter", "scenes", "--out=x", "--model=m", "--threshold=1.5"), "--threshold=1.5: expected 0 to 1"),
        (("rank", "scenes", "--out=x", "--model=m", "--keep=0"), "--keep=0: expected at least 1"),
        (("caption", "scenes", "--out=x", "--model=m", "--num_beams=3", "--number=2"), "m"),
        (("report", "scenes", "--out=nothing-here"), "holds no run of capfilt"),
        (("improve", "scenes"), "invalid choice"),
    ],
)
def test_mistakes_in_one_line(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command.main(arguments)
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and told in error and len(error.splitlines()) == 1


def test_a_model_of_another_kind(folder, tmp_path):
    with pytest.raises(DataError, match="--number=2 with --num_beams=3"):
        Captioner(str(folder), number=2, num_beams=3)
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    with pytest.raises(DataError, match="no tokenizer or no image processor"):
        Captioner(str(tmp_path / "bare"))


def test_one_bad_record_leaves_the_others(captioner, tmp_path):
    """Json that is none, a kind of image no tar holds, several images, somebody else's use of our names."""
    bad_json = Record("j", picture(1), ("a",), {"json": b"{"})
    several = Record("s", picture(1), ("a",), {"images": (picture(1), picture(2))})
    odd = Record(
        "o", picture(2), ("a",), {"json": json.dumps({steps.SYNTHETIC: True, steps.ORIGIN: "me"}).encode()}
    )
    out = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(out, "PPM")
    strange = Record("p", out.getvalue(), ("a",))
    source = Memory([bad_json, several, odd, strange, Record("g", picture(3), ("b",))])
    shards = Shards(source, str(tmp_path / "out"), 5, {"step": "caption"})
    counts = shards.run(lambda records: steps.caption(captioner, records))
    assert (
        counts.pop("written") == 2
        and sum(counts.values()) == 3
        and {"bad_json", "several_images"} <= set(counts)
    )
    assert [text for text in steps.texts_of(odd)] == [(steps.WEB, "a")]
    assert len(open_source(f"{tmp_path / 'out'}/*.tar")) == 2
    (tmp_path / "out" / "data-00000.notes.jsonl").write_text("{")
    with pytest.raises(DataError, match="notes.jsonl is damaged"):
        list(Notes(str(tmp_path / "out")))


def test_a_second_round_knows_where_captions_are_from():
    record = Record(
        "a",
        b"x",
        ("w 0.9 0.1", "s 0.5 0.3"),
        {steps.ORIGIN: ["web", "synthetic"], steps.SYNTHETIC: ["n 1 1"]},
    )
    assert [origin for origin, _ in steps.texts_of(record)] == ["web", "synthetic", "synthetic"]
    kept = next(iter(steps.filter_captions(Told(), [record], 0.5, -1.0))).record
    assert kept.extra[steps.ORIGIN] == ["web", "synthetic", "synthetic"]


def test_pictures_are_found_by_place_not_by_key(tmp_path):
    """Web shards repeat keys."""
    shades = []
    for shade in (0, 255):
        out = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(out, "PNG")
        shades.append(Record("same", out.getvalue(), (f"w {1 - shade / 300} 0",)))
    made = [
        one.note | {"index": at} for at, one in enumerate(steps.filter_captions(Told(), shades, 0.5, -1.0))
    ]
    page = report.page(report.told(made), made, Memory(shades), "t")
    kept, dropped = page.split("<h2>Kept</h2>")[1].split("<h2>Dropped</h2>")
    for part, shade in ((kept, 0), (dropped, 255)):
        data = re.search(r"data:image/jpeg;base64,([^\"]+)", part)[1]
        assert abs(int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).mean()) - shade) < 3
