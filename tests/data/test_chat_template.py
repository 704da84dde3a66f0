"""A tokenizer's own chat template: the pieces jinja gives, what of them has loss, and templates that cannot be used."""

import pickle

import numpy as np
import pytest
import transformers
from test_conversation import IMAGE, TWO, byte_level, llama_like, shown, turns

from vlmjax.data.conversation import from_turns
from vlmjax.data.pieces import Pieces, encode, encode_prompt, rendered
from vlmjax.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OPTIONS = {"image_tokens": 3, "image_token_id": IMAGE, "max_length": 900}


def with_template(backend, template: str, **names) -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, eos_token="</s>", bos_token="<s>", **names
    )


def same(one, other) -> None:
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("backend", "template", "name"), [(byte_level, CHATML, "chatml"), (llama_like, LLAMA, "llama_2")]
)
def test_ids_are_those_of_our_own_template_of_that_kind(backend, template, name):
    pieces = Pieces(with_template(backend(), template))
    system = "You are a helpful assistant." if name == "chatml" else ""
    for one in (TWO, from_turns(turns("a </s> <|im_end|>", "b", "<image>c<image>", "d</s>"))):
        ours = encode(one, name, pieces, **OPTIONS)
        got = encode(one, "tokenizer", pieces, system=system, **OPTIONS)
        same(got, ours)
        same(encode(one, "tokenizer", pickle.loads(pickle.dumps(pieces)), system=system, **OPTIONS), ours)
    prompt = encode_prompt(TWO[:3], "tokenizer", pieces, image_tokens=3, image_token_id=IMAGE, system=system)
    same([prompt], [encode(TWO, name, pieces, **OPTIONS).input_ids[: len(prompt)]])


def test_the_opening_token_stands_once():
    backend = llama_like()
    got = encode(TWO[:2], "tokenizer", Pieces(with_template(backend, LLAMA)), **OPTIONS).input_ids.tolist()
    assert got[0] == 1 and got.count(1) == 1
    backend.post_processor = byte_level().post_processor  # none: now the template's is the only one
    assert backend.encode("a").ids[0] != 1
    again = encode(TWO[:2], "tokenizer", Pieces(with_template(backend, LLAMA)), **OPTIONS).input_ids.tolist()
    assert again == got


def test_line_breaks_after_the_stop_have_no_loss():
    pieces = Pieces(with_template(byte_level(), CHATML))
    assert shown(rendered(TWO[:2], "tokenizer", pieces)) == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n{A cat.<|im_end|>}\n"
    )
    first = from_turns(turns("Look\n<image>", "b"))
    assert "user\n<image>\nLook<|im_end|>" in shown(rendered(first, "tokenizer", pieces, image_first=True))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "changes earlier turns",
        ),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", r"writes the parts \[\]"),
        ("{{ raise_exception('no images please') }}", "no images please"),
    ],
)
def test_templates_that_cannot_be_used(template, message):
    with pytest.raises(DataError, match=message):
        encode(TWO, "tokenizer", Pieces(with_template(byte_level(), template)), **OPTIONS)
