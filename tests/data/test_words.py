"""Word by word or whole, the ids are the tokenizer's own; memory is bounded; what cannot be cut is not."""

import concurrent.futures
import logging
import pickle

import numpy as np
import pytest
from helpers import WORDS, caption, tokenizer

from vlmjax.data import text, words

FRAGMENTS = (
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\n \n",
    "\u3000",
    "\xa0",
    "\x1c",
    "'s",
    "'",
    "42",
    "1",
    ".",
    "...",
    "a",
    "Cat",
    "the",
    "é",
    "e\u0301",
    "\u0301",
    "日本",
    "🙂",
    "▁",
    "Ġ",
    "</w>",
    "##ing",
    "<s>",
    "</s>",
    "<pad>",
    "[SEP]",
    "[UNK]",
    "[MASK]",
    "<|endoftext|>",
    "<|STARTOFTEXT|>",
    "<unk>",
    "<extra_id_0>",
)


def random_texts(count: int, seed: int) -> list[str]:
    """Any characters beside each other: fragments that matter, plain words, code points from everywhere."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        parts = []
        for _ in range(int(rng.integers(0, 14))):
            kind = rng.random()
            if kind < 0.35:
                parts.append(" " + str(rng.choice(WORDS)))
            elif kind < 0.7:
                parts.append(FRAGMENTS[rng.integers(len(FRAGMENTS))])
            else:
                top = int(rng.choice([0x80, 0x250, 0x3000, 0xD800, 0x20000]))
                parts.append(chr(int(rng.integers(0, top))))
                parts.append(" " * int(rng.integers(0, 2)))
        out.append("".join(part for part in parts if not "\ud800" <= part <= "\udfff"))
    return out


def expected(backend, texts: list[str]) -> list[list[int]]:
    """One at a time, by the plain method of the library."""
    return [backend.encode(one, add_special_tokens=False).ids for one in texts]


def ids(parts: list[bytes]) -> list[list[int]]:
    return [np.frombuffer(part, "<i4").tolist() for part in parts]


def byte_level(texts=None, **options):
    """A small GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts or ["of the " + caption(i % 7) for i in range(60)], trainer)
    return backend


def word_piece():
    """A small BERT."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    pieces = ["[UNK]", "[SEP]", "[MASK]", "red", "circle", "##s", "a", "##t", "c", "##a", "e", "日", "'", "s"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.add_special_tokens(["[UNK]", "[SEP]", "[MASK]"])
    return backend


def sentence_pieces(split: bool):
    """A small T5 (with words) or a unigram model over whole texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("▁of▁the", -1.0), ("▁of", -3.0), ("▁the", -3.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz'.4"]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
    backend.add_special_tokens(["</s>", "<pad>"])
    return backend


def llama():
    """A small LLaMA: no words, spaces written as letters, bytes for what is unknown."""
    from tokenizers import AddedToken, Tokenizer, models, normalizers

    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "r"), ("▁r", "e"), ("▁re", "d"), ("▁", "▁"), ("a", "b"), ("▁", "a")]
    pieces += ["".join(pair) for pair in merges]
    backend = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("<unk>", normalized=False)])
    return backend


