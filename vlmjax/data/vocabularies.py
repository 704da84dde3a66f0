"""Tokenizers from bare vocabulary files that no Hugging Face class reads alone: sentencepiece BPE, tiktoken ranks."""

import base64
import binascii
import pathlib
import struct
from collections.abc import Iterator
from typing import Any

from vlmjax.errors import DataError

# Qwen's splitting into words (Qwen tokenization notes; the same as GPT-4's but for single digits).
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # kinds of piece in sentencepiece_model.proto
_BPE = 2  # kind of model


def tiktoken(path: pathlib.Path) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` from a file of lines 'base64 rank', with Qwen's words and specials.

    Raises:
        DataError: the file is not of that form.
    """
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    try:
        lines = (line.split() for line in path.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path} is not a file of 'base64 rank' lines: {error}") from error
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = _merges({name: ranks[token] for token, name in names.items()})
    model = models.BPE(vocab={names[token]: rank for token, rank in ranks.items()}, merges=merges)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_QWEN_WORDS), behavior="isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(_QWEN_SPECIAL))
    return backend


def sentencepiece(path: pathlib.Path) -> Any:
    """A `tokenizers.Tokenizer` from a sentencepiece BPE model with byte fallback (LLaMA, Vicuna, Mistral).

    Every text begins with the opening token `<s>`, as LLaMA's tokenizer has it.

    Raises:
        DataError: not such a file, or a unigram model (convert that to tokenizer.json with transformers).
    """
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, processors

    pieces, kind = _model_proto(path)
    if kind != _BPE:
        raise DataError(f"{path} is no sentencepiece BPE model; save it with its tokenizer.json")
    vocabulary = {name: i for i, (name, _, _) in enumerate(pieces)}
    normal = {name: (-score, i) for i, (name, score, sort) in enumerate(pieces) if sort == _NORMAL}
    unknown = next((name for name, _, sort in pieces if sort == _UNKNOWN), None)
    fallback = any(sort == _BYTE for _, _, sort in pieces)
    model = models.BPE(
        vocab=vocabulary, merges=_merges(normal), unk_token=unknown, fuse_unk=True, byte_fallback=fallback
    )
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    undo = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(undo)
    special = [name for name, _, sort in pieces if sort in (_CONTROL, _UNKNOWN)]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    if "<s>" in vocabulary:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    return backend


def _merges(order: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges of a BPE vocabulary known only by the order of its entries.

    An entry may be made of any two entries that spell it; it is made as soon as its own turn comes. Pairs of one
    entry are tried in the order of their halves.
    """
    out = []
    for name in sorted(order, key=order.__getitem__):
        pairs = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        pairs = [pair for pair in pairs if pair[0] in order and pair[1] in order]
        out += sorted(pairs, key=lambda pair: (order[pair[0]], order[pair[1]]))
    return out


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


def _model_proto(path: pathlib.Path) -> tuple[list[tuple[str, float, int]], int]:
    """(pieces as name, score, kind; kind of model) of a sentencepiece file."""
    pieces, kind = [], 1
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                parts = dict(_fields(value))
                score = struct.unpack("<f", parts.get(2, bytes(4)))[0]
                pieces.append((parts[1].decode("utf-8"), score, parts.get(3, _NORMAL)))
            elif field == 2:
                kind = dict(_fields(value)).get(3, 1)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, struct.error) as error:
        raise DataError(f"{path} is not a sentencepiece model: {error}") from error
    return pieces, kind


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer message: int, or bytes for all else."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 2, 5):
            size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"unknown wire type {wire}")
        yield tag >> 3, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at
