"""BertModel: outputs and all gradients equal transformers', with token types and padding."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import torch
import transformers
from compare import close, compiled, forward, gradients, run_exported

from vlmjax import hub
from vlmjax.hub import bert, clip


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    reference = tiny.bert()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("bert")))


@pytest.fixture(scope="module")
def inputs():
    ids, mask = tiny.texts(4, 15, 83, eos=4)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 3).astype(np.int32)}


def test_outputs(pair, inputs):
    reference, model, params = pair
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs))
    out = forward(model, params, inputs)
    close(out.last_hidden_state, expected.last_hidden_state)
    close(out.pooler_output, expected.pooler_output)


def test_ids_alone_and_other_positions(pair, inputs):
    reference, model, params = pair
    ids = {"input_ids": inputs["input_ids"]}
    places = ids | {"position_ids": np.arange(15, dtype=np.int32)[None, ::-1] + 3}
    for given in (ids, places):
        with torch.no_grad():
            expected = reference(**tiny.to_torch(given))
        close(forward(model, params, given).last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("pad", [4, None])
def test_every_gradient(pad, inputs, tmp_path):
    """With a padding id its row of the word table is held still; without one it is trained."""
    reference = tiny.bert(pad_token_id=pad)
    model, params = hub.load(tiny.folder_of(reference, tmp_path))
    weight = np.random.default_rng(5).normal(size=(4, 15, 30)).astype(np.float32)

    def loss(params):
        out = model.apply({"params": params}, **inputs)
        return (out.last_hidden_state * weight).sum() + out.pooler_output.sum()

    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs))
    total = (expected.last_hidden_state * torch.from_numpy(weight)).sum() + expected.pooler_output.sum()
    total.backward()
    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, total)
    assert gradients(model, grads, reference) == len(list(reference.parameters()))
    padding_row = np.asarray(grads["embeddings"]["word_embeddings"])[4]
    assert (np.abs(padding_row).max() == 0) == (pad is not None)


def test_exported_folder_gives_the_same_in_transformers(pair, inputs, tmp_path):
    _, model, params = pair
    hub.save(model, params, tmp_path)
    ours = forward(model, params, inputs)
    for cls in (transformers.BertModel, transformers.AutoModel):
        theirs = run_exported(cls, tmp_path, inputs)
        close(theirs.last_hidden_state, ours.last_hidden_state, 1e-5)
        close(theirs.pooler_output, ours.pooler_output, 1e-5)


def test_the_encoder_of_a_pretraining_folder(inputs, tmp_path):
    """google-bert/bert-base-uncased is one: a `bert.` prefix, and heads that stay behind."""
    reference = tiny.redraw(transformers.BertForPreTraining(transformers.BertConfig(**tiny.BERT)))
    model, params = hub.load(tiny.folder_of(reference, tmp_path))
    with torch.no_grad():
        expected = reference.bert(**tiny.to_torch(inputs))
    close(forward(model, params, inputs).pooler_output, expected.pooler_output)


def test_defaults_are_those_of_transformers():
    for cls, defaults in (
        (transformers.CLIPVisionConfig, clip.VISION_DEFAULTS),
        (transformers.CLIPTextConfig, clip.TEXT_DEFAULTS),
        (transformers.BertConfig, bert.DEFAULTS),
    ):
        theirs = cls()
        assert {key: getattr(theirs, key) for key in defaults} == defaults
