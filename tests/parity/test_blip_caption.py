"""BlipForConditionalGeneration: logits, loss, gradients, generated tokens, files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import torch
import transformers
from compare import close, compiled, gradients
from safetensors.numpy import load_file, save_file

from vlmjax import decode, hub
from vlmjax.errors import HubError, UserError
from vlmjax.hub import blip
from vlmjax.models import med
from vlmjax.models.blip import BlipCaptioner

TOLERANCE = 2e-5
PROMPT = {"input_ids": np.array([[3, 11, 12, 13, tiny_blip.SEP]] * 3, np.int32)}  # [CLS] a picture of [SEP]
ENDS = {"eos_token_id": tiny_blip.SEP, "pad_token_id": tiny_blip.PAD}
# Beams of transformers pad with the end token where the padding token is 0 (decode/beams.py).
ENDS_OF = {1: ENDS, 3: ENDS | {"pad_token_id": tiny_blip.SEP}}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """transformers' model, ours, its parameters."""
    reference = tiny_blip.captioner()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("blip")))


def scores(model, params, inputs):
    return compiled(lambda p, x: model.apply({"params": p}, **x))(params, inputs)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits(trio, side):
    reference, model, params = trio
    inputs = {"pixel_values": tiny_blip.images(), **tiny_blip.texts(side)}
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs)).logits.numpy()
    found = np.asarray(scores(model, params, inputs))
    real = inputs["attention_mask"] == 1
    close(found[real], expected[real], TOLERANCE)
    other = np.asarray(scores(model, params, inputs | {"pixel_values": -inputs["pixel_values"]}))
    assert np.abs(other - found)[real].max() > 0.1  # the image is seen


def test_images_of_another_shape(trio):
    """A grid of 3 by 7 patches: positions pass the bicubic kernel."""
    reference, model, params = trio
    inputs = {"pixel_values": tiny_blip.images(3, 12, 28), **tiny_blip.texts()}
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs), interpolate_pos_encoding=True).logits.numpy()
    real = inputs["attention_mask"] == 1
    close(np.asarray(scores(model, params, inputs))[real], expected[real], TOLERANCE)


