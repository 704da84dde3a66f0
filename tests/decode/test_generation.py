"""Greedy and beams token for token as transformers generates; sampling by its distribution; stops; misuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tests.decode.small_models import MODELS, PAD, VOCAB, expected, pair, prompts
from vlmjax import decode
from vlmjax.decode import choosing, generation
from vlmjax.decode.options import Options
from vlmjax.decode.prompts import bucket, bucketed
from vlmjax.errors import UserError

NEW = 13
EOS = (2, 7, 9)


def ours(name, inputs, new=NEW, seed=0, weights=0, **options):
    _, model, params = pair(name, weights)
    out = decode.generate(
        model, params, max_new_tokens=new, seed=seed, **inputs, **{"pad_token_id": PAD} | options
    )
    assert out.shape == (len(inputs["input_ids"]), new) and out.dtype == np.int32
    return np.asarray(out)


def check(name, inputs, weights=0, **options):
    np.testing.assert_array_equal(
        ours(name, inputs, weights=weights, **options),
        expected(pair(name, weights)[0], inputs, NEW, **options),
    )


@functools.cache
def common_tokens(name, count=3):
    """Tokens that greedy answers come to after a few others: as eos they end rows in the middle."""
    plain = expected(pair(name)[0], prompts(), NEW)
    return tuple(int(row[at]) for row, at in zip(plain, (2, 5, 8), strict=True))[:count]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "llama" else []) for name in MODELS]
)
def test_greedy(name):
    check(name, prompts())
    check(name, prompts(), eos_token_id=list(common_tokens(name)))


def test_rows_end_at_different_places():
    ends = list(common_tokens("llama"))
    out = ours("llama", prompts(), eos_token_id=ends)
    lengths = [next((at + 1 for at, token in enumerate(row) if token in ends), NEW) for row in out]
    assert min(lengths) < NEW and len(set(lengths)) > 1
    assert all((row[n:] == PAD).all() for row, n in zip(out, lengths, strict=True))


def test_padding_on_either_side_and_other_rows_change_nothing():
    left = ours("llama", prompts())
    np.testing.assert_array_equal(left, ours("llama", prompts(side="right")))
    for row in range(3):
        real = prompts()["attention_mask"][row] == 1
        alone = {"input_ids": prompts()["input_ids"][row : row + 1, real]}
        np.testing.assert_array_equal(ours("llama", alone)[0], left[row])


def test_a_repetition_penalty():
    whole = {"input_ids": prompts()["input_ids"][:1]}
    whole["attention_mask"] = np.ones_like(whole["input_ids"])
    check("llama", whole, repetition_penalty=1.7)
    assert (ours("llama", whole, repetition_penalty=1.7) != ours("llama", whole)).any()
    padded = ours("llama", prompts(), repetition_penalty=1.7)
    np.testing.assert_array_equal(padded[:1], ours("llama", whole, repetition_penalty=1.7))
    ids, mask = (jnp.asarray(prompts()[name]) for name in ("input_ids", "attention_mask"))
    seen = np.asarray(choosing.seen_in(Options(repetition_penalty=1.7), ids, mask, VOCAB))
    for row in range(3):
        real = prompts()["input_ids"][row][prompts()["attention_mask"][row] == 1]
        assert set(np.flatnonzero(seen[row])) == set(real.tolist())


BEAMS = [
    {"num_beams": 2},
    pytest.param({"num_beams": 3, "length_penalty": 0.5, "early_stopping": True}, marks=pytest.mark.slow),
    pytest.param({"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", BEAMS, ids=str)
def test_beams(options):
    check("llama", prompts(), eos_token_id=list(EOS), **options)


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.5, 2.0])
@pytest.mark.parametrize("beams", [2, 4])
def test_beams_of_many_seeds(beams, penalty, early):
    for seed in range(4):
        for ends in ([2], list(range(2, 22))):
            check(
                "llama", prompts(seed), weights=seed % 2, num_beams=beams, eos_token_id=ends, length_penalty=penalty,
                early_stopping=early,
            )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beams", [1, 3])
def test_every_family_with_beams_and_penalty(name, beams):
    inputs = {"input_ids": prompts()["input_ids"][:1]}
    inputs["attention_mask"] = np.ones_like(inputs["input_ids"])
    check(name, inputs, num_beams=beams, repetition_penalty=1.3, eos_token_id=list(EOS))
    check(name, prompts(), num_beams=beams, eos_token_id=list(EOS))


def test_more_beams_find_likelier_answers():
    """No test of transformers' rules but of the search: sums of log-probabilities by whole forward passes."""
    theirs, model, params = pair("llama")
    mask = np.ones((3, NEW), np.int32)
    sums = []
    for beams in (1, 4):
        out = ours("llama", prompts(), num_beams=beams)
        sums.append(
            np.asarray(decode.rank(model, params, out[:, None], mask[:, None], **prompts()).sums)[:, 0]
        )
    assert (sums[1] >= sums[0] - 1e-4).all() and (sums[1] > sums[0] + 0.1).any()


