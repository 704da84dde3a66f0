"""The benchmark of CapFilt: noise as it says, truth by what was drawn, and its table."""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import pytest

from vlmjax import config
from vlmjax.data.sources import open_source

ROOT = Path(__file__).resolve().parents[1]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def script():
    return module(ROOT / "benchmarks" / "capfilt_noise.py")


@pytest.fixture(scope="module")
def data(script, tmp_path_factory):
    folder = tmp_path_factory.mktemp("noise") / "data"
    script.world(folder, web=200, human=40)
    return folder


def records(shard):
    source = open_source(str(shard))
    return [source[at] for at in range(len(source))]


def test_noise_is_what_it_is_said_to_be(script, data):
    web, human, others = (records(data / f"{name}.tar") for name in ("web", "human", "plain"))
    truths = script.truths_of(data / "web.tar")
    endings = [record.captions[0].rpartition(" of ")[2] for record in web]
    wrong = sum(ending != truth for ending, truth in zip(endings, truths, strict=True))
    assert 70 <= wrong <= 80 and sorted(endings) == sorted(truths)
    assert len({record.captions[0].removesuffix(end) for record, end in zip(web, endings, strict=True)}) == 4
    clean = script.truths_of(data / "human.tar")
    assert [record.captions for record in human] == [(truth,) for truth in clean]
    images = {record.image for record in (*web, *human)}
    assert len(images) == 240 and not images & {record.image for record in others}


def test_a_caption_is_true_however_it_begins(script, data):
    for text in ("a red star", "a picture of  a red star ", "an image of a red star"):
        assert script.is_true(text, "a red star")
    for text in ("a red ring", "red star", "a red star star", "a picture of", "", "a photo of a red star"):
        assert not script.is_true(text, "a red star")
    source, truths = records(data / "every.tar"), script.truths_of(data / "every.tar")
    for record, truth in zip(source, truths, strict=True):
        assert len(record.captions) == 4 and all(script.is_true(text, truth) for text in record.captions)


def test_precision_and_recall_are_counted_one_by_one(script):
    draw = random.Random(0)
    truths = [draw.choice(("a red star", "a blue ring")) for _ in range(50)]
    notes = [
        {"index": at, "captions": [
            {"text": draw.choice(("a red star", "a blue ring", "a")), "kept": draw.random() < 0.5, "origin": origin}
            for origin in ("web", "synthetic")[: draw.randrange(3)]
        ]}
        for at in draw.sample(range(50), 50)
    ]  # fmt: skip
    found = script.judged(notes, truths)
    for kind, origins in (("web", {"web"}), ("synthetic", {"synthetic"}), ("all", {"web", "synthetic"})):
        lines = [(line, truths[note["index"]]) for note in notes for line in note["captions"]]
        lines = [(line["text"] == truth, line["kept"]) for line, truth in lines if line["origin"] in origins]
        both = lines.count((True, True))
        own = found[kind]
        assert own["captions"] == len(lines) and own["kept"] == sum(kept for _, kept in lines)
        assert own["precision"] == pytest.approx(both / sum(kept for _, kept in lines))
        assert own["recall"] == pytest.approx(both / sum(true for true, _ in lines))
        assert own["precision_before"] == pytest.approx(sum(true for true, _ in lines) / len(lines))


def test_forms_of_the_recipe_and_the_loop_fit_together(script, data, tmp_path, monkeypatch):
    """Every command that a round gives is one that there is; the table has a row for each set of captions."""
    given = []
    monkeypatch.setattr(script, "command", lambda *arguments: given.append(arguments) or 1.0)
    note = {
        "index": 0,
        "captions": [{"text": script.truths_of(data / "web.tar")[0], "kept": True, "origin": "web"}],
    }
    written = note | {"captions": [*note["captions"], {"text": "a", "kept": False, "origin": "synthetic"}]}
    for name in ("captioner", "filter", "model", "kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"eval/retrieval/text_to_image_r1": 0.5}))
    (tmp_path / "kept" / "capfilt.json").write_text("{}")
    (tmp_path / "kept" / "data-00000.notes.jsonl").write_text(json.dumps(written) + "\n")
    args = argparse.Namespace(threshold=0.5, least_cosine=-1.0)
    one = script.one_round(tmp_path, tmp_path / "first", data, args)
    text = script.table({"eval/retrieval/text_to_image_r1": 0.25}, [one])
    assert "| the web as it is | 1 | 100.0% | 100.0% | 25.0% |" in text and len(text.splitlines()) == 6
    assert "| round 1: all that was kept | 1 | 100.0% | 100.0% | 50.0% |" in text
    steps = [arguments for arguments in given if arguments[0] == "vlmjax.capfilt"]
    from vlmjax.capfilt.__main__ import make_parser

    assert [make_parser().parse_args(list(step[1:])).step for step in steps] == ["caption", "filter", "merge"]
    recipe = module(ROOT / "configs" / "blip_scenes.py")
    for arguments in (arguments for arguments in given if arguments[0] == "vlmjax.main"):
        config.check_overrides(arguments[2:])
        form = arguments[1].rpartition(":")[2]
        c = recipe.get_config(form)
        for entry in c.evals:
            assert any(f"evals.{entry}.data=" in argument for argument in arguments)
            c.evals[entry].data = str(data / "every.tar")
        config.validate(c)
