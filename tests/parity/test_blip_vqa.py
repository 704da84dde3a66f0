"""BlipForQuestionAnswering: loss, gradients, written and ranked answers, files."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import torch
import transformers
from compare import close, compiled, gradients

from vlmjax import decode, hub
from vlmjax.errors import HubError, UserError
from vlmjax.hub import folder
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip_tasks import BlipVqa

TOLERANCE = 2e-5
ENDS = {"eos_token_id": tiny_blip.SEP, "pad_token_id": tiny_blip.PAD}
# Beams of transformers pad with the end token where the padding token is 0 (decode/beams.py).
ENDS_OF = {1: ENDS, 3: ENDS | {"pad_token_id": tiny_blip.SEP}}
QUESTIONS = tiny_blip.texts(first=3)
ANSWERS = {
    "ids": np.array(
        [[20, 7, 0, 0], [21, 22, 7, 0], [20, 31, 32, 7], [44, 7, 0, 0], [45, 46, 7, 0]], np.int32
    ),
    "mask": np.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], np.int32),
}


@pytest.fixture(scope="module")
def trio(tmp_path_factory):
    """transformers' model, ours, its parameters."""
    reference = tiny_blip.answerer()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("blip")))


@pytest.fixture(scope="module")
def inputs():
    answers = tiny_blip.texts()
    names = {"decoder_input_ids": "input_ids", "decoder_attention_mask": "attention_mask"}
    answers = {name: answers[theirs] for name, theirs in names.items()}
    return {"pixel_values": tiny_blip.images(), **QUESTIONS, **answers}


@pytest.mark.slow
def test_loss_and_every_gradient(trio, inputs):
    reference, model, params = trio
    labels = np.where(inputs["decoder_attention_mask"] == 1, inputs["decoder_input_ids"], -100)
    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs | {"labels": labels})).loss
    expected.backward()

    def loss(params):
        return tiny_blip.smoothed(model.apply({"params": params}, **inputs), labels)

    value, grads = compiled(jax.value_and_grad(loss))(params)
    close(value, expected, TOLERANCE)
    assert gradients(model, grads, reference) == len(list(reference.named_parameters()))