def test_a_row_with_a_seed_of_its_own_draws_the_same_beside_whatever_rows():
    inputs, options = prompts(), {"do_sample": True, "temperature": 3.0, "eos_token_id": None}
    rows = len(inputs["input_ids"])
    seeds = np.arange(7, 7 + rows)
    whole = ours("llama", inputs, seed=seeds, **options)
    order = np.roll(np.arange(rows), 1)
    turned = {name: value[order] for name, value in inputs.items()}
    np.testing.assert_array_equal(ours("llama", turned, seed=seeds[order], **options), whole[order])
    assert (ours("llama", inputs, seed=seeds + 1, **options) != whole).any(axis=1).all()
    for wrong in ({"seed": seeds[:-1]}, {"seed": seeds, "num_beams": 2}):
        with pytest.raises(UserError, match="seed has shape"):
            ours("llama", inputs, **options | wrong)


def test_stop_sequences():
    plain = ours("llama", prompts())
    stop = plain[0, 4:6].tolist()
    out = ours("llama", prompts(), stop_sequences=[stop, [5, 5, 5, 5]])
    where = next(at for at in range(NEW - 1) if plain[0, at : at + 2].tolist() == stop)
    assert out[0].tolist() == plain[0, : where + 2].tolist() + [PAD] * (NEW - where - 2)
    # Neither the end of the prompt nor the padding of tokens that are still to come is part of a stop sequence.
    first, last = int(plain[0, 0]), int(prompts()["input_ids"][0, -1])
    none = ours("llama", prompts(), stop_sequences=[[last, first], [first, PAD]])
    np.testing.assert_array_equal(none[0], plain[0])


def test_adjusted_scores_are_those_of_transformers():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, VOCAB)).astype(np.float32) * 3
    ids = rng.integers(0, VOCAB, (5, 7))
    options = Options(do_sample=True, temperature=0.7, top_k=23, top_p=0.8, repetition_penalty=1.4)
    theirs = torch.from_numpy(scores)
    for processor in (
        RepetitionPenaltyLogitsProcessor(1.4), TemperatureLogitsWarper(0.7), TopKLogitsWarper(23), TopPLogitsWarper(0.8)
    ):  # fmt: skip
        theirs = processor(torch.from_numpy(ids), theirs)
    seen = choosing.seen_in(options, jnp.asarray(ids), jnp.ones(ids.shape, jnp.int32), VOCAB)
    found = np.asarray(jax.jit(functools.partial(choosing.adjusted, options))(jnp.asarray(scores), seen, 0))
    assert 1 < np.isfinite(found).sum() / 5 < 20
    np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-6)


