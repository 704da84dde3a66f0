"""Blip2ForImageTextRetrieval: matching and cosine scores, writing, gradients, files; a model in pretraining too."""

import dataclasses
import json

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import tiny_blip2
import torch
import transformers
from compare import close, compiled, gradients
from transformers.models.bert.modeling_bert import BertOnlyMLMHead

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import blip2, folder, table
from vlmjax.hub.bert import language_head_rows
from vlmjax.models.blip2 import Blip2, Blip2Retriever
from vlmjax.models.blip2_config import blip2_vit

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """transformers' model, ours, its parameters."""
    reference = tiny_blip2.retriever()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("blip2")))


@pytest.fixture(scope="module")
def inputs():
    return {"pixel_values": tiny_blip2.images(), **tiny_blip2.texts()}


@pytest.mark.parametrize("use_itm_head", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_scores(trio, use_itm_head, side):
    reference, model, params = trio
    inputs = {"pixel_values": tiny_blip2.images(), **tiny_blip2.texts(side)}
    with torch.no_grad():
        expected = reference(
            **tiny.to_torch(inputs), use_image_text_matching_head=use_itm_head
        ).logits_per_image
    found = compiled(lambda p, x: model.apply({"params": p}, **x, use_itm_head=use_itm_head))(params, inputs)
    close(found, expected, TOLERANCE)
    assert np.ptp(np.asarray(found)) > 0.05


@pytest.mark.slow
def test_every_gradient(trio, inputs):
    """Of both scores together, each in some direction: every parameter but the temperature has one."""
    reference, model, params = trio
    rng, kinds = np.random.default_rng(0), (True, False)
    weights = [rng.normal(size=(3, columns)).astype(np.float32) for columns in (2, 3)]
    reference.zero_grad()
    for kind, weight in zip(kinds, weights, strict=True):
        scores = reference(**tiny.to_torch(inputs), use_image_text_matching_head=kind).logits_per_image
        (scores * torch.from_numpy(weight)).sum().backward()

    def loss(params):
        scores = [model.apply({"params": params}, **inputs, use_itm_head=kind) for kind in kinds]
        return sum((score * weight).sum() for score, weight in zip(scores, weights, strict=True))

    grads = compiled(jax.grad(loss))(params)
    assert float(grads.pop("temp")) == 0.0
    assert gradients(model, grads, reference) == len(list(reference.named_parameters()))


def pretraining(model, params, seed=9):
    """A Blip2 with the retriever's parameters and a head, and that head in transformers."""
    bert = model.config.qformer.bert
    sizes = {"vocab_size": bert.vocab_size, "hidden_size": bert.width, "layer_norm_eps": bert.layer_norm_eps}
    head = tiny_blip.redraw(BertOnlyMLMHead(transformers.BertConfig(**sizes)), seed)
    whole = Blip2(model.config)
    head.predictions.decoder.bias = head.predictions.bias
    state, flat = dict(head.named_parameters()), {}
    for row in language_head_rows("predictions", "head/"):
        flat[row.path] = row.transform.from_hf(state[row.hf].detach().numpy())
    return whole, {**params, **table.unflatten(flat)}, head


def test_writing(trio, inputs):
    """No class of transformers writes: its Q-Former under the mask of figure 2 with BERT's head is the reference."""
    reference, model, params = trio
    whole, params, head = pretraining(model, params)
    torched, queries = tiny.to_torch(inputs), tiny_blip2.QUERIES
    ids, kept = torched["input_ids"].clone(), torched["attention_mask"].bool()
    ids[:, 0] = tiny_blip2.DEC
    tokens = ids.shape[1]
    mask = torch.zeros(3, queries + tokens, queries + tokens, dtype=torch.bool)
    mask[:, :, :queries] = True
    mask[:, queries:, queries:] = torch.tril(torch.ones(tokens, tokens, dtype=torch.bool)) & kept[:, None]
    with torch.no_grad():
        images = reference.vision_model(torched["pixel_values"]).last_hidden_state
        words = reference.embeddings(
            input_ids=ids, query_embeds=reference.query_tokens.expand(3, queries, -1)
        )
        states = reference.qformer(
            query_embeds=words,
            query_length=queries,
            attention_mask=mask[:, None],
            encoder_hidden_states=images,
        ).last_hidden_state[:, queries:]
        head.predictions.decoder.weight = reference.embeddings.word_embeddings.weight
        expected = head(states)
    labels = np.where(inputs["attention_mask"] == 1, ids.numpy(), -100)
    loss = torch.nn.functional.cross_entropy(
        expected[:, :-1].reshape(-1, tiny_blip2.VOCAB),
        torch.from_numpy(labels)[:, 1:].reshape(-1),
        label_smoothing=0.1,
    )

    def write(module):
        texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return module.logits(module.decode_text(module.encode_image(inputs["pixel_values"]), **texts))

    found = compiled(lambda p: whole.apply({"params": p}, method=write))(params)
    real = inputs["attention_mask"] == 1
    close(np.asarray(found)[real], expected.numpy()[real], TOLERANCE)
    close(tiny_blip.smoothed(found, labels), loss, TOLERANCE)


def test_written_read_and_written_again_is_the_same(trio, tmp_path):
    reference, model, params = trio
    params = params | {"temp": np.float32(0.0312)}
    hub.save(model, params, tmp_path / "one")
    again, same = hub.load(tmp_path / "one")
    assert type(again) is Blip2Retriever and again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    hub.save(again, same, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    read, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(
        tmp_path / "one", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = reference.state_dict(), read.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_a_model_in_pretraining_is_a_retriever_with_its_head_beside(trio, tmp_path):
    whole, params, _ = pretraining(*trio[1:])
    hub.save(whole, params, tmp_path)
    again, same = hub.load(tmp_path)
    assert type(again) is Blip2 and again.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    _, info = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    (tmp_path / folder.EXTRA).unlink()
    with pytest.raises(HubError, match=folder.EXTRA):
        hub.load(tmp_path)
    hub.save(Blip2Retriever(whole.config), {k: v for k, v in params.items() if k != "head"}, tmp_path)
    assert type(hub.load(tmp_path)[0]) is Blip2Retriever


def test_another_epsilon_is_kept_and_said(trio, tmp_path, caplog):
    """LAVIS normalises what the tower leaves with 1e-5, transformers with the tower's 1e-6."""
    _, model, params = trio
    assert model.config.ln_vision_eps == 1e-6
    changed = Blip2Retriever(dataclasses.replace(model.config, ln_vision_eps=1e-5))
    assert not caplog.records
    hub.save(changed, params, tmp_path)
    assert "epsilon 1e-05" in caplog.text
    assert hub.load_model(tmp_path).config == changed.config


def test_what_the_class_cannot_express_is_refused(trio, tmp_path):
    _, model, params = trio
    tower = blip2_vit("clip-l", 15, width=36, depth=2, heads=3, mlp_dim=50, patch_size=5)
    other = Blip2Retriever(dataclasses.replace(model.config, image=tower))
    with pytest.raises(HubError, match="Blip2VisionModel has pre_norm False only"):
        hub.save(other, params, tmp_path)
    hub.save(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        (
            {"qformer_config": config["qformer_config"] | {"use_qformer_text_input": False}},
            "cannot read texts",
        ),
        ({"vision_config": config["vision_config"] | {"qkv_bias": False}}, "qkv_bias is False"),
        ({"vlmjax_form": "half"}, "vlmjax_form is 'half'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(HubError, match=message):
            hub.load(tmp_path)


def test_defaults_are_those_of_transformers():
    for cls, defaults in (
        (transformers.Blip2VisionConfig, blip2.VISION_DEFAULTS),
        (transformers.Blip2QFormerConfig, blip2.QFORMER_DEFAULTS),
        (transformers.Blip2Config, blip2.DEFAULTS),
    ):
        theirs = cls()
        assert {key: getattr(theirs, key) for key in defaults} == defaults
