"""Streams: the tokens of `generate` one by one, and text without halves of characters or of stop strings."""

import numpy as np
import pytest

from vlmjax.decode.streaming import TextStream, words
from vlmjax.errors import UserError

SNOW = "a ☃ and 🦭!"
BYTES = list(SNOW.encode())


def of_bytes(ids) -> str:
    """A tokenizer whose tokens are bytes, as those that byte-level vocabularies fall back to."""
    return bytes(ids).decode(errors="replace")


def of_words(ids) -> str:
    """A tokenizer that leaves out the space before the first word, as Llama's does, and token 9."""
    return "".join(["", " I", " am", " a", " seal", "ing"][i] for i in ids if i != 9).lstrip()


def test_characters_come_whole():
    pieces = list(words(BYTES, of_bytes))
    assert "".join(pieces) == SNOW and "\ufffd" not in "".join(pieces)
    assert pieces[2:4] == ["☃", " "]


def test_what_is_no_character_comes_at_the_end():
    assert "".join(words([*b"ab", 0xE2], of_bytes)) == "ab\ufffd"
    assert "".join(words([*b"a", 0xE2, *b"bc"], of_bytes)) == "a\ufffdbc"


def test_spaces_between_words_stay():
    ids = [1, 2, 9, 3, 4, 5, 9]
    assert list(words(ids, of_words)) == ["I", " am", " a", " seal", "ing"]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one\n### two", ["###"], "one\n"),
        ("one\n##two##", ["###"], "one\n##two##"),
        ("ababac", ["abac"], "ab"),
        ("xyz", ["yz", "xyz"], ""),
        ("xy", [], "xy"),
    ],
)
def test_stop_strings(text, stops, wanted):
    taken = []

    def tokens():
        for token in text.encode():
            taken.append(token)
            yield token

    out = TextStream(of_bytes, stops)
    assert "".join(words(tokens(), of_bytes, stops)) == wanted
    for token in text.encode():
        out.push(token)
        assert wanted.startswith(out.text)
    out.end()
    assert (out.text, out.stopped) == (wanted, wanted != text)
    if stops == ["###"] and out.stopped:
        assert len(taken) == text.index("###") + 3  # nothing is computed after it


def test_a_stream_is_what_generate_gives():
    pytest.importorskip("torch")
    from tests.decode.small_models import pair, prompts
    from vlmjax import decode

    _, model, params = pair("llama")
    plain = np.asarray(decode.generate(model, params, max_new_tokens=9, **prompts()))
    ends = [int(plain[0, 3]), int(plain[1, 4]), int(plain[2, 2])]
    for options in ({"eos_token_id": ends}, {"do_sample": True, "repetition_penalty": 1.2, "seed": 4}):
        whole = decode.generate(model, params, max_new_tokens=9, **options, **prompts())
        rows = list(decode.stream(model, params, max_new_tokens=9, **options, **prompts()))
        found = np.stack(rows, axis=1)
        np.testing.assert_array_equal(found, np.asarray(whole)[:, : found.shape[1]])
        assert (np.asarray(whole)[:, found.shape[1] :] == ends[0]).all() and rows[0].dtype == np.int32
        assert (len(rows) < 9) == ("eos_token_id" in options)
    first = decode.stream(model, params, max_new_tokens=9, **prompts())
    np.testing.assert_array_equal(next(first), plain[:, 0])
    with pytest.raises(UserError, match="num_beams is 2: beams cannot be streamed"):
        decode.stream(model, params, max_new_tokens=9, num_beams=2, **prompts())