def test_with_a_mask_an_answer_does_not_see_padding(trio, inputs):
    """transformers 5 lets it: the mask does not arrive at cross-attention there."""
    _, model, params = trio
    run = compiled(lambda p, x: model.apply({"params": p}, **x))
    masked = run(params, inputs | {"cross_attention_mask": inputs["attention_mask"]})
    for row, length in enumerate(inputs["attention_mask"].sum(axis=1)):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        real = inputs["decoder_attention_mask"][row] == 1
        close(np.asarray(masked[row])[real], np.asarray(run(params, alone)[0])[real], TOLERANCE)
    difference = np.abs(np.asarray(run(params, inputs) - masked))[:2].max()
    assert difference > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_written_answers(trio, beams):
    reference, model, params = trio
    given = {"pixel_values": tiny_blip.images(), **QUESTIONS}
    # Without a penalty a random model says one word for ever.
    options = {"num_beams": beams, "repetition_penalty": 1.7, "do_sample": False}
    expected = reference.generate(**tiny.to_torch(given), **options, max_length=10).numpy()[:, 1:]
    ones = np.ones_like(QUESTIONS["input_ids"])
    found = decode.generate(
        model, params, **given, **options, **ENDS_OF[beams], max_new_tokens=9, cross_attention_mask=ones
    )
    np.testing.assert_array_equal(np.asarray(found)[:, : expected.shape[1]], expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3 and len(np.unique(expected)) > 4
    other = decode.generate(model, params, **given, **options, **ENDS_OF[beams], max_new_tokens=9)
    assert (np.asarray(other) != np.asarray(found)).any()  # where padding of a question is not seen


def scores_of(reference, smoothing):
    """Log-likelihoods of all answers, [3, 5], one row at a time: the class's own loss, summed over an answer."""
    decoder, torched = (
        reference.text_decoder,
        tiny.to_torch({"pixel_values": tiny_blip.images(), **QUESTIONS}),
    )
    decoder.label_smoothing = smoothing
    found = np.zeros((3, 5))
    for row in range(3):
        length = int(QUESTIONS["attention_mask"][row].sum())
        images = reference.vision_model(torched["pixel_values"][row : row + 1]).last_hidden_state
        question = torched["input_ids"][row : row + 1, :length]
        states = reference.text_encoder(question, encoder_hidden_states=images).last_hidden_state
        for column, (ids, mask) in enumerate(zip(ANSWERS["ids"], ANSWERS["mask"], strict=True)):
            tokens = torch.tensor([[tiny_blip.DEC, *ids[mask == 1].tolist()]])
            loss = decoder(tokens, encoder_hidden_states=states, labels=tokens, reduction="none").loss
            found[row, column] = -float(loss[0])
    decoder.label_smoothing = 0.1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ranked_answers(trio, smoothing):
    """All of them; and as BLIP does, those whose first token is likeliest, answers that share it included."""
    reference, model, params = trio
    given = {"pixel_values": tiny_blip.images(), **QUESTIONS, "label_smoothing": smoothing}
    with torch.no_grad():
        expected = scores_of(reference, smoothing)
    found = decode.rank(model, params, ANSWERS["ids"], ANSWERS["mask"], **given)
    close(found.sums, expected.astype(np.float32), 1e-4)
    few = np.asarray(decode.rank(model, params, ANSWERS["ids"], ANSWERS["mask"], top=3, **given).sums)
    starts = decode.rank(model, params, ANSWERS["ids"][:, :1], **given | {"label_smoothing": 0.0}).sums
    for row in range(3):
        kept = np.flatnonzero(np.isfinite(few[row]))
        assert len(kept) == 3
        assert set(kept) == set(np.argsort(-np.asarray(starts)[row], kind="stable")[:3])
        close(few[row][kept], np.asarray(found.sums)[row][kept], 1e-5)
    with pytest.raises(UserError, match="top is 0"):
        decode.rank(model, params, ANSWERS["ids"], top=0, **given)


def test_questions_begin_with_enc_where_the_folder_says_so(trio, inputs):
    _, model, params = trio
    ours = BlipVqa(dataclasses.replace(model.config, enc_token_id=tiny_blip.ENC))
    pixels = inputs["pixel_values"]

    def states(module, ids):
        return module.encode_question(module.encode_image(pixels), ids, QUESTIONS["attention_mask"])

    replaced = QUESTIONS["input_ids"].copy()
    replaced[:, 0] = tiny_blip.ENC
    expected = model.apply({"params": params}, replaced, method=states)
    close(ours.apply({"params": params}, QUESTIONS["input_ids"], method=states), expected, 1e-6)


def test_written_read_and_written_again_is_the_same(trio, tmp_path):
    reference, model, params = trio
    hub.save(model, params, tmp_path / "one")
    again, same = hub.load(tmp_path / "one")
    assert isinstance(again, BlipVqa) and again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, same, params)
    hub.save(again, same, tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    read, info = transformers.BlipForQuestionAnswering.from_pretrained(
        tmp_path / "one", output_loading_info=True
    )
    assert not any(info.values()), info
    theirs, ours = reference.state_dict(), read.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_widths_that_differ_are_refused(trio, tmp_path):
    """ViT-L beside BERT-base: the class gives question encoder and answer decoder one configuration."""
    text = BertConfig(24, 2, 2, 40, vocab_size=tiny_blip.VOCAB, max_length=40, type_vocab_size=None)
    model = BlipVqa(dataclasses.replace(trio[1].config, text=text))
    params = jax.tree.map(
        lambda x: np.zeros(x.shape, np.float32), folder.abstract_params(folder.blip.VQA, model)
    )
    with pytest.raises(HubError, match="image tower is 36 wide, the text transformer 24"):
        hub.save(model, params, tmp_path)


def test_wrong_use_is_refused(trio):
    _, model, params = trio
    given = {"pixel_values": tiny_blip.images(), "max_new_tokens": 2}
    for more, message in (
        ({}, "input_ids is missing"),
        (QUESTIONS | {"cross_attention_mask": np.ones((3, 2), np.int32)}, r"cross_attention_mask \(3, 2\)"),
    ):
        with pytest.raises(UserError, match=message):
            decode.generate(model, params, **given, **more)
    with pytest.raises(UserError, match="decoder_input_ids is missing"):
        model.apply({"params": params}, tiny_blip.images(), **QUESTIONS)
