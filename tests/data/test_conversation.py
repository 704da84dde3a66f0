"""Conversations: what each template writes, what has loss, ids piece by piece, and where they are cut."""

import pickle
from itertools import groupby

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from vlmjax.data import conversation as talk
from vlmjax.data import text
from vlmjax.data.conversation import Message, Part, Segment, from_messages, from_turns, render
from vlmjax.data.conversation_templates import TEMPLATES
from vlmjax.data.pieces import Pieces, encode, encode_prompt
from vlmjax.errors import BadRecord, DataError

IMAGE = 7_000
CURIOUS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def turns(*words: str, first: str = "human") -> list[dict]:
    order = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": order[place % 2], "value": value} for place, value in enumerate(words)]


TWO = from_turns(turns("<image>\nWhat?", "A cat.", "Sure?", "Yes"))


def word_level() -> Tokenizer:
    """Words with the space before them are tokens, unseen ones are "?": texts can be read off, and put together."""
    cut = Regex(r" ?[A-Za-z']+| ?[^\sA-Za-z]|\s")
    seen = [
        CURIOUS,
        " human's user's user Human User USER ASSISTANT Assistant INST SYS a A",
        "\n#/.:?[]<>|,_ polite",
    ]
    seen += ["What is it A cat Sure Yes q q2 a a2 system assistant You are helpful Answer the questions"]
    words = {w for s in seen for w, _ in pre_tokenizers.Split(cut, "isolated").pre_tokenize_str(s)}
    words |= {" "} | {" " + w for w in words} | {w.strip() for w in words if w.strip()}
    vocabulary = {word: number for number, word in enumerate(["<unk>", *sorted(words - {"<unk>"})])}
    one = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    one.pre_tokenizer, one.decoder = pre_tokenizers.Split(cut, "isolated"), decoders.Fuse()
    one.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    start = one.token_to_id("<s>")
    one.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    return one


