"""A folder of a vision-language model is spoken to by transformers as it is here: prompts, pixels, answers."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tokenizers
import transformers
from PIL import Image

from vlmjax import decode, hub
from vlmjax.data import bpe, text
from vlmjax.data.conversation import MARK, from_messages
from vlmjax.data.conversation_templates import TEMPLATES
from vlmjax.data.form import Form, cut, ends_of
from vlmjax.data.images import EvalTransform
from vlmjax.data.pieces import Pieces
from vlmjax.errors import HubError
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig, example_inputs

SIZE = EvalTransform(28, (28, 28))
WORDS = ["a red star", "Is there a grey seal? yes", "USER: ASSISTANT: what colour"] * 20


def closing(folder):
    """CLIP's kind: no case, no line breaks, and every text is closed."""
    bpe.train_bpe(WORDS, 560, str(folder), model_max_length=512)
    return text.with_token(text.load(folder, 512), MARK)


def llama_like(folder):
    """An opening token, bytes, control tokens of ChatML."""
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", MARK]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(WORDS, trainer)
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **roles)
    hf.save_pretrained(folder)
    return text.load(folder, 512)


@pytest.fixture(scope="module", params=[closing, llama_like])
def made(request, tmp_path_factory):
    """A random model, its parameters and its tokenizer."""
    tokenizer = request.param(tmp_path_factory.mktemp("words"))
    image = VitConfig(width=16, depth=2, heads=2, mlp_dim=24, image_size=28, patch_size=14)
    words = DecoderConfig(
        *(24, 2, 4, 2, 6, 32, tokenizer.vocab_size), max_length=512, bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Vlm(VlmConfig(image, words, BridgeConfig("mlp", 2), tokenizer.token_id(MARK)))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model.config)))["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    return model, params, tokenizer


def saved(made, form, path):
    model, params, tokenizer = made
    hub.save(model, params, path, tokenizer=tokenizer, image_processor=SIZE, form=form)
    return transformers.AutoProcessor.from_pretrained(path)


def picture():
    return np.random.default_rng(1).integers(0, 256, (33, 47, 3)).astype(np.uint8)


ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a red star?"}]}
TALK = [
    {"role": "user", "content": "Is there a seal?\n<image>"},
    {"role": "assistant", "content": " yes "},
    {"role": "user", "content": "what colour"},
]
IMAGE_FIRST = [{"role": "user", "content": "<image>\nIs there a red star?"}]
FORMS = [Form(name) for name in TEMPLATES]
FORMS += [
    Form("v1", image_first=True),
    Form("llama_2", 'Say "yes"\\no.\n', True),
    Form("chatml", "Be \\ 'brief'."),
]


def prompt_of(made, form, messages):
    model, _, tokenizer = made
    config = model.config
    numbers = {"image_tokens": config.image_tokens, "image_token_id": config.image_token_id}
    return form.prompt(from_messages(messages), Pieces(tokenizer), **numbers).tolist()


def test_prompts_are_those_of_training(made, tmp_path):
    """Every template, in one round with a typed image and in two rounds with the image named in the text."""
    for number, form in enumerate(FORMS):
        processor = saved(made, form, tmp_path / str(number))
        assert type(processor).__name__ == "LlavaProcessor"
        assert hub.load_form(tmp_path / str(number)) == form
        system = [{"role": "system", "content": "Nothing else."}]
        asked = [([ASKED], IMAGE_FIRST), (system + [ASKED], system + IMAGE_FIRST)]
        # A control token that the vocabulary lacks is words, which join with those beside them in a whole string.
        joins = form.template == "chatml_direct" and made[2].token_id("<|im_end|>") is None
        for messages, ours in asked + ([] if form.template == "plain" or joins else [(TALK, TALK)]):
            written = processor.apply_chat_template(messages, add_generation_prompt=True)
            found = processor(text=written, images=[picture()], return_tensors="np")
            assert found["input_ids"][0].tolist() == prompt_of(made, form, ours), (form, written)
        mine = SIZE.normalize(SIZE(picture()))[None].transpose(0, 3, 1, 2)
        assert np.abs(found["pixel_values"] - mine).max() < 1.01 / 255 / 0.25


def test_an_answer_belongs_to_the_conversation_once_it_is_given(made, tmp_path):
    """Without a prompt for an answer nothing of the assistant is written."""
    processor = saved(made, Form("v1"), tmp_path)
    words = processor.apply_chat_template(TALK[:1])
    assert words.endswith("USER: Is there a seal?\n<image>")
    end = processor.tokenizer.eos_token
    assert processor.apply_chat_template(TALK[:2]) == words + f" ASSISTANT: yes{end}"


@pytest.mark.parametrize("name", ["v1", "chatml"])
def test_answers_are_ours(made, name, tmp_path):
    """Of generate, of the pipeline, and of our own decoding; up to the same end."""
    form, (model, params, tokenizer) = Form(name), made
    processor = saved(made, form, tmp_path)
    pixels = SIZE.normalize(SIZE(picture()))[None, None]
    ends, stops = ends_of(form.template, Pieces(tokenizer))
    ids = np.array([prompt_of(made, form, IMAGE_FIRST)], np.int32)
    options = {"max_new_tokens": 12, "eos_token_id": ends}
    ours = decode.generate(model, jax.device_put(params), input_ids=ids, pixel_values=pixels, **options)
    ours = cut(tokenizer.decode(np.asarray(ours[0])), stops)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path)
    wanted = theirs.generation_config.eos_token_id
    assert set([wanted] if isinstance(wanted, int) else wanted) == set(ends)
    written = processor.apply_chat_template([ASKED], add_generation_prompt=True)
    inputs = processor(text=written, images=[picture()], return_tensors="pt")
    out = theirs.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(out, skip_special_tokens=True).strip() == ours != ""
    talk = transformers.pipeline("image-text-to-text", model=str(tmp_path))
    said = {**ASKED, "content": [{"type": "image", "image": Image.fromarray(picture())}, ASKED["content"][1]]}
    answer = talk(text=[said], max_new_tokens=12, return_full_text=False, do_sample=False)
    assert answer[0]["generated_text"].strip() == ours


