"""T5 against transformers: logits, loss and all gradients, what it writes, cached or not, files both ways."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_t5
import torch
import transformers
from compare import close, compiled, gradients
from transformers.models.t5.modeling_t5 import T5Attention

from vlmjax import decode, hub
from vlmjax.errors import HubError, UserError
from vlmjax.hub import t5 as table
from vlmjax.models.t5 import decoder_ids
from vlmjax.ops.relative import distance_buckets

TOLERANCE = 2e-5
EVERY = pytest.mark.parametrize("name", list(tiny_t5.CASES))
FLAN, FIRST, _ = tiny_t5.CASES


@functools.cache
def reference_of(name):
    return tiny_t5.model(name)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function from a case to our model and its parameters."""
    return functools.cache(
        lambda name: hub.load(tiny.folder_of(reference_of(name), tmp_path_factory.mktemp("t5")))
    )


def apply(model, params, inputs):
    return np.asarray(compiled(lambda p, x: model.apply({"params": p}, **x))(params, inputs))


@EVERY
@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(name, side, load):
    model, params = load(name)
    inputs, labels = tiny_t5.texts(side), tiny_t5.labels()
    answers = {
        "decoder_input_ids": np.asarray(decoder_ids(labels, model.config)),
        "decoder_attention_mask": (labels != -100).astype(np.int32),
    }
    with torch.no_grad():
        expected = reference_of(name)(**tiny.to_torch(inputs | answers)).logits.numpy()
    real = labels != -100
    close(apply(model, params, inputs | answers)[real], expected[real], TOLERANCE)


@EVERY
@pytest.mark.slow
def test_loss_and_every_gradient(name, load):
    model, params = load(name)
    inputs, labels, reference = tiny_t5.texts(), tiny_t5.labels(), reference_of(name)
    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs | {"labels": labels})).loss
    expected.backward()

    def loss(params):
        answers = decoder_ids(labels, model.config)
        logs = jax.nn.log_softmax(model.apply({"params": params}, **inputs, decoder_input_ids=answers))
        right = jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], axis=2)[..., 0]
        return -jnp.where(labels >= 0, right, 0.0).sum() / float((labels >= 0).sum())

    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, expected, TOLERANCE)
    # A bias of no key: `turned` says that keys have gradients of their own, as those of rotary positions.
    assert gradients(model, grads, reference, turned=True) == len(list(reference.parameters()))


@EVERY
def test_written_token_by_token_it_is_the_same(name, load):
    """A part of an answer, then token by token; padding may stand between a row's tokens."""
    model, params = load(name)
    texts, answers = tiny_t5.texts(), np.asarray(decoder_ids(tiny_t5.labels(), model.config))
    whole = apply(model, params, texts | {"decoder_input_ids": answers})
    spread = np.insert(answers, [4, 4, 4], 9, axis=1)
    real = np.insert(np.ones_like(answers), [4, 4, 4], 0, axis=1)
    places = np.insert(np.tile(np.arange(15, dtype=np.int32), (3, 1)), [4, 4, 4], 0, axis=1)

    @compiled
    def run(params):
        def write(module):
            states = module.encode(module.embed(texts["input_ids"]), texts["attention_mask"])
            cache, out, context = module.empty_cache(3, 20), [], (states, texts["attention_mask"])
            for start, end in ((0, 7), *((at, at + 1) for at in range(7, 18))):
                words = module.embed(spread[:, start:end])
                mask, where = (jnp.asarray(x[:, start:end]) for x in (real, places))
                hidden, cache = module.decode(words, mask, *context, cache=cache, positions=where)
                out.append(module.logits(hidden))
                context = (None, None)
            return jnp.concatenate(out, axis=1)

        return model.apply({"params": params}, method=write)

    close(np.asarray(run(params))[:, real[0] == 1], whole, TOLERANCE)


