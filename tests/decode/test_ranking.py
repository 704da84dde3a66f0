"""Ranking against whole forward passes of transformers, one for each pair of prompt and answer."""

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.decode.small_models import VOCAB, full_logits, pair, prompts
from vlmjax import decode
from vlmjax.errors import UserError

LENGTHS = (1, 4, 3, 2)


def answers():
    ids = np.random.default_rng(5).integers(4, VOCAB, (len(LENGTHS), 4)).astype(np.int32)
    return ids, (np.arange(4)[None, :] < np.array(LENGTHS)[:, None]).astype(np.int32)


def by_whole_passes(theirs, prompt, answer) -> float:
    logits = full_logits(theirs, [*prompt, *answer])[len(prompt) - 1 : -1].astype(np.float64)
    chosen = logits[np.arange(len(answer)), answer]
    return float((chosen - np.log(np.exp(logits).sum(-1))).sum())


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_sums_and_means(name):
    theirs, model, params = pair(name)
    inputs, (ids, mask) = prompts(), answers()
    found = decode.rank(model, params, ids, mask, **inputs)
    assert found.sums.shape == found.means.shape == (3, 4)
    for row in range(3):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        wanted = [
            by_whole_passes(theirs, prompt, one[:n].tolist()) for one, n in zip(ids, LENGTHS, strict=True)
        ]
        np.testing.assert_allclose(found.sums[row], wanted, rtol=2e-5)
        np.testing.assert_allclose(found.means[row], np.array(wanted) / LENGTHS, rtol=2e-5)


def test_each_prompt_its_own_answers_and_one_that_is_not_there():
    _, model, params = pair("llama")
    ids, mask = answers()
    shared = np.asarray(decode.rank(model, params, ids, mask, **prompts(side="right")).sums)
    own, kept = (np.stack([np.roll(x, row, axis=0) for row in range(3)]) for x in (ids, mask))
    kept[1, 2] = 0
    found = decode.rank(model, params, own, kept, **prompts())
    wanted = np.stack([np.roll(shared[row], row) for row in range(3)])
    wanted[1, 2] = -np.inf
    np.testing.assert_allclose(found.sums, wanted, rtol=1e-5)
    assert np.asarray(found.means)[1, 2] == -np.inf


def test_misuse_is_one_line():
    _, model, params = pair("llama")
    ids, mask = answers()
    for given, message in (
        (
            (ids[0],),
            "candidates_ids has shape (4,); give [candidates, tokens] or [batch, candidates, tokens]",
        ),
        (
            (ids[None],),
            "candidates_ids has shape (1, 4, 4); give [candidates, tokens] or [batch, candidates, tokens] with a batch",
        ),
        ((ids, mask[:1]), "candidates_mask has shape (1, 4), candidates_ids (4, 4)"),
        ((ids, mask[:, ::-1]), "padding before a token"),
    ):
        with pytest.raises(UserError) as error:
            decode.rank(model, params, *given, **prompts())
        assert message in str(error.value)
