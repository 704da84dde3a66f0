"""Tokenizers: ids as the upstream projects and transformers give them, fixed length, truncation, saving."""

import concurrent.futures
import hashlib
import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import WORDS, caption, tokenizer

from vlmjax.data import bpe, text
from vlmjax.errors import DataError

SENTENCES = [
    "a Red circle",
    "",
    "  two   spaces\n",
    "it's 42 o'clock!",
    "naïve 日本 🙂",
    "<|endoftext|> inside",
    *WORDS,
]


def _expected(shared_path, name: str, *wanted: str) -> dict[str, list[int]]:
    """Texts with their ids, of the tokenizers of one file whose names contain one of `wanted`."""
    with open(shared_path(f"data/tokenizers/expected/transformers_js/{name}.json"), encoding="utf-8") as data:
        cases = json.load(data)
    found = {n: c for n, c in cases.items() if not wanted or any(w in n for w in wanted)}
    assert found, list(cases)
    return {
        case["text"]: case["ids"]
        for group in found.values()
        for case in group.values()
        if isinstance(case.get("text"), str) and "text_pair" not in case and "ids" in case
    }


@pytest.mark.parametrize(
    ("folder", "name", "wanted"),
    [
        ("clip", "clip", ()),
        ("bert-base-uncased", "bert", ("Xenova/bert-base-uncased",)),
        ("gpt2", "gpt2", ("Xenova/gpt2",)),
        ("t5-small", "t5", ("t5-small",)),
        ("llama2", "llama", ("Xenova/llama-tokenizer",)),
        pytest.param("qwen", "qwen2", (), marks=pytest.mark.slow),
    ],
)
def test_real_tokenizers(shared_path, folder, name, wanted):
    one = text.load(shared_path("data/tokenizers") / folder, 512)
    cases = _expected(shared_path, name, *wanted)
    wrong = {words: one.encode(words) for words, ids in cases.items() if one.encode(words) != ids}
    assert len(cases) > 15 and wrong == {}


def test_roles_of_special_tokens(shared_path):
    folder = shared_path("data/tokenizers")
    clip, bert = text.load(folder / "clip", 77), text.load(folder / "bert-base-uncased", 16)
    assert (clip.bos_token_id, clip.eos_token_id, clip.pad_token_id, clip.vocab_size) == (
        49406,
        49407,
        49407,
        49408,
    )
    assert (bert.bos_token_id, bert.eos_token_id, bert.pad_token_id, bert.vocab_size) == (101, 102, 0, 30522)
    gpt2 = text.load(folder / "gpt2", 8)
    assert gpt2.pad_token_id == gpt2.eos_token_id == 50256


@pytest.mark.slow
def test_bare_sentencepiece_saved_for_transformers(shared_path, tmp_path):
    transformers = pytest.importorskip("transformers")
    one = text.load(shared_path("data/tokenizers/llama2"), 9)
    assert (one.bos_token_id, one.eos_token_id, one.vocab_size) == (1, 2, 32000)
    assert one.decode(one.encode("wörld 日本")) == "wörld 日本"
    one.save(tmp_path)
    hf, again = transformers.AutoTokenizer.from_pretrained(str(tmp_path)), text.load(tmp_path, 9)
    for words in ("How are you doing?", "two  spaces 🙂", ""):
        assert hf(words, truncation=True)["input_ids"] == one.encode(words) == again.encode(words)
    assert (hf.pad_token_id, again.pad_token_id) == (2, 2)
    clip = text.load(shared_path("data/tokenizers/clip"), 9)
    clip.save(tmp_path / "clip")
    hf = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "clip"))
    assert hf("a red cat")["input_ids"] == clip.encode("a red cat") and hf.pad_token_id == 49407


def test_damaged_vocabularies(tmp_path):
    for name, words in (("tokenizer.model", "no sentencepiece model"), ("x.tiktoken", "base64 rank")):
        (tmp_path / name.split(".")[1]).mkdir()
        (tmp_path / name.split(".")[1] / name).write_bytes(b"not one of these files\n")
        with pytest.raises(DataError, match=words.replace("no ", "")):
            text.load(tmp_path / name.split(".")[1], 8)


@pytest.mark.parametrize("folder", ["clip", "bert-base-uncased"])
def test_padding_and_truncation_equal_transformers(shared_path, folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = shared_path("data/tokenizers") / folder
    kind = transformers.CLIPTokenizer if folder == "clip" else transformers.BertTokenizer
    if folder == "clip":
        model = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), encoding="utf-8")
        path_hf = tmp_path
    else:
        path_hf = path
    hf, one = kind.from_pretrained(str(path_hf)), text.load(path, 7)
    texts = [*SENTENCES, "many words " * 20]
    expected = hf(texts, padding="max_length", truncation=True, max_length=7, return_tensors="np")
    out = one(texts)
    for name in ("input_ids", "attention_mask"):
        assert out[name].dtype == np.int32 and out[name].shape == (len(texts), 7)
        np.testing.assert_array_equal(out[name], expected[name])
    assert out["input_ids"][-1, -1] == one.eos_token_id


@pytest.fixture(name="small", scope="module")
def _small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return folder, tokenizer(folder, 10)