@pytest.mark.parametrize("name", [FLAN, FIRST])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "repetition_penalty": 1.3},
        pytest.param(
            {"num_beams": 4, "length_penalty": -1.0, "repetition_penalty": 1.4}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"num_beams": 3, "length_penalty": 1.0, "repetition_penalty": 1.5}, marks=pytest.mark.slow
        ),
    ],
)
def test_what_is_written(name, options, load):
    model, params = load(name)
    inputs = tiny_t5.texts()
    given = options | {"do_sample": False, "max_new_tokens": 9}
    expected = reference_of(name).generate(**tiny.to_torch(inputs), **given).numpy()[:, 1:]
    pad = tiny_t5.PAD if options["num_beams"] == 1 else tiny_t5.END  # decode/beams.py
    found = decode.generate(model, params, **inputs, **given, eos_token_id=tiny_t5.END, pad_token_id=pad)
    np.testing.assert_array_equal(np.asarray(found)[:, : expected.shape[1]], expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3 and len(np.unique(expected)) > 3


@pytest.mark.slow
def test_ranked_answers(load):
    model, params = load(FLAN)
    inputs, labels = tiny_t5.texts(), tiny_t5.labels()[:, :8]
    candidates = np.where(labels < 0, 0, labels)
    mask = (labels >= 0).astype(np.int32)
    found = decode.rank(model, params, candidates, mask, **inputs).sums
    for row in range(3):
        texts = {name: value[row : row + 1] for name, value in inputs.items()}
        for column in range(3):
            wanted = torch.from_numpy(labels[column : column + 1].astype(np.int64))
            with torch.no_grad():
                loss = reference_of(FLAN)(**tiny.to_torch(texts), labels=wanted).loss
            np.testing.assert_allclose(found[row, column], -float(loss) * mask[column].sum(), rtol=1e-5)


@EVERY
def test_an_exported_folder_is_the_one_that_was_read(name, load, tmp_path):
    """transformers loads it without a word and computes the same; read again, no bit has changed."""
    model, params = load(name)
    hub.save(model, params, tmp_path)
    loaded, info = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    reference = reference_of(name)
    assert loaded.config.dense_act_fn == reference.config.dense_act_fn
    assert loaded.config.scale_decoder_outputs == reference.config.scale_decoder_outputs
    for key, value in reference.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    inputs = tiny.to_torch(tiny_t5.texts() | {"labels": tiny_t5.labels()})
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, reference(**inputs).logits)
    again, same = hub.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), same, params))


def test_older_files(load, tmp_path):
    """tie_word_embeddings says that states are scaled; the embedding is there three times, and an unread table."""
    model, params = load(FLAN)
    hub.save(model, params, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("scale_decoder_outputs", "dense_act_fn", "is_gated_act", "num_decoder_layers"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    from safetensors.numpy import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    for stack in ("encoder", "decoder"):
        tensors[f"{stack}.embed_tokens.weight"] = tensors["shared.weight"].copy()
    tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = np.zeros(
        (8, 3), np.float32
    )
    save_file(tensors, tmp_path / "model.safetensors")
    again, same = hub.load(tmp_path)
    assert again.config == model.config
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), same, params))
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(HubError, match=r"lm_head\.weight differs from shared\.weight"):
        hub.load(tmp_path)


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (16, 128), (8, 12), (4, 9), (32, 100)])
def test_buckets_of_distances(buckets, distance):
    far = torch.arange(3 * distance)
    theirs = T5Attention._relative_position_bucket(-far, False, buckets, distance).numpy()
    ours = distance_buckets(buckets, distance)
    np.testing.assert_array_equal(ours[np.minimum(np.arange(3 * distance), distance)], theirs)


def test_defaults_are_those_of_transformers():
    theirs = transformers.T5Config()
    assert {key: getattr(theirs, key) for key in table.DEFAULTS} == table.DEFAULTS


def test_wrong_use_is_refused(load):
    model, params = load(FLAN)
    with pytest.raises(UserError, match="decoder_input_ids is missing"):
        model.apply({"params": params}, tiny_t5.texts()["input_ids"])
    with pytest.raises(UserError, match=r"input_ids has shape \(\)"):
        decode.generate(model, params, max_new_tokens=2)
    with pytest.raises(UserError, match=r"attention_mask has shape \(3, 2\)"):
        decode.generate(
            model,
            params,
            max_new_tokens=2,
            input_ids=tiny_t5.texts()["input_ids"],
            attention_mask=np.ones((3, 2), np.int32),
        )
