"""Checkpoints of llama2.c: equal to that program's own arithmetic, and to a real model where there is one."""

import struct
from pathlib import Path

import numpy as np
import pytest

from vlmjax import decode, hub
from vlmjax.errors import HubError
from vlmjax.hub import llama2c

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "stories260k"
WIDTH, MLP, DEPTH, HEADS, KV, VOCAB, LENGTH = 24, 40, 2, 4, 2, 267, 16
HEAD = WIDTH // HEADS
WORDS = ["▁", "a", "b", "▁a", "ab", "▁ab", "ba", "é"]


def write_model(path, seed=0, cut=0):
    """A random checkpoint in the order of llama2.c's legacy_export, and its arrays."""
    rng = np.random.default_rng(seed)
    shapes = [
        (VOCAB, WIDTH), (DEPTH, WIDTH), (DEPTH, WIDTH, WIDTH), (DEPTH, KV * HEAD, WIDTH), (DEPTH, KV * HEAD, WIDTH),
        (DEPTH, WIDTH, WIDTH), (DEPTH, WIDTH), (DEPTH, MLP, WIDTH), (DEPTH, WIDTH, MLP), (DEPTH, MLP, WIDTH), (WIDTH,),
        (2, LENGTH, HEAD // 2),
    ]  # fmt: skip
    arrays = [rng.normal(0, 0.3, shape).astype("<f4") for shape in shapes]
    header = struct.pack("<7i", WIDTH, MLP, DEPTH, HEADS, KV, VOCAB, LENGTH)
    data = header + b"".join(array.tobytes() for array in arrays)
    path.write_bytes(data[: len(data) - cut])
    return arrays


def write_vocabulary(path, words=WORDS):
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *words]
    data = struct.pack("<i", max(map(len, pieces)))
    for i, piece in enumerate(pieces):
        raw = piece.replace("▁", " ").encode()
        data += struct.pack("<fi", float(-i), len(raw)) + raw
    path.write_bytes(data)


def run_c(arrays, tokens):
    """run.c's forward pass, written out: logits after each token."""
    tok, rms_att, wq, wk, wv, wo, rms_ffn, w1, w2, w3, rms_final, _ = (a.astype(np.float64) for a in arrays)

    def rms(x, w):
        return x / np.sqrt((x * x).mean() + 1e-5) * w

    def turn(x, position):
        out = x.copy()
        for i in range(0, x.size, 2):
            angle = position * 10000.0 ** (-(i % HEAD) / HEAD)
            a, b = x[i], x[i + 1]
            out[i], out[i + 1] = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
        return out

    keys, values, logits = [[] for _ in range(DEPTH)], [[] for _ in range(DEPTH)], []
    for position, token in enumerate(tokens):
        x = tok[token].copy()
        for layer in range(DEPTH):
            y = rms(x, rms_att[layer])
            q, k = turn(wq[layer] @ y, position), turn(wk[layer] @ y, position)
            keys[layer].append(k)
            values[layer].append(wv[layer] @ y)
            mixed = np.zeros(WIDTH)
            for head in range(HEADS):
                own, shared = slice(head * HEAD, (head + 1) * HEAD), head // (HEADS // KV) * HEAD
                scores = np.array([q[own] @ key[shared : shared + HEAD] for key in keys[layer]]) / np.sqrt(
                    HEAD
                )
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                mixed[own] = sum(
                    w * v[shared : shared + HEAD] for w, v in zip(weights, values[layer], strict=True)
                )
            x = x + wo[layer] @ mixed
            y = rms(x, rms_ffn[layer])
            gate = w1[layer] @ y
            x = x + w2[layer] @ (gate / (1 + np.exp(-gate)) * (w3[layer] @ y))
        logits.append(tok @ rms(x, rms_final))
    return np.stack(logits)


@pytest.fixture
def folder(tmp_path):
    arrays = write_model(tmp_path / "model.bin")
    write_vocabulary(tmp_path / "words.bin")
    llama2c.convert(tmp_path / "model.bin", tmp_path / "words.bin", tmp_path / "hf")
    return arrays, tmp_path / "hf"


def test_logits_are_those_of_the_c_program(folder):
    arrays, path = folder
    model, params = hub.load(path)
    tokens = [1, 260, 261, 5, 266, 2, 259]
    found = model.apply({"params": params}, np.array([tokens], np.int32), method="causal_lm")[0]
    expected = run_c(arrays, tokens)
    np.testing.assert_allclose(np.asarray(found), expected, atol=1e-4 * np.abs(expected).max())


def test_the_tokenizer_joins_by_score(folder):
    tokenizer, _ = hub.load_processor(folder[1])
    assert tokenizer.max_length == LENGTH and tokenizer.vocab_size == VOCAB
    place = {word: 259 + i for i, word in enumerate(WORDS)}
    # "▁a" is made first, then "ab" of what is left, then "▁ab"; a letter without a piece is its bytes.
    assert tokenizer.encode("abab") == [1, place["▁ab"], place["ab"]]
    assert tokenizer.encode("aéc") == [1, place["▁a"], place["é"], 3 + ord("c")]


def test_files_that_are_something_else(tmp_path):
    write_vocabulary(tmp_path / "words.bin")
    write_model(tmp_path / "cut.bin", cut=8)
    with pytest.raises(HubError, match="cut.bin: holds .* numbers after its sizes"):
        llama2c.read_model(tmp_path / "cut.bin")
    (tmp_path / "text").write_text("no model, but long enough to have a header")
    with pytest.raises(HubError, match="are no sizes of a Llama"):
        llama2c.read_model(tmp_path / "text")
    (tmp_path / "short").write_bytes(b"123")
    with pytest.raises(HubError, match="3 bytes are too few"):
        llama2c.read_model(tmp_path / "short")
    with pytest.raises(HubError, match="no tokenizer of llama2.c"):
        llama2c.read_vocabulary(tmp_path / "text")
    write_model(tmp_path / "model.bin")
    write_vocabulary(tmp_path / "words.bin", WORDS[:-1])
    with pytest.raises(HubError, match="has 266 tokens, .* embeds 267"):
        llama2c.convert(tmp_path / "model.bin", tmp_path / "words.bin", tmp_path / "hf")


@pytest.mark.skipif(not SHARED.is_dir(), reason="no real checkpoint on this machine")
def test_a_real_model_tells_its_story(tmp_path):
    llama2c.convert(SHARED / "stories260K.bin", SHARED / "tok512.bin", tmp_path)
    model, params = hub.load(tmp_path)
    ids = np.asarray(decode.generate(model, params, input_ids=np.array([[1]], np.int32), max_new_tokens=19))[
        0
    ]
    expected = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267]
    assert ids.tolist() == expected
    tokenizer, _ = hub.load_processor(tmp_path)
    assert tokenizer.encode("Once upon a time, there was a little girl named Lily.") == [1, *expected[:15]]