def hidden():
    """An entry over a space that no common text shows: only the vocabulary does."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "zq", "zqĠ"]
    merges = [("z", "q"), ("zq", "Ġ")]
    backend = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return backend


def blank_lines():
    """Merges of blank lines, which a space may be in the middle of."""
    backend = byte_level(texts=["red\n \n \nblue"] * 50)
    assert any(entry.count("Ċ") > 1 for entry in backend.get_vocab())
    return backend


def across_words():
    """A vocabulary trained without cutting at spaces: 'of the' is one entry."""
    return byte_level(use_regex=False)


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (byte_level, words.Cut(" ", False)),
        (word_piece, words.Cut("", True)),
        (llama, words.Cut("", False)),
        (lambda: sentence_pieces(True), words.Cut("", False)),
        (lambda: sentence_pieces(False), None),
        (across_words, None),
        (hidden, None),
        (blank_lines, words.Cut(" ", False)),
    ],
    ids=["gpt2", "bert", "llama", "unigram-words", "unigram-whole", "across-words", "hidden", "blank-lines"],
)
def test_ids_are_the_tokenizers_own(make, cut):
    backend = make()
    encoder = words.Encoder(backend)
    assert encoder.cut == cut
    texts = random_texts(600, 1) + [caption(i) for i in range(40)]
    right = expected(backend, texts)
    for _ in range(2):  # with the memory empty, then full
        assert ids(encoder(texts)) == right
    encoder._unchecked = 0  # from here on nothing is compared with the tokenizer on the way
    more = random_texts(1500, 2)
    assert ids(encoder(more)) == expected(backend, more)
    assert encoder.cut == cut, "words were given up on the way"


def test_trained_clip_tokenizer(tmp_path):
    one = tokenizer(tmp_path, 300)
    assert one._encoder.cut == words.Cut("", True)
    texts = random_texts(800, 3)
    one._encoder._unchecked = 0
    right = [one._backend.encode(words_).ids for words_ in texts]
    assert [found.tolist() for found in one.encode_all(texts)] == right


@pytest.mark.parametrize(
    "folder",
    ["clip", "bert-base-uncased", "gpt2", "llama2", "t5-small", pytest.param("qwen", marks=pytest.mark.slow)],
)
def test_real_tokenizers(shared_path, folder):
    one = text.load(shared_path("data/tokenizers") / folder, 512)
    encoder = one._encoder
    assert encoder.cut is not None
    encoder._unchecked = 0
    texts = random_texts(1500, 4)
    right = expected(one._backend, texts)
    wrong = [(t, a, b) for t, a, b in zip(texts, ids(encoder(texts)), right, strict=True) if a != b]
    assert wrong == []
    assert [row.tolist() for row in one.encode_all(texts[:200])] == [
        one._backend.encode(t).ids for t in texts[:200]
    ]


def test_a_difference_among_the_first_texts_gives_words_up(caplog):
    backend = byte_level()
    encoder = words.Encoder(backend)
    encoder._tail["cat"] = encoder._tail[
        "dog"
    ]  # as if the tokenizer joined words that the trial did not show
    with caplog.at_level(logging.WARNING):
        found = ids(encoder(["a dog", "a cat"]))
    assert found == expected(backend, ["a dog", "a cat"]) and encoder.cut is None
    assert "'a cat' has other ids word by word" in caplog.text
    again = pickle.loads(pickle.dumps(encoder))
    assert again.cut is None and ids(again(["a cat"])) == found[1:]


def test_memory_is_bounded_and_keeps_what_is_used():
    backend = byte_level()
    encoder = words.Encoder(backend, words=100, texts=20)
    made = []
    make = encoder._tail._make
    encoder._tail._make = lambda word: made.append(word) or make(word)
    for i in range(500):
        encoder([f"x often rare{i}", f"two  spaces {i}"])
        assert encoder.held() <= 100 + 100 // 8 + 20
    assert made.count("often") == 1 and made.count("rare7") == 1
    long = "y" * 65
    encoder([f"a {long}"])
    assert long not in encoder._tail and ids(encoder([f"a {long}"])) == expected(backend, [f"a {long}"])


def test_random_merges_and_tokens_with_spaces_are_not_cut():
    from tokenizers import AddedToken, models

    backend = byte_level()
    backend.add_special_tokens([AddedToken("<two words>")])
    assert words.Encoder(backend).cut is None
    dropping = byte_level()
    dropping.model = models.BPE(dropping.get_vocab(), [], dropout=0.1)
    assert words.Encoder(dropping).cut is None


def test_threads_and_processes_agree():
    backend = byte_level()
    encoder = words.Encoder(backend, words=64)  # small: it is cleared all the time
    texts = random_texts(200, 5)
    right = expected(backend, texts)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: ids(encoder(texts)), range(16)):
            assert found == right
    assert ids(pickle.loads(pickle.dumps(encoder))(texts)) == right


def test_sides_of_padding_and_truncation(tmp_path):
    one = tokenizer(tmp_path / "a", 6)
    settings = (tmp_path / "a" / "tokenizer_config.json").read_text()
    changed = settings.replace("{", '{"padding_side": "left", "truncation_side": "left",', 1)
    (tmp_path / "a" / "tokenizer_config.json").write_text(changed)
    left = text.load(tmp_path / "a", 6)
    texts = ["red", "red green blue round square star", ""]
    rights, lefts = one(texts), left(texts)
    bos, eos = one.bos_token_id, one.eos_token_id
    content = [i for i in text.load(tmp_path / "a", 50).encode(texts[1])[1:-1]]
    assert rights["input_ids"][1].tolist() == [bos, *content[:4], eos]
    assert lefts["input_ids"][1].tolist() == [bos, *content[-4:], eos]
    assert lefts["input_ids"][0].tolist() == [eos, eos, eos, bos, one.encode("red")[1], eos]
    assert lefts["attention_mask"][0].tolist() == [0, 0, 0, 1, 1, 1]
    assert one.lengths(texts).tolist() == [3, 6, 2] == left.lengths(texts).tolist()
    assert one.truncated == left.truncated == 1 and one.texts == 3
    assert one([])["input_ids"].shape == (0, 6)
    rights["input_ids"][0, 0] = 5  # callers may write
    assert rights["input_ids"].dtype == np.int32


def test_left_sides_equal_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer(tmp_path, 7)
    hf = transformers.CLIPTokenizerFast.from_pretrained(str(tmp_path))
    hf.padding_side = hf.truncation_side = "left"
    one = text.Tokenizer(
        hf.backend_tokenizer,
        7,
        bos=hf.bos_token_id,
        eos=hf.eos_token_id,
        pad=hf.pad_token_id,
        side="left",
        truncation="left",
    )
    texts = [caption(i) * (1 + i % 3) for i in range(20)]
    wanted = hf(texts, padding="max_length", truncation=True, max_length=7, return_tensors="np")
    found = one(texts)
    for name in ("input_ids", "attention_mask"):
        np.testing.assert_array_equal(found[name], wanted[name])