@pytest.mark.slow
def test_samples_are_drawn_as_likely_as_they_are():
    theirs, _, _ = pair("llama")
    ids = np.repeat(prompts()["input_ids"][:1], 2000, axis=0)
    with torch.no_grad():
        wanted = torch.softmax(theirs(torch.from_numpy(ids[:1]).long()).logits[0, -1] / 2.0, -1).numpy()
    options = {"do_sample": True, "temperature": 2.0, "new": 1}
    drawn = ours("llama", {"input_ids": ids}, **options)[:, 0]
    counts = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    assert np.abs(counts - wanted).max() < 4 * np.sqrt(wanted.max() / 2000)
    np.testing.assert_array_equal(drawn, ours("llama", {"input_ids": ids}, **options)[:, 0])
    assert (drawn != ours("llama", {"input_ids": ids}, seed=1, **options)[:, 0]).any()
    wild = ours("llama", prompts(), do_sample=True, temperature=1e6)
    assert min(len(set(row.tolist())) for row in wild) > NEW // 2  # each step has draws of its own
    only = ours("llama", prompts(), do_sample=True, top_k=1)
    np.testing.assert_array_equal(only, ours("llama", prompts()))


def test_sampled_beams_are_real_hypotheses():
    out = ours("llama", prompts(), num_beams=3, do_sample=True, eos_token_id=list(EOS))
    np.testing.assert_array_equal(
        out, ours("llama", prompts(), num_beams=3, do_sample=True, eos_token_id=list(EOS))
    )
    assert (
        out != ours("llama", prompts(), num_beams=3, do_sample=True, eos_token_id=list(EOS), seed=5)
    ).any()


def test_lengths_share_programs():
    assert [bucket(n) for n in (1, 16, 17, 200, 256, 257, 600)] == [16, 16, 32, 256, 256, 512, 768]
    ours("llama", {"input_ids": np.full((1, 9), 5, np.int32)})
    square, types = np.ones((1, 9, 4, 3), np.float32), np.ones((1, 9), np.int32)
    more = bucketed({"input_ids": np.full((1, 9), 5), "pixel_values": square, "mm_token_type_ids": types})
    assert {k: v.shape[:2] for k, v in more.items()} == dict.fromkeys(more, (1, 16)) | {
        "pixel_values": (1, 9)
    }
    before = generation._program._cache_size()
    for tokens, new in ((3, 13), (16, 16), (11, 2)):
        ours("llama", {"input_ids": np.full((1, tokens), 5, np.int32)}, new=new)
    assert generation._program._cache_size() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; give 1 or more"),
        ({"temperature": 0.0}, "temperature is 0.0; give above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"early_stopping": "yes"}, "early_stopping is 'yes'; give False, True or 'never'"),
        ({"stop_sequences": [[]]}, "stop_sequences"),
        ({"input_ids": np.zeros((3,), np.int32)}, "input_ids has shape (3,)"),
        ({"attention_mask": np.ones((1, 9), np.int32)}, "attention_mask has shape (1, 9), input_ids (3, 9)"),
        ({"attention_mask": np.eye(3, 9, -1, dtype=np.int32)}, "row 0 of attention_mask is all padding"),
        ({"new": 0}, "max_new_tokens is 0"),
    ],
)
def test_misuse_is_one_line(changes, message):
    with pytest.raises(UserError) as error:
        ours(
            "llama",
            prompts() | {k: v for k, v in changes.items() if k in prompts()},
            **{k: v for k, v in changes.items() if k not in prompts()},
        )
    assert message in str(error.value)


def test_more_tokens_than_learned_positions():
    with pytest.raises(UserError, match="9 tokens and 60 new ones are more than the model's 64 positions"):
        ours("opt", prompts(), new=60)


def test_a_model_without_words():
    from vlmjax.models.vit import Vit, VitConfig

    with pytest.raises(UserError, match="Vit has no method `prepare`"):
        decode.generate(Vit(VitConfig(8, 1, 2, 8, 8, 4)), {}, max_new_tokens=2, **prompts())