def test_trained_tokenizer_is_clips_to_transformers(small):
    transformers = pytest.importorskip("transformers")
    folder, one = small
    longer = text.load(folder, 60)
    assert (
        one.eos_token_id == one.vocab_size - 1 == one.pad_token_id and one.bos_token_id == one.vocab_size - 2
    )
    for kind in (transformers.CLIPTokenizer, transformers.CLIPTokenizerFast, transformers.AutoTokenizer):
        hf = kind.from_pretrained(str(folder))
        for words in [*SENTENCES, *(caption(i) for i in range(30))]:
            assert hf(words)["input_ids"] == longer.encode(words), words
        expected = hf(SENTENCES, padding="max_length", truncation=True, max_length=10, return_tensors="np")
        np.testing.assert_array_equal(one(SENTENCES)["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(one(SENTENCES)["attention_mask"], expected["attention_mask"])
        assert hf.eos_token_id == one.eos_token_id and hf.pad_token_id == one.pad_token_id


def test_trained_tokenizer_knows_its_words_and_every_byte(small):
    _, one = small
    assert len(one.encode("red")) == 3 and one.tokens(one.encode("red"))[1] == "red</w>"
    assert one.decode(one.encode("A Red  square")) == "a red square"
    longer = text.load(small[0], 20)
    assert longer.decode(longer.encode("naïve 日本")) == "naïve 日本" and len(one.encode("naïve 日本")) == 10
    assert max(one.encode("\x00\x7fÿ🙂")) < one.vocab_size


def _digest(folder) -> str:
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(folder.iterdir()))).hexdigest()


def test_training_is_deterministic(tmp_path):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]);"
        "from helpers import caption; from vlmjax.data import bpe;"
        "bpe.train_bpe((caption(i) for i in range(200)), 640, sys.argv[1])"
    )
    here = __file__.rpartition("/")[0]
    for name, seed in (("a", "1"), ("b", "2")):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "RAYON_NUM_THREADS": seed}
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name), here], check=True, env=environment
        )
    assert _digest(tmp_path / "a") == _digest(tmp_path / "b")
    entries = json.loads((tmp_path / "a" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(entries.values()) == list(range(len(entries))) and len(entries) <= 640
    with pytest.raises(ValueError, match="514"):
        bpe.train_bpe(["x"], 100, tmp_path / "c")


def test_save_and_load_again(small, tmp_path):
    folder, one = small
    one.save(tmp_path / "copy")
    assert _digest(tmp_path / "copy") == _digest(folder)
    one.save(folder)
    again = text.load(tmp_path / "copy", 10)
    shutil.rmtree(tmp_path / "copy")
    again.save(tmp_path / "copy2")
    assert _digest(tmp_path / "copy2") == _digest(folder)
    np.testing.assert_array_equal(again(SENTENCES)["input_ids"], one(SENTENCES)["input_ids"])


def test_save_what_came_through_transformers(tmp_path):
    pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "circle", "##s", "a"]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "vocab.txt").write_text("\n".join(words) + "\n")
    bare = text.load(tmp_path / "bare", 8)
    assert bare.encode("A red circles zzz") == [2, 8, 5, 6, 7, 1, 3]
    bare.save(tmp_path / "saved")
    again = text.load(tmp_path / "saved", 8)
    np.testing.assert_array_equal(again(["a red", "zzz"])["input_ids"], bare(["a red", "zzz"])["input_ids"])
    assert again.pad_token_id == 0


def test_counts_and_threads(small):
    folder, _ = small
    one = text.load(folder, 4)
    texts = [f"{a} {b}" for a in WORDS for b in WORDS] + ["red"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda k: one(texts[k % 7 :])["input_ids"], range(40)))
    whole = text.load(folder, 4)(texts)["input_ids"]
    for k, ids in enumerate(results):
        np.testing.assert_array_equal(ids, whole[k % 7 :])
    fresh = text.load(folder, 4)
    fresh(["red", "red green blue", "red green blue"])
    assert (fresh.texts, fresh.truncated) == (3, 2)
    assert pickle.loads(pickle.dumps(fresh)).encode("red") == fresh.encode("red")


def test_errors(tmp_path, small):
    with pytest.raises(DataError, match="no tokenizer folder"):
        text.load(tmp_path / "none", 8)
    with pytest.raises(DataError, match="expected tokenizer.json, vocab.txt"):
        text.load(tmp_path, 8)
    with pytest.raises(DataError, match="text length 2 leaves no room"):
        text.load(small[0], 2)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        text.load(tmp_path, 8)
    with pytest.raises(DataError, match=r"cannot load tokenizer 'nobody/nothing-at-all'"):
        text.load("nobody/nothing-at-all", 8)


def test_trained_folder_without_tokenizer_json(small, tmp_path):
    """vocab.json and merges.txt alone are enough for transformers and for us."""
    pytest.importorskip("transformers")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(small[0] / name, tmp_path)
    one = text.load(tmp_path, 10)
    np.testing.assert_array_equal(one(SENTENCES)["input_ids"], small[1](SENTENCES)["input_ids"])


def test_a_caption_of_a_megabyte_is_cut_before_it_is_encoded(tmp_path, monkeypatch):
    words, seen = tokenizer(tmp_path), []
    real = words._encoder
    monkeypatch.setattr(words, "_encoder", lambda texts: seen.extend(map(len, texts)) or real(texts))
    most = 256 * words.max_length
    huge, before = "red green " * 100_000, words.truncated
    got = words([huge, "red", "red" + " " * most])
    assert seen == [most, 3, most] and words.truncated == before + 2
    assert got["input_ids"].tolist() == words(["red green " * 50, "red", "red"])["input_ids"].tolist()
    monkeypatch.setattr(words, "_cut_left", True)
    seen.clear()
    assert words.encode("blue " * 100_000 + "red green")[-3:-1] == words.encode("red green")[1:-1]
    assert seen[0] == most
