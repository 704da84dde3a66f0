"""Answers of a model that writes, scored on eight devices, against one question at a time on one of them."""

import jax
import numpy as np
import pytest

from vlmjax import config, decode
from vlmjax.data import bpe, text
from vlmjax.data.conversation import MARK, from_turns
from vlmjax.data.form import Form, cut, ends_of
from vlmjax.data.images import EvalTransform
from vlmjax.data.pieces import Pieces
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals import matching
from vlmjax.evals.answers import AnswerEvaluator
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.writing import batches
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig, example_inputs
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import shardings

IMAGES = EvalTransform(16, (16, 16), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
FORM = Form("v1", "Be brief.")
NEW = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random model with its parameters and tokenizer."""
    folder = tmp_path_factory.mktemp("words")
    bpe.train_bpe(["what colour is it? red. is there a seal? yes"] * 9, 530, str(folder))
    tokenizer = text.with_token(text.load(folder, 128), MARK)
    words = DecoderConfig(
        *(16, 2, 4, 2, 4, 24, -(-tokenizer.vocab_size // 8) * 8), max_length=128, tied=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=(tokenizer.eos_token_id,),
    )  # fmt: skip
    image = VitConfig(width=16, depth=2, heads=2, mlp_dim=24, image_size=16, patch_size=8)
    model = Vlm(VlmConfig(image, words, BridgeConfig("mlp", 2), tokenizer.token_id(MARK)))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model.config)))["params"]
    rng = np.random.default_rng(4)
    return model, jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes), tokenizer


def turns(*words):
    return [{"from": ("human", "gpt")[i % 2], "value": one} for i, one in enumerate(words)]


TALKS = [
    turns("<image>\nWhat colour is it?", "Red"),
    turns("Is there a seal?\n<image>", "yes", "What colour is it?", "grey"),
    turns("What colour is the sky?", "blue", "And the sea, which is wide and deep?", "grey"),
    turns("<image>\nWhat colour is it?", "red", "Is there a seal?", "no"),
]


class Talks:
    """Records of random pixels with conversations; some are of no use."""

    name, fingerprint = "talks", "0"

    def __init__(self, talks=TALKS, bad=(), captions=None, plain=None):
        self.talks, self.bad, self.captions, self.plain = talks, set(bad), captions, plain

    def __len__(self):
        return len(self.talks)

    def pixels(self, i):
        if self.plain is not None:
            return np.full((18, 20, 3), self.plain, np.uint8)
        return np.random.default_rng(i).integers(0, 256, (18, 20, 3), np.uint8)

    def turns_at(self, i):
        return self.talks[i]

    def __getitem__(self, i):
        if i in self.bad:
            raise BadRecord("truncated", f"key{i}", "cut off")
        captions = self.captions[i] if self.captions else ()
        return Record(f"key{i}", self.pixels(i), tuple(captions), {"conversations": self.talks[i]})


def evaluator(made, source, mesh=None, form=FORM, **options):
    model, _, tokenizer = made
    wanted = Benchmark("test", "vqa", "talks", max_new_tokens=NEW, batch_size=8, **options)
    return AnswerEvaluator(
        wanted, model, tokenizer, IMAGES, mesh or make_mesh(devices=jax.devices()[:1]), form, source=source
    )


def oracle(made, source, form=FORM):
    """(record, question, right answer, what the model says), each generated alone, on one device."""
    model, params, tokenizer = made
    pieces, tokens = Pieces(tokenizer), model.config.image_tokens
    ends, stops = ends_of(form.template, pieces)
    params, out = jax.device_put(params), []
    for i in range(len(source)):
        said = from_turns(source.talks[i])
        for at in range(1, len(said), 2):
            numbers = {"image_tokens": tokens, "image_token_id": model.config.image_token_id}
            ids = form.prompt(said[:at], pieces, **numbers)[None]
            pixels = IMAGES.normalize(IMAGES(source.pixels(i)))[None, None]
            options = {"max_new_tokens": NEW, "eos_token_id": ends}
            found = decode.generate(model, params, input_ids=ids, pixel_values=pixels, **options)[0]
            question = said[at - 1].text.replace(MARK, "").strip()
            out.append((i, question, said[at].text, cut(tokenizer.decode(np.asarray(found)), stops)))
    return out


def placed(made, mesh):
    """Parameters by the rules of recipes."""
    return jax.device_put(made[1], shardings(config.VLM_SHARDING, made[1], mesh))


@pytest.mark.parametrize(
    "axes", [{}, pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)]
)
def test_answers_are_those_of_one_question_at_a_time(made, axes):
    """Whatever the mesh; each with the true answers before it; some made right, one record damaged."""
    asked = oracle(made, Talks())
    assert len({written for *_, written in asked}) > 3
    # The last record's first answer becomes what the model says, with other capitals and a full stop.
    talks = [
        *TALKS[:3],
        turns(TALKS[3][0]["value"], asked[5][3].upper() + ".", *[t["value"] for t in TALKS[3][2:]]),
    ]
    mesh = make_mesh(**axes)
    result = evaluator(made, Talks(talks, bad=[0]), mesh).run(placed(made, mesh))
    wanted = [row for row in oracle(made, Talks(talks)) if row[0] != 0]
    hits = [written.lower() == answer.lower().rstrip(".") for _, _, answer, written in wanted]
    assert result.metrics == {"exact_match": sum(hits) / len(hits)} and sum(hits) >= 1
    shown = [(s["question"], s["expected"], s["answer"], s["right"]) for s in result.details["samples"]]
    assert shown == [(*row[1:], hit) for row, hit in zip(wanted, hits, strict=True)]
    assert (result.counts["records"], result.counts["used"], result.counts["questions"]) == (4, 3, 6)
    assert result.skipped_reasons == {"truncated": 1}
    assert result.row() == {"eval/test/exact_match": sum(hits) / len(hits)}


@pytest.mark.slow
def test_blind_sees_the_mean_colour(made):
    """The same answers as of records of one colour, to the same questions; and others than with sight."""
    colour = np.rint(255 * np.array(IMAGES.mean)).astype(np.uint8)
    blind = evaluator(made, Talks(), blind=True).run(made[1]).details["samples"]
    seeing = evaluator(made, Talks()).run(made[1]).details["samples"]
    one_colour = evaluator(made, Talks(plain=colour)).run(made[1]).details["samples"]
    answers = [[sample["answer"] for sample in samples] for samples in (blind, one_colour, seeing)]
    assert answers[0] == answers[1] != answers[2]
    assert np.array_equal(np.unique(blind[0]["image"].reshape(-1, 3), axis=0), colour[None])
    assert np.array_equal(seeing[0]["image"].shape, (18, 18, 3))


def test_captions_are_answers_of_one_question(made):
    """Any of them will do; the template leaves the question out, and so it has no words."""
    form = Form("plain")
    source = Talks([[], []], captions=[("red", "a star"), ("blue",)])
    first = evaluator(made, source, form=form).run(made[1])
    said = [sample["answer"] for sample in first.details["samples"]]
    assert [sample["question"] for sample in first.details["samples"]] == ["", ""]
    source.captions = [("red", said[0]), ("blue",)]
    result = evaluator(made, source, form=form).run(made[1], details=False)
    assert result.metrics["exact_match"] == (1 + (said[1] == "blue")) / 2 and not result.details


def test_what_cannot_be_asked_is_counted(made):
    """Too long, too many images, no words, an image too few; a later round that is too long is left out."""
    long = "what colour is it? " * 40
    talks = [
        TALKS[0],
        turns(f"<image>{long}", "red"),
        turns("<image><image> Which?", "red"),
        [],
        turns("Is there a seal?", "yes", long, "red"),
        [{"from": "somebody", "value": "x"}],
    ]
    result = evaluator(made, Talks(talks)).run(made[1])
    reasons = {"too_long": 1, "too_many_images": 1, "no_question": 1, "unknown_role": 1}
    assert result.skipped_reasons == reasons and result.counts["skipped"] == 4
    assert result.counts["questions"] == result.counts["used"] == 2
    with pytest.raises(DataError, match="none of 1 records could be used .*no_question"):
        evaluator(made, Talks([[]])).run(made[1])
    with pytest.raises(DataError, match="'v9' is none of"):
        evaluator(made, Talks(), form=Form("v9"))


def test_a_second_run_asks_and_compiles_nothing_anew(made):
    one = evaluator(made, Talks())
    first = one.run(made[1])
    source, one.source = one.source, None
    one.source = type("Seen", (Talks,), {"turns_at": None})(source.talks)
    sizes = one.writer._write._cache_size()
    assert one.run(made[1]).metrics == first.metrics and one.writer._write._cache_size() == sizes


def test_batches_are_of_like_length():
    lengths = [5, 40, 16, 17, 3, 300, 33]
    found = list(batches(lengths, 2))
    assert found == [(16, [0, 2]), (16, [4]), (32, [3]), (64, [1, 6]), (512, [5])]


def test_scores_by_hand():
    questions = ["Is there a cat?", "is there a dog", "What colour is it?", "What colour?", "Why?"]
    answers = [("Yes.",), ("no",), ("red", "crimson"), ("red",), ("because",)]
    found = matching.score(questions, answers, [" yes", "yes", "CRIMSON.", "blue", "because of that"])
    assert found["metrics"] == {"exact_match": 2 / 5}
    # One of yes and no, two of red, one of because.
    assert found["chance"] == {"exact_match": 4 / 5}
    assert found["counts"] == {"questions": 5, "kinds": 3, "most_frequent_answer": 2 / 5}
    assert found["kinds"] == [
        {"kind": "is there", "questions": 2, "right": 1, "chance": 1, "guess": "no"},
        {"kind": "what colour", "questions": 2, "right": 1, "chance": 2, "guess": "red"},
        {"kind": "why", "questions": 1, "right": 0, "chance": 1, "guess": "because"},
    ]
    assert matching.plain(" A cat . ") == "a cat" and matching.kind_of("") == "(no words)"