def llama_like(anew: bool = True) -> Tokenizer:
    """Letters with some merges, a space before every text as Llama has it: at the start, and (`anew`) after tokens."""
    letters = [chr(i) for i in range(33, 127)] + ["é", "▁"]
    merged = [("▁", "A"), ("▁", "Y"), ("e", "s"), ("▁Y", "es"), ("▁", "S"), ("A", "S")]
    entries = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    entries += ["".join(pair) for pair in merged]
    vocabulary = {entry: number for number, entry in enumerate(dict.fromkeys(entries))}
    one = Tokenizer(models.BPE(vocabulary, merged, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if anew:
        one.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        one.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    one.decoder = decoders.Sequence(undo)
    one.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    one.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return one


def byte_level() -> Tokenizer:
    """Bytes with a few merges across spaces, no opening token: Qwen's kind."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = [("Ġ", "A"), ("Ġ", "Y"), ("a", "t"), ("A", "S"), ("c", "at")]
    entries = [*letters, *("".join(pair) for pair in merged)]
    one = Tokenizer(models.BPE({entry: number for number, entry in enumerate(entries)}, merged))
    one.pre_tokenizer, one.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    one.add_special_tokens(["</s>", "<s>", "<|im_start|>", "<|im_end|>"])
    return one


MAKERS = {"words": word_level, "llama": llama_like, "first": lambda: llama_like(False), "bytes": byte_level}


def shown(segments: list[Segment]) -> str:
    """What a template writes, images as <image>, between { and } what has loss."""
    out = ""
    for has_loss, group in groupby(segments, key=lambda segment: segment.has_loss):
        words = "".join(one.text if one.kind in ("text", "token") else f"<{one.kind}>" for one in group)
        out += "{" + words + "}" if has_loss else words
    return out


# Written by hand from the authors' code, see conversation_templates.
WRITTEN = {
    "v0": CURIOUS + "\n\n### Human: <image>\nWhat?\n### Assistant:{ A cat.\n###} "
    "Human: Sure?\n### Assistant:{ Yes\n###}",
    "v1": CURIOUS.replace("human", "user") + " USER: <image>\nWhat? ASSISTANT:{ A cat.</s>}"
    "USER: Sure? ASSISTANT:{ Yes</s>}",
    "llava_v1": CURIOUS + " USER: <image>\nWhat? ASSISTANT:{ A cat.</s>}USER: Sure? ASSISTANT:{ Yes</s>}",
    "llama_2": "[INST] <image>\nWhat? [/INST]{ A cat. </s>}<s>[INST] Sure? [/INST]{ Yes </s>}",
    "mistral_instruct": "[INST] <image>\nWhat? [/INST]{ A cat. </s>}[INST] Sure? [/INST]{ Yes </s>}",
    "chatml": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    "<|im_start|>assistant\n{A cat.<|im_end|>}\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    "{Yes<|im_end|>}",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>"
    "<|im_start|>assistant\n{A cat.<|im_end|>}<|im_start|>user\nSure?<|im_end|><|im_start|>assistant\n{Yes<|im_end|>}",
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_template_writes(name):
    assert shown(render(TWO, TEMPLATES[name])) == WRITTEN[name]


def test_all_templates_are_looked_at():
    assert set(TEMPLATES) - set(WRITTEN) == {"vicuna_v1", "plain", "llava_llama_2"}
    assert TEMPLATES["vicuna_v1"] == TEMPLATES["v1"]
    assert shown(render(TWO, TEMPLATES["llava_llama_2"])).startswith(
        "[INST] <<SYS>>\nYou are a helpful language"
    )
    assert shown(render(TWO[:2], TEMPLATES["plain"])) == "<image>{A cat.\n}"
    with pytest.raises(BadRecord, match="not_one_round"):
        render(TWO, TEMPLATES["plain"])


def test_system_messages():
    said = from_turns([{"from": "system", "value": "Be brief."}, *turns("q", "a")])
    assert shown(render(said, TEMPLATES["v1"], system="Not this.")) == "Be brief. USER: q ASSISTANT:{ a</s>}"
    assert shown(render(said[1:], TEMPLATES["v1"], system="This.")) == "This. USER: q ASSISTANT:{ a</s>}"
    assert (
        shown(render(said, TEMPLATES["llama_2"]))
        == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq [/INST]{ a </s>}"
    )


def test_the_order_of_images():
    one = from_turns(turns("Is <image> like <image>?", "a", "<image>", "b"))
    plain, first = (shown(render(one, TEMPLATES["mistral_instruct"], image_first=f)) for f in (False, True))
    assert plain.startswith("[INST] Is <image> like <image>? [/INST]{ a </s>}[INST] <image> [/INST]")
    assert first.startswith("[INST] <image><image>\nIs  like ? [/INST]{ a </s>}[INST] <image> [/INST]")
    last = from_turns(turns("What is it?\n<image>", "a"))
    assert "USER: <image>\nWhat is it? ASSISTANT" in shown(render(last, TEMPLATES["v1"], image_first=True))


TABLES = {
    "v1": "<s> A| chat| between| a| curious| user| and| an| artificial| intelligence| assistant|.| The| assistant| "
    "gives| helpful|,| detailed|,| and| polite| answers| to| the| user's| questions|.| USER|:| |@|@|@|\n|What|?| "
    "ASSISTANT|:|* A|* cat|*.|*</s>|USER|:| Sure|?| ASSISTANT|:|* Yes|*</s>",
    "llama_2": "<s> [|INST|]| |@|@|@|\n|What|?| [|/|INST|]|* A|* cat|*.|* |*</s>|<s>|[|INST|]| Sure|?| [|/|INST|]|"
    "* Yes|* |*</s>",
    "chatml": "<s> <|im_start|>|system|\n|You| are| a| helpful| assistant|.|<|im_end|>|\n|<|im_start|>|user|\n|"
    "@|@|@|\n|What|?|<|im_end|>|\n|<|im_start|>|assistant|\n|*A|* cat|*.|*<|im_end|>|\n|<|im_start|>|user|\n|Sure|?|"
    "<|im_end|>|\n|<|im_start|>|assistant|\n|*Yes|*<|im_end|>",
    "v0": "<s> A| chat| between| a| curious| human| and| an| artificial| intelligence| assistant|.| The| assistant| "
    "gives| helpful|,| detailed|,| and| polite| answers| to| the| human's| questions|."
    "|\n|\n|#|#|#| Human|:| |@|@|@|\n|What|?|\n|#|#|#| Assistant|:|* A|* cat|*.|*\n|*#|*#|*#| Human|:| Sure|?|\n|"
    "#|#|#| Assistant|:|* Yes|*\n|*#|*#|*#",
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tokens_and_what_has_loss(name):
    backend = word_level()
    got = encode(TWO, name, Pieces(backend), image_tokens=3, image_token_id=IMAGE, max_length=500)
    entries = ["@" if i == IMAGE else backend.id_to_token(int(i)) for i in got.input_ids]
    table = [("*" if weight else "") + entry for entry, weight in zip(entries, got.loss_weights, strict=True)]
    assert table[0] == "<s>" and "|".join(table[1:]) == TABLES[name].removeprefix("<s> ")
    assert got.spans == ((entries.index("@"), 3),) and got.cut == 0
    assert (got.input_ids.dtype, got.loss_weights.dtype) == (np.int32, np.float32)


def test_plain_tokens():
    backend = word_level()
    got = encode(TWO[:2], "plain", Pieces(backend), image_tokens=2, image_token_id=IMAGE, max_length=500)
    assert [backend.id_to_token(int(i)) for i in got.input_ids[3:]] == ["A", " cat", ".", "\n"]
    assert got.input_ids[:3].tolist() == [backend.token_to_id("<s>"), IMAGE, IMAGE]
    assert got.loss_weights.tolist() == [0, 0, 0, 1, 1, 1, 1] and got.spans == ((1, 2),)


def sample(rng: np.random.Generator, rounds: int) -> talk.Conversation:
    """Words with awkward ends, images anywhere in the user's turns."""
    words = ["A", "Yes", "cat", "S", "\n", " ", "x ", " AS", "é", "</s>", "▁", "7?", "<unk>", "日"]
    out = []
    for _ in range(rounds):
        asked = [Part("text", "".join(rng.choice(words, 3))) for _ in range(int(rng.integers(1, 3)))]
        asked += [Part("image")] * int(rng.integers(0, 3))
        order = rng.permutation(len(asked))
        out.append(Message("user", tuple(asked[i] for i in order)))
        answer = "".join(rng.choice(words, int(rng.integers(1, 6))))
        out.append(Message("assistant", (Part("text", answer),)))
    return tuple(out)


@pytest.mark.parametrize("tokenizer", ["llama", "first", "bytes"])
def test_what_has_loss_is_the_answers_and_their_stops(tokenizer):
    backend = MAKERS[tokenizer]()
    pieces, rng = Pieces(backend), np.random.default_rng(0)
    for name in ("v0", "v1", "llama_2", "chatml", "plain"):
        form = TEMPLATES[name]
        for _ in range(30):
            one = sample(rng, 1 if name == "plain" else int(rng.integers(1, 4)))
            got = encode(one, name, pieces, image_tokens=4, image_token_id=IMAGE, max_length=10_000)
            wanted = "".join(form.before_answer + m.text + form.stop for m in one if m.role == "assistant")
            learned = [int(i) for i, w in zip(got.input_ids, got.loss_weights, strict=True) if w]
            found = backend.decode(learned, skip_special_tokens=False)
            if tokenizer != "bytes":  # what these write for a real space and for the letter ▁ is the same
                wanted, found = wanted.replace("▁", " "), found.replace("▁", " ")
            assert found in (wanted, " " + wanted) if name in ("plain", "chatml") else found == wanted
            assert [s for s in got.spans] == [
                (at, 4) for at in range(len(got.input_ids)) if got.input_ids[at] == IMAGE
            ][::4]
            assert not got.loss_weights[got.input_ids == IMAGE].any()


@pytest.mark.parametrize("tokenizer", MAKERS)
def test_pieces_are_the_whole_where_nothing_joins_across_them(tokenizer):
    """The tokenizer's own ids of the whole string: what a model that others trained has seen."""
    backend = MAKERS[tokenizer]()
    backend.add_special_tokens(["<image>"])
    pieces, image = Pieces(backend), backend.token_to_id("<image>")
    for words in (("<image>\nWhat?", "A cat."), ("What?", "Yes", "Sure? <image>", "A", "S?", "cat AS Yes")):
        one = from_turns(turns(*words))
        whole = shown(render(one, TEMPLATES["v1"])).replace("{", "").replace("}", "")
        got = encode(one, "v1", pieces, image_tokens=1, image_token_id=image, max_length=10_000)
        assert got.input_ids.tolist() == backend.encode(whole).ids
        prompt = encode_prompt(one[:-1], "v1", pieces, image_tokens=1, image_token_id=image)
        np.testing.assert_array_equal(prompt, got.input_ids[: len(prompt)])
        assert got.loss_weights[len(prompt) :].all()


def test_what_stands_inside_gets_no_space():
    pieces = Pieces(llama_like())
    letters = pieces._backend.id_to_token
    assert [letters(i) for i in pieces.encode("Yes")] == ["▁Yes"]
    assert [letters(i) for i in pieces.encode(" Yes", "inside")] == ["▁Yes"]
    assert [letters(i) for i in pieces.encode("Yes", "inside")] == ["Y", "es"]
    assert [letters(i) for i in pieces.encode(" ", "inside")] == ["▁"]
    assert [letters(i) for i in pieces.encode("Yes", "after")] == ["▁Yes"]
    other = Pieces(llama_like(False))
    assert [letters(i) for i in other.encode("Yes", "after")] == ["Y", "es"]


def test_control_tokens_in_words_are_words():
    one = from_turns(turns("a</s>b <s>", "x</s>y"))
    for make in (llama_like, byte_level):
        backend = make()
        for pieces in (Pieces(backend), pickle.loads(pickle.dumps(Pieces(backend)))):
            got = encode(one, "v1", pieces, image_tokens=1, image_token_id=IMAGE, max_length=900).input_ids
            assert got.tolist().count(backend.token_to_id("</s>")) == 1 and got[-1] == backend.token_to_id(
                "</s>"
            )


def test_cutting():
    pieces, rng = Pieces(byte_level()), np.random.default_rng(1)
    options = {"image_tokens": 5, "image_token_id": IMAGE}
    for _ in range(12):
        one = sample(rng, 3)
        whole = encode(one, "mistral_instruct", pieces, max_length=10_000, **options)
        first_answer = int(np.flatnonzero(whole.loss_weights)[0])
        for length in range(1, len(whole.input_ids) + 2):
            if length <= first_answer:
                with pytest.raises(BadRecord, match="too_long"):
                    encode(one, "mistral_instruct", pieces, max_length=length, **options)
                continue
            got = encode(one, "mistral_instruct", pieces, max_length=length, **options)
            n = len(got.input_ids)
            assert n <= length and n + got.cut == len(whole.input_ids) and got.loss_weights[-1] == 1
            np.testing.assert_array_equal(got.input_ids, whole.input_ids[:n])
            np.testing.assert_array_equal(got.loss_weights, whole.loss_weights[:n])
            assert (got.input_ids == IMAGE).sum() == 5 * len(got.spans) and got.spans == whole.spans[
                : len(got.spans)
            ]
            # As much as there is room for: the tokens left out in between have no loss.
            assert not whole.loss_weights[n:length].any()


def test_images_that_do_not_fit():
    pieces = Pieces(byte_level())
    options = {"image_tokens": [2, 3], "image_token_id": IMAGE, "max_length": 500}
    one = from_turns(turns("<image> q", "a", "<image>", "b"))
    got = encode(one, "mistral_instruct", pieces, max_images=1, **options)
    assert len(got.spans) == 1 and got.spans[0][1] == 2 and got.cut > 0
    assert len(encode(one, "mistral_instruct", pieces, max_images=2, **options).spans) == 2
    both = from_turns(turns("<image><image> q", "a"))
    with pytest.raises(BadRecord, match="too_many_images"):
        encode(both, "v1", pieces, max_images=1, **options)
    with pytest.raises(BadRecord, match="image_marks"):
        encode(both, "v1", pieces, **options | {"image_tokens": [2]})


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "bad_conversation"),
        ("hello", "bad_conversation"),
        ([{"role": "user"}], "bad_conversation"),
        ([{"from": "bot", "value": "x"}], "unknown_role"),
        (turns("q", "  "), "empty_answer"),
        (turns("q", "<image>"), "empty_answer"),
    ],
)
def test_rows_that_are_no_conversations(rows, reason):
    with pytest.raises(BadRecord) as caught:
        from_turns(rows, "k")
    assert (caught.value.reason, caught.value.key) == (reason, "k")


