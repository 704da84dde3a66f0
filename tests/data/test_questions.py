"""Questions with weighted answers, and statements about two images, from files to rows of batches."""

import json

import numpy as np
import pytest
from PIL import Image

from vlmjax.data import bpe, text
from vlmjax.data.augment import TrainTransform
from vlmjax.data.captions import blip_question
from vlmjax.data.pipeline import TrainData
from vlmjax.data.questions import Asked, Questions, asked_in
from vlmjax.data.record import Record
from vlmjax.data.scenes import Scenes
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.sources import open_source
from vlmjax.data.statements import Statements, truth_of, two_images
from vlmjax.errors import BadRecord, DataError

TRANSFORM = TrainTransform(16, {})
TEN = ["red"] * 6 + ["dark red"] * 3 + ["rose"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    bpe.train_bpe(
        ["what colour is it", "red rose", "both pictures show something dark"] * 5, 540, str(folder)
    )
    return text.load(folder, 16)


def test_answers_of_annotators_have_their_share():
    fields = {"question": "What colour <image>\n is it?", "answers": TEN}
    one = Asked("What colour is it?", ("red", "dark red", "rose"), (0.6, 0.3, 0.1))
    (found,) = asked_in(fields)
    assert found[:2] == one[:2]
    np.testing.assert_allclose(found.weights, one.weights)
    dicts = [{"answer": text, "answer_id": k} for k, text in enumerate(TEN)]
    assert asked_in({"question": "What colour is it?", "answers": dicts}) == [found]
    inside = {"json": json.dumps({"question": "What colour is it?", "answers": TEN}).encode()}
    assert asked_in(inside) == [found]
    genome = {"question": "What?", "answer": "a bus", "answer_weights": [0.2]}
    assert asked_in(genome) == [Asked("What?", ("a bus",), (0.2,))]


def test_a_conversation_is_as_many_questions_as_rounds():
    turns = [("system", "Be brief."), ("human", "<image>\nWhat is it?"), ("gpt", " a ring ")]
    turns += [("human", "Why?"), ("gpt", "so")]
    said = {"conversations": [{"from": who, "value": words} for who, words in turns]}
    assert asked_in(said) == [Asked("What is it?", ("a ring",), (1.0,)), Asked("Why?", ("so",), (1.0,))]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, "no_question"),
        ({"question": 3, "answers": ["a"]}, "no_question"),
        ({"question": "<image>", "answers": ["a"]}, "no_question"),
        ({"question": "What?"}, "no_answer"),
        ({"question": "What?", "answers": ["a", None]}, "no_answer"),
        ({"question": "What?", "answers": ["a", "b"], "answer_weights": [1.0]}, "no_answer"),
        ({"question": "What?", "answers": ["a"], "answer_weights": [-1.0]}, "no_answer"),
        ({"json": b"{"}, "bad_json"),
    ],
)
def test_what_is_no_question(fields, reason):
    with pytest.raises(BadRecord) as found:
        asked_in(fields, "key")
    assert found.value.reason == reason and found.value.key == "key"


def test_a_question_as_blip_reads_it():
    assert blip_question("  What's (the) TIME:  now?") == "what's the time now?"
    assert blip_question("a " * 60) == " ".join(["a"] * 50)


def table(folder, rows):
    for name, grey in (("a.png", 10), ("b.png", 100), ("c.png", 200)):
        Image.new("RGB", (24, 20), (grey,) * 3).save(folder / name)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_source(str(folder / "rows.jsonl"))


def test_rows_of_questions_from_a_table(tmp_path, words):
    rows = [
        {"image": "a.png", "question": "What colour?", "answers": TEN},
        {"image": "b.png", "question": "Is it?", "answers": ["rose"]},
        {"image": "c.png", "question": "Is it?"},
    ]
    data = TrainData(
        table(tmp_path, rows), TRANSFORM, words, batch_size=3, threads=0, max_bad_share=1.0, clean="blip",
        kind=Questions(answers=2, answer_length=6),
    )  # fmt: skip
    batch = next(data)
    data.close()
    ten = int(np.argmax(batch["answer_weights"][:, 1] > 0))
    one = int(np.argmax(batch["answer_weights"][:, 0] == 1.0))
    none = int(np.argmin(batch["valid"]))
    assert sorted((ten, one, none)) == [0, 1, 2]
    assert words.decode(batch["input_ids"][ten]) == "what colour ?"
    np.testing.assert_allclose(batch["answer_weights"][ten], [0.6, 0.3], rtol=1e-6)
    for place, answer in enumerate(("red", "dark red")):
        wanted = words.at_length(6)([answer])
        np.testing.assert_array_equal(batch["answer_ids"][ten, place], wanted["input_ids"][0])
        np.testing.assert_array_equal(batch["answer_mask"][ten, place], wanted["attention_mask"][0])
    assert not batch["answer_mask"][one, 1].any() and batch["answer_weights"][one, 1] == 0
    assert (
        not batch["valid"][none]
        and not batch["pixel_values"][none].any()
        and not batch["answer_mask"][none].any()
    )
    assert dict(data.skips.by_reason) == {"no_answer": 1}


