"""A small CLIP-style byte-pair tokenizer, trained offline on a recipe's own captions."""

import json
import os
from collections.abc import Iterable

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
# The words of CLIP (Radford et al. 2021, simple_tokenizer.py): contractions, letters, one digit, other signs.
_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
_WORD_END = "</w>"


def train_bpe(
    captions: Iterable[str], vocab_size: int, folder: str | os.PathLike[str], *, model_max_length: int = 77
) -> None:
    """Learn a vocabulary from captions and write it as a Hugging Face CLIP tokenizer folder.

    Lower-cased, byte-level (so no text is unknown), words end in `</w>`, ids in CLIP's order: 256 bytes, 256
    bytes that end a word, merges, `<|startoftext|>`, `<|endoftext|>`; the closing token has the largest id,
    which is what CLIP's pooling looks for. The same captions give the same files.
    `transformers.CLIPTokenizer`, `AutoTokenizer` and `vlmjax.data.text.load` read the folder and agree.

    Args:
        captions: texts to learn from, read once.
        vocab_size: size wanted; fewer where the captions hold fewer pairs, at least 514.
        folder: where the files go; made when missing.
        model_max_length: the length transformers cuts at when told to truncate.

    Raises:
        ValueError: `vocab_size` below 514.
    """
    if vocab_size < 514:
        raise ValueError(f"vocab_size {vocab_size} is below 514: 2 x 256 bytes and 2 special tokens")
    merges = _learn(captions, vocab_size - 514) if vocab_size > 514 else []
    symbols = _byte_symbols()
    entries = (
        symbols + [symbol + _WORD_END for symbol in symbols] + ["".join(pair) for pair in merges] + [BOS, EOS]
    )
    vocabulary = {entry: i for i, entry in enumerate(dict.fromkeys(entries))}
    os.makedirs(folder, exist_ok=True)
    backend = _build(vocabulary, merges)
    backend.save(os.path.join(folder, "tokenizer.json"))
    _write_json(folder, "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    with open(os.path.join(folder, "merges.txt"), "w", encoding="utf-8") as out:
        out.write("\n".join(lines) + "\n")
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": EOS}
    _write_json(folder, "special_tokens_map.json", special)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": model_max_length,
        "do_lower_case": True,
    }
    _write_json(folder, "tokenizer_config.json", settings | special)


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's order (Latin-1's printable ones first)."""
    import tokenizers

    alphabet = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    plain = sorted(symbol for symbol in alphabet if ord(symbol) < 256)
    return plain + sorted(alphabet - set(plain))


def _learn(captions: Iterable[str], count: int) -> list[tuple[str, str]]:
    """The `count` most useful merges, from the `tokenizers` trainer."""
    import tokenizers
    from tokenizers import models, trainers

    backend = tokenizers.Tokenizer(models.BPE(end_of_word_suffix=_WORD_END))
    backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
    symbols = _byte_symbols()
    trainer = trainers.BpeTrainer(
        vocab_size=count + 512,
        initial_alphabet=symbols,
        end_of_word_suffix=_WORD_END,
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    learned = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    return [pair for pair in learned if len(pair) == 2][:count]


def _normalizer():
    from tokenizers import Regex, normalizers

    steps = [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    return normalizers.Sequence(steps)


def _pre_tokenizer():
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])


def _build(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    import tokenizers
    from tokenizers import AddedToken, decoders, models, processors

    model = models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix=_WORD_END, unk_token=EOS)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer = _normalizer(), _pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    ids = vocabulary[EOS], vocabulary[BOS]
    backend.post_processor = processors.RobertaProcessing((EOS, ids[0]), (BOS, ids[1]), False, False)
    backend.add_special_tokens([AddedToken(BOS, normalized=True), AddedToken(EOS, normalized=False)])
    return backend


def _write_json(folder: str | os.PathLike[str], name: str, value: dict) -> None:
    with open(os.path.join(folder, name), "w", encoding="utf-8") as out:
        json.dump(value, out, ensure_ascii=False, indent=1)
        out.write("\n")