def test_turns_that_do_not_take_turns():
    pieces = Pieces(byte_level())
    options = {"image_tokens": 1, "image_token_id": IMAGE, "max_length": 99}
    one = [{"from": "human", "value": "q"}]
    for rows, reason in (
        (turns("a", "q", first="gpt"), "bad_turns"),
        (one * 2, "bad_turns"),
        ([{"from": "system", "value": "s"}], "bad_turns"),
        (one, "no_loss"),
        (turns("<video> what?", "a"), "video"),
    ):
        with pytest.raises(BadRecord, match=reason):
            encode(from_turns(rows), "v1", pieces, **options)
    with pytest.raises(DataError, match="none of v0, v1"):
        encode(TWO, "v2", pieces, **options)
    with pytest.raises(DataError, match="no chat template"):
        encode(TWO, "tokenizer", pieces, **options)


def test_messages_are_turns():
    parts = [{"type": "image"}, {"type": "text", "text": "\nWhat?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat. "}]
    messages += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
    ]
    assert from_messages(messages) == TWO and from_turns(talk.to_turns(TWO)) == TWO
    assert talk.count(TWO) == 1 and TWO[0].text == "<image>\nWhat?"
    for bad in ([], [{"role": "user", "content": 3}], [{"role": "user", "content": [{"type": "sound"}]}]):
        with pytest.raises(BadRecord, match="bad_conversation"):
            from_messages(bad)
    assert from_turns(turns(*("<image>\nq", "c"))) == talk.from_caption("c", "q")