def test_the_folder_comes_back_and_is_saved_again(made, tmp_path):
    """The tokenizer that is read gives the same prompts, and writes the same folder."""
    model, params, _ = made
    form = Form("v1", "Be brief.")
    saved(made, form, tmp_path / "a")
    tokenizer, transform = hub.load_processor(tmp_path / "a")
    assert transform == SIZE
    assert prompt_of((model, params, tokenizer), form, TALK) == prompt_of(made, form, TALK)
    saved((model, params, tokenizer), form, tmp_path / "b")
    names = (
        "processor_config.json",
        "preprocessor_config.json",
        "chat_template.jinja",
        "generation_config.json",
    )
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    saved(made, None, tmp_path / "a")
    assert hub.load_form(tmp_path / "a") is None and not (tmp_path / "a" / "chat_template.jinja").exists()


def test_another_models_image_token_is_refused(made, tmp_path):
    model, params, tokenizer = made
    other = Vlm(dataclasses.replace(model.config, image_token_id=7))
    with pytest.raises(HubError, match="the model takes images at id 7"):
        hub.save(other, params, tmp_path / "x", tokenizer=tokenizer, form=Form("v1"))
    assert not (tmp_path / "x").exists()


def test_pictures_made_squares_are_those_of_transformers(made, tmp_path):
    """A processor of LLaVA's own class, which AutoProcessor finds."""
    model, params, tokenizer = made
    squares = EvalTransform(28, (28, 28), pad=True)
    hub.save(model, params, tmp_path, tokenizer=tokenizer, image_processor=squares, form=Form("v1"))
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert "Llava" in type(processor.image_processor).__name__
    found = processor(text="<image>", images=[picture()], return_tensors="np")["pixel_values"]
    mine = squares.normalize(squares(picture()))[None].transpose(0, 3, 1, 2)
    assert np.abs(found - mine).max() < 1.01 / 255 / 0.25
    assert np.abs(mine[0, :, 0]).max() < 0.02 < np.abs(SIZE.normalize(SIZE(picture()))[0]).max()
    assert hub.load_processor(tmp_path)[1] == squares