@pytest.mark.slow
def test_loss_and_every_gradient(trio):
    """Label smoothing of 0.1; words of the prompt do not count."""
    reference, model, params = trio
    inputs = {"pixel_values": tiny_blip.images(), **tiny_blip.texts()}
    labels = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[:, :2] = -100
    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs), labels=torch.from_numpy(labels.astype(np.int64))).loss
    expected.backward()

    def loss(params):
        return tiny_blip.smoothed(model.apply({"params": params}, **inputs), labels)

    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, expected, TOLERANCE)
    assert gradients(model, grads, reference) == len(list(reference.named_parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompted", [True, False])
def test_generated_tokens(trio, beams, prompted):
    """[CLS] becomes [DEC] and [SEP] goes; transformers does so in place, here the caller's ids stay as they are."""
    reference, model, params = trio
    pixels = tiny_blip.images()
    given = PROMPT if prompted else {}
    begun = 4 if prompted else 1
    # Without a penalty a random model says one word for ever.
    options = {"num_beams": beams, "repetition_penalty": 1.7, "do_sample": False}
    expected = reference.generate(
        **tiny.to_torch({"pixel_values": pixels, **{k: v.copy() for k, v in given.items()}}),
        **options, max_length=16, min_length=6,
    ).numpy()[:, begun:]  # fmt: skip
    before = PROMPT["input_ids"].copy()
    found = decode.generate(
        model, params, pixel_values=pixels, **given, **options, **ENDS_OF[beams], max_new_tokens=16 - begun,
        min_new_tokens=6 - begun,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(found)[:, : expected.shape[1]], expected)
    np.testing.assert_array_equal(PROMPT["input_ids"], before)
    assert len({tuple(row) for row in expected.tolist()}) == 3 and len(np.unique(expected)) > 4


@pytest.mark.slow
def test_a_row_ends_at_sep_and_not_too_early(trio):
    """With the head's bias towards [SEP], min_new_tokens decides how long a caption is."""
    reference, model, params = trio
    bias = params["text_model"]["head"]["bias"].at[tiny_blip.SEP].add(60.0)
    head = params["text_model"]["head"] | {"bias": bias}
    params = params | {"text_model": params["text_model"] | {"head": head}}
    for least, beams in ((0, 1), (3, 1), (3, 2)):
        found = decode.generate(
            model, params, pixel_values=tiny_blip.images(), **PROMPT, **ENDS, max_new_tokens=8, num_beams=beams,
            min_new_tokens=least,
        )  # fmt: skip
        np.testing.assert_array_equal((np.asarray(found) == tiny_blip.SEP).argmax(axis=1), least)
        assert (np.asarray(found)[:, least + 1 :] == tiny_blip.PAD).all()


def test_a_cache_changes_nothing(trio):
    """Tokens one by one, of twice as many rows as images, against the whole at once."""
    _, model, params = trio
    texts, pixels = tiny_blip.texts("left"), tiny_blip.images()
    ids = np.repeat(texts["input_ids"], 2, axis=0)
    ids[1::2] = np.where(np.repeat(texts["attention_mask"], 2, axis=0)[1::2], (ids[1::2] + 3) % 57 + 1, 0)
    mask = np.repeat(texts["attention_mask"], 2, axis=0)

    def whole(module):
        states = jnp.repeat(module.encode_image(pixels), 2, axis=0)
        text = module.text_model
        return text.logits(text.decode(text.embed(ids), mask, states)[0])

    def by_steps(module):
        text, states = module.text_model, module.encode_image(pixels)
        cache, out = med.init_cache(module.config.text, 6, 9), []
        for at in range(7):
            place = np.full((6, 1), at, np.int32)
            step = text.embed(ids[:, at : at + 1], place), mask[:, at : at + 1]
            hidden, cache = text.decode(*step, states if at == 0 else None, cache=cache)
            out.append(text.logits(hidden))
        return jnp.concatenate(out, axis=1)

    apply = compiled(lambda p: [model.apply({"params": p}, method=f) for f in (whole, by_steps)])
    expected, found = (np.asarray(x)[mask == 1] for x in apply(params))
    close(found, expected, 1e-5)


def test_more_tokens_than_positions_or_slots(trio):
    _, model, params = trio
    with pytest.raises(UserError, match="37 new ones are more than the model's 40 positions"):
        decode.generate(model, params, pixel_values=tiny_blip.images(), **PROMPT, max_new_tokens=37)
    with pytest.raises(UserError, match="pixel_values is missing"):
        decode.generate(model, params, **PROMPT, max_new_tokens=2)
    with pytest.raises(UserError, match="3 texts and 2 images"):
        decode.generate(model, params, pixel_values=tiny_blip.images(2), **PROMPT, max_new_tokens=2)


def test_decode_text_is_the_call_with_dec_in_place_of_the_first_token(trio):
    _, model, params = trio
    pixels = tiny_blip.images()

    def written(module, texts):
        return module.logits(module.decode_text(module.encode_image(pixels), **texts))

    for side in ("right", "left"):
        texts = tiny_blip.texts(side, first=3)
        found = compiled(lambda p, x: model.apply({"params": p}, x, method=written))(params, texts)
        expected = scores(model, params, {"pixel_values": pixels, **tiny_blip.texts(side)})
        real = texts["attention_mask"] == 1
        close(np.asarray(found)[real], np.asarray(expected)[real], TOLERANCE)


def test_written_read_and_written_again_is_the_same(trio, tmp_path):
    reference, model, params = trio
    hub.save(model, params, tmp_path / "one")
    again, same = hub.load(tmp_path / "one")
    assert isinstance(again, BlipCaptioner) and again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    hub.save(again, same, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    read, info = transformers.BlipForConditionalGeneration.from_pretrained(
        tmp_path / "one", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = reference.state_dict(), read.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    inputs = tiny.to_torch({"pixel_values": tiny_blip.images(), **tiny_blip.texts()})
    with torch.no_grad():
        assert torch.equal(read.eval()(**inputs).logits, reference(**inputs).logits)


def test_every_key_is_written_and_comes_back(trio, tmp_path):
    """None is left to the class's defaults, which are not those of the released networks."""
    reference, model, params = trio
    hub.save(model, params, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for part, cls, defaults in (
        ("text_config", transformers.BlipTextConfig, blip.TEXT_DEFAULTS),
        ("vision_config", transformers.BlipVisionConfig, blip.VISION_DEFAULTS),
        (None, transformers.BlipConfig, blip.DEFAULTS),
    ):
        theirs = cls()
        assert {key: getattr(theirs, key) for key in defaults} == defaults
        assert defaults.keys() <= (written if part is None else written[part]).keys()
    got = transformers.BlipConfig.from_pretrained(tmp_path)
    expected = reference.config
    for part in ("text_config", "vision_config"):
        before, after = (getattr(config, part).to_dict() for config in (expected, got))
        # What neither model uses: a projection that only BlipModel has, and how the parameters began.
        for unused in ("transformers_version", "dtype", "projection_dim", "initializer_range"):
            before.pop(unused, None), after.pop(unused, None)
        assert after == before
    assert got.image_text_hidden_size == 10


def test_files_that_hold_the_tied_tensors_and_buffers_too(trio, tmp_path):
    """As transformers 4 wrote them; a copy that differs is an error, not a choice."""
    _, model, params = trio
    hub.save(model, params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    head, table = "text_decoder.cls.predictions", "text_decoder.bert.embeddings.word_embeddings.weight"
    tensors |= {f"{head}.decoder.weight": tensors[table], f"{head}.decoder.bias": tensors[f"{head}.bias"]}
    tensors["text_decoder.bert.embeddings.position_ids"] = np.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    jax.tree.map(np.testing.assert_array_equal, hub.load(tmp_path)[1], params)
    tensors[f"{head}.decoder.weight"] = tensors[table] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match="differs from"):
        hub.load(tmp_path)


def test_a_loaded_folder_does_what_transformers_does_and_ours_keeps_its_first_token(trio, tmp_path):
    _, model, params = trio
    assert model.config.enc_token_id is None
    ours = BlipCaptioner(dataclasses.replace(model.config, enc_token_id=tiny_blip.ENC))
    hub.save(ours, params, tmp_path)
    assert hub.load(tmp_path)[0].config == ours.config