def test_a_tokenizer_that_drops_line_breaks_stops_at_its_closing_token(tmp_path):
    from vlmjax.data import bpe

    bpe.train_bpe(["a red star and a cat"] * 3, 540, tmp_path)
    words = text.load(tmp_path, 16)
    got = encode(TWO[:2], "plain", Pieces(words), image_tokens=1, image_token_id=IMAGE, max_length=50)
    assert got.input_ids[0] == words.bos_token_id and got.input_ids[-1] == words.eos_token_id
    assert words.decode(got.input_ids[2:]) == "a cat ."


def test_one_more_token(tmp_path):
    from vlmjax.data import bpe

    bpe.train_bpe(["a red star and a cat"] * 3, 540, tmp_path / "a")
    words = text.load(tmp_path / "a", 16)
    more = text.with_token(words, "<image>")
    assert (
        words.token_id("<image>") is None
        and more.token_id("<image>") == words.vocab_size == more.vocab_size - 1
    )
    assert text.with_token(more, "<image>") is more
    more.save(tmp_path / "b")
    again = text.load(tmp_path / "b", 16)
    assert again.token_id("<image>") == more.token_id("<image>") and again.encode("red cat") == words.encode(
        "red cat"
    )
    import transformers

    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "b"))
    assert hf.convert_tokens_to_ids("<image>") == more.token_id("<image>")


@pytest.mark.parametrize(("folder", "name"), [("llama2", "v1"), ("llama2", "llama_2"), ("qwen", "chatml")])
def test_ids_of_real_tokenizers_are_those_of_the_whole_string(shared_path, folder, name):
    words = text.with_token(text.load(shared_path("data/tokenizers") / folder, 64), "<image>")
    image = words.token_id("<image>")
    said = turns(
        "<image>\nWhat are the things I should be cautious about?", "The weather, and 2 dogs.", "Sure?", "Yes"
    )
    one = from_turns(said)
    whole = shown(render(one, TEMPLATES[name])).replace("{", "").replace("}", "")
    got = encode(one, name, Pieces(words), image_tokens=1, image_token_id=image, max_length=900)
    assert got.input_ids.tolist() == words.backend.encode(whole).ids
