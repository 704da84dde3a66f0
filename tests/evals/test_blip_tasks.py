"""What BLIP is scored by: answers, statements, and retrieval in two looks, each against the model asked row by row."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.capfilt.models import WORDS
from vlmjax import decode
from vlmjax.data import bpe, text
from vlmjax.data.images import EvalTransform
from vlmjax.data.questions import asked_in
from vlmjax.data.recipe import DEC, ENC
from vlmjax.data.record import Record
from vlmjax.data.scenes import Scenes
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.choose import Evaluators
from vlmjax.evals.rerank import pairs_to_match
from vlmjax.models import blip, blip_tasks
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip
from vlmjax.models.blip_config import BlipConfig, blip_vit
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.mesh import make_mesh

COUNT = 13


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    bpe.train_bpe(WORDS, 540, str(folder), model_max_length=24)
    tokenizer = text.load(folder, 24)
    for token in (DEC, ENC):
        tokenizer = text.with_token(tokenizer, token)
    return tokenizer


def made(kind, words):
    """(model, params) of a kind, none of them zero."""
    config = BlipConfig(
        image=dataclasses.replace(blip_vit("base", 16), width=16, depth=1, heads=2, mlp_dim=32, patch_size=8),
        text=BertConfig(
            width=16, depth=2, heads=2, mlp_dim=32, vocab_size=words.vocab_size, max_length=24, type_vocab_size=None,
            pad_token_id=words.pad_token_id,
        ),
        projection_dim=8, bos_token_id=words.token_id(DEC), enc_token_id=words.token_id(ENC),
        sep_token_id=words.eos_token_id,
    )  # fmt: skip
    model, rng = kind(config), np.random.default_rng(2)
    inputs = (blip if kind is Blip else blip_tasks).example_inputs(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    return model, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32), shapes)


def run(model, params, words, benchmark, data, devices=2, source=None, **options):
    mesh = make_mesh(devices, 1, 1, devices=jax.devices()[:devices])
    transform = EvalTransform((16, 16), None)
    given = Benchmark("it", benchmark, data, examples=COUNT, batch_size=8, **options)
    return Evaluators(model, words, transform, mesh).of(given, source).run(params)


class Damaged(Scenes):
    """A source one record of which cannot be read."""

    def __getitem__(self, i: int) -> Record:
        if i == 4:
            raise BadRecord("truncated", "record 4")
        return super().__getitem__(i)


def seen(*images):
    transform = EvalTransform((16, 16), None)
    pixels = jnp.asarray(np.stack([transform(image) for image in images]))
    return np.asarray(normalized(pixels, transform.mean, transform.std))


@pytest.fixture(scope="module")
def answerer(words):
    return made(BlipVqa, words)


def test_statements(words):
    model, params = made(BlipNlvr, words)
    source = Damaged("val", captions="statements", image_size=16, style="single")
    found = run(model, params, words, "statements", "scenes", source=source)
    apply, right, true = jax.jit(model.apply), [], []
    for i in [i for i in range(COUNT) if i != 4]:
        record, said = source[i], words(list(source[i].captions))
        pixels = seen(*record.extra["images"])[None]
        logits = apply({"params": params}, pixels, said["input_ids"], said["attention_mask"])
        true.append(bool(record.extra["label"]))
        right.append(bool(logits[0].argmax()) == true[-1])
    assert found.metrics == {"right": pytest.approx(np.mean(right))} and 0 < np.mean(right) < 1
    assert found.chance["right"] == pytest.approx(max(np.mean(true), 1 - np.mean(true)))
    assert found.counts == {"records": COUNT, "used": COUNT - 1, "skipped": 1}
    assert found.skipped_reasons == {"truncated": 1}


def questions(source):
    """(image, question, answers) of all rounds of the records that are used."""
    out = []
    for i in range(COUNT):
        for one in asked_in(source[i].extra):
            out.append((source[i].image, one.question, one.answers))
    return out


@pytest.mark.slow
def test_answers_are_those_that_are_written(words, answerer):
    model, params = answerer
    source = Scenes("val", captions="questions", image_size=16, style="single")
    found = run(model, params, words, "vqa", "scenes", source=source, max_new_tokens=4)
    assert found.counts["questions"] == len(questions(source))
    written = {}
    for image, question, _ in questions(source):
        ids = np.array([words.encode(question)], np.int32)
        out = decode.generate(
            model, params, input_ids=ids, pixel_values=seen(image), max_new_tokens=4,
            eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
        )  # fmt: skip
        written.setdefault(question, set()).add(words.decode(np.asarray(out[0])).strip())
    for sample in found.details["samples"]:
        assert sample["answer"] in written[sample["question"]]


@pytest.mark.slow
def test_answers_of_a_list_are_the_likeliest(words, answerer, tmp_path):
    model, params = answerer
    source = Scenes("val", captions="questions", image_size=16, style="single")
    answers = sorted({answer for _, _, own in questions(source) for answer in own})
    (tmp_path / "answers.txt").write_text("\n".join([*answers, "", answers[0]]))
    ids = [words.encode(answer)[1:] for answer in answers]
    longest = max(map(len, ids))
    padded = np.array([one + [0] * (longest - len(one)) for one in ids], np.int32)
    mask = np.array([[1] * len(one) + [0] * (longest - len(one)) for one in ids], np.int32)
    for top in (0, 3):
        found = run(
            model,
            params,
            words,
            "vqa",
            "scenes",
            source=source,
            answers=str(tmp_path / "answers.txt"),
            top=top,
        )
        right, chosen = 0, {}
        for image, question, own in questions(source):
            asked = np.array([words.encode(question)], np.int32)
            ranked = decode.rank(
                model, params, padded, mask, input_ids=asked, pixel_values=seen(image), top=top or None,
                label_smoothing=0.1,
            )  # fmt: skip
            best = answers[int(np.argmax(ranked.sums[0]))]
            right += best in own
            chosen.setdefault(question, set()).add(best)
        assert found.metrics["exact_match"] == pytest.approx(right / len(questions(source)))
        assert all(sample["answer"] in chosen[sample["question"]] for sample in found.details["samples"])
    with pytest.raises(DataError, match="cannot be read"):
        run(model, params, words, "vqa", "scenes", source=source, answers=str(tmp_path / "none.txt"))


@pytest.mark.parametrize("k", [3, 100])
def test_candidates_are_ranked_by_match_and_cosine(words, k):
    model, params = made(Blip, words)
    source = Scenes("val", image_size=16, style="single")
    found = run(model, params, words, "retrieval", "scenes", source=source, rerank=k)
    said = [source[i].captions[0] for i in range(COUNT)]
    assert len(set(said)) == COUNT
    tokens, pixels = words(said), seen(*(source[i].image for i in range(COUNT)))

    @jax.jit
    def all_pairs(pixels, ids, mask):
        def forward(module):
            states = module.encode_image(pixels)
            texts = module.embed_text(module.encode_text(ids, mask))
            every = [
                module.match(states, *(jnp.tile(x[t : t + 1], (COUNT, 1)) for x in (ids, mask)))
                for t in range(COUNT)
            ]
            return module.embed_image(states) @ texts.T, jnp.stack(every, axis=1)[..., 1]

        return model.apply({"params": params}, method=forward)

    cosines, matches = (
        np.asarray(x, np.float64) for x in all_pairs(pixels, tokens["input_ids"], tokens["attention_mask"])
    )
    for name, cosine, match in (
        ("image_to_text", cosines, matches), ("text_to_image", cosines.T, matches.T),
    ):  # fmt: skip
        ranks = []
        for query in range(COUNT):
            near = np.argsort(-cosine[query])[:k]
            again = near[np.argsort(-(match + cosine)[query, near])]
            order = [*again.tolist(), *[c for c in np.argsort(-cosine[query]) if c not in near]]
            ranks.append(order.index(query))
        for cut in (1, 5, 10):
            assert found.metrics[f"{name}_r{cut}"] == pytest.approx(np.mean(np.array(ranks) < cut))


def test_pairs_to_match_are_those_near_either_way():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(7, 4)).astype(np.float32), rng.normal(size=(9, 4)).astype(np.float32)
    cosines, wanted = images @ texts.T, set()
    for image in range(7):
        wanted |= {image * 9 + int(t) for t in np.argsort(-cosines[image])[:2]}
    for one in range(9):
        wanted |= {int(i) * 9 + one for i in np.argsort(-cosines[:, one])[:2]}
    assert pairs_to_match(images, texts, 2).tolist() == sorted(wanted)


def test_another_model_cannot_look_twice(words, answerer):
    with pytest.raises(DataError, match="BlipVqa has no match; only BLIP"):
        run(*answerer, words, "retrieval", "scenes:val", rerank=4)