def test_one_round_is_drawn_each_time(words):
    source = Scenes(captions="questions", image_size=16, length=8)
    made = {"batch_size": 8, "kind": Questions(1, 12), "seed": 5}
    serial, threads = (TrainData(source, TRANSFORM, words, threads=n, chunk=3, **made) for n in (0, 2))
    seen = set()
    for _ in range(8):
        one, other = next(serial), next(threads)
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
        seen |= set(zip(one["key"], (words.decode(ids) for ids in one["input_ids"]), strict=True))
    asked = {key: sum(key == other for other, _ in seen) for key, _ in seen}
    assert max(asked.values()) > 1
    serial.close(), threads.close()


def test_rows_of_statements_from_a_table(tmp_path, words):
    rows = [
        {"images": ["a.png", "b.png"], "sentence": "Both pictures show something dark.", "label": "True"},
        {"images": ["b.png", "c.png"], "sentence": "It is red.", "label": False},
        {"images": ["c.png", "a.png"], "sentence": "It is red.", "label": "perhaps"},
        {"images": ["a.png"], "sentence": "It is red.", "label": 1},
    ]
    data = TrainData(
        table(tmp_path, rows),
        TRANSFORM,
        words,
        batch_size=4,
        threads=0,
        max_bad_share=1.0,
        clean="blip",
        kind=Statements(),
    )
    batch = next(data)
    data.close()
    assert batch["pixel_values"].shape == (4, 2, 16, 16, 3)
    said = {words.decode(ids): row for row, ids in enumerate(batch["input_ids"]) if batch["valid"][row]}
    assert {text: int(batch["label"][row]) for text, row in said.items()} == {
        "both pictures show something dark": 1,
        "it is red": 0,
    }
    greys = {text: batch["pixel_values"][row, :, 3, 3, 0].tolist() for text, row in said.items()}
    assert greys == {"both pictures show something dark": [10, 100], "it is red": [100, 200]}
    assert dict(data.skips.by_reason) == {"no_label": 1, "image_count": 1}


def test_a_statement_in_a_tar():
    members = {"right.png": b"right", "json": b'{"sentence": "It is.", "label": true}'}
    assert two_images(Record("key", b"left", ("It is.",), members)) == (b"left", b"right")
    with pytest.raises(BadRecord, match="image_count"):
        two_images(Record("key", b"left", ("It is.",), {"png": b"right"}))


def test_truth():
    assert truth_of({"label": np.int64(1)}) and not truth_of({"label": "False"})
    with pytest.raises(BadRecord, match="no_label"):
        truth_of({})


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_scenes_say_what_is_true_of_two_pictures(split):
    source = Scenes(split, captions="statements", style="simple", length=400)
    truths, kinds = [], set()
    for i in range(len(source)):
        (said,) = source.captions_at(i)
        worlds = source.scene(i).world, source._beside(i).world
        things = [{(g.colour, g.shape) for g in world.groups} for world in worlds]
        *start, colour, shape = said.removesuffix(".").replace("something ", "something . ").split()
        colour, shape = (shape, None) if "something" in said else (colour, shape)
        has = [any(colour == c and shape in (None, s) for c, s in there) for there in things]
        kind = " ".join(start)
        wanted = has["right" in kind] if "The" in start else all(has) if "Both" in start else any(has)
        truths.append(wanted)
        kinds.add(start[0])
        assert source[i].extra["label"] == wanted, (said, things)
        if split == "train" and shape:
            assert (shape, colour) in v.SEEN_PAIRS
    assert kinds == {"The", "Both", "One"}
    assert 0.4 < np.mean(truths) < 0.6


def test_mistakes(words):
    with pytest.raises(DataError, match="cache_decoded=64 is for pairs"):
        TrainData(Scenes(length=9), TRANSFORM, words, batch_size=2, cache_decoded=64, kind=Statements())
    with pytest.raises(DataError, match="no room"):
        TrainData(Scenes(length=9), TRANSFORM, words, batch_size=2, kind=Questions(2, 2))
