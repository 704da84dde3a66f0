"""Captions to token ids: any Hugging Face tokenizer, fixed length, the ids transformers would give."""

import copy
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmjax.data import vocabularies, words
from vlmjax.errors import DataError

_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "vocab.txt tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja"
).split()
_CHARACTERS = 256  # of a text per id of a row; the longest vocabulary entries, runs of spaces, have about 128
# What a bare tokenizer.json does not say: which of its special tokens play which part, best guess first.
_ROLES = {
    "bos": ("<|startoftext|>", "[CLS]", "<s>"),
    "eos": ("<|endoftext|>", "[SEP]", "</s>", "<|im_end|>"),
    "pad": ("[PAD]", "<pad>", "<|endoftext|>", "</s>"),
}


class Tokenizer:
    """A tokenizer at one length: `tokenizer(["a cat"]) -> {"input_ids", "attention_mask"}`, int32.

    Ids are those of the `tokenizers` library, got word by word from a memory where that is the same (see
    `words.Encoder`). Longer texts are cut as transformers cuts them: the opening and closing tokens stay, text goes
    at the end (or at its start, with `truncation="left"`); `truncated` counts them. Of a text of more than 256
    characters per id of a row only so many are looked at: a megabyte in a caption must not hold up its batch.
    Safe to call from many threads.

    Attributes:
        max_length: every row has this many ids.
        vocab_size: one more than the largest id.
        bos_token_id, eos_token_id, pad_token_id: None where the tokenizer has no such token; a tokenizer
            without a padding token pads with its closing token (masked out).
        texts, truncated: how many texts were encoded, and how many of them did not fit.
    """

    def __init__(
        self,
        backend: Any,
        max_length: int,
        *,
        bos: int | None,
        eos: int | None,
        pad: int | None,
        side: str = "right",
        truncation: str = "right",
        files: dict[str, bytes] | None = None,
        hf: Any = None,
    ):
        """`backend` is a `tokenizers.Tokenizer`; it is copied, so the caller's own is left as it was.

        `save` writes `files`, or asks the transformers tokenizer `hf` to write itself.
        """
        self._backend = type(backend).from_str(backend.to_str())
        self._backend.no_padding()
        self._backend.no_truncation()
        self.max_length, self.bos_token_id, self.eos_token_id = max_length, bos, eos
        self.pad_token_id = pad if pad is not None else (eos if eos is not None else 0)
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self._pad_left, self._cut_left = side == "left", truncation == "left"
        self._files, self._hf = files or {}, hf
        self._before, self._after = _around(self._backend)
        self._encoder = words.Encoder(self._backend)
        self._lock = threading.Lock()
        self.texts = self.truncated = 0

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Encode texts: `input_ids` and `attention_mask` (1 on tokens), int32 [len(texts), max_length]."""
        rows, cut = self.encode_rows(texts)
        with self._lock:
            self.texts += len(texts)
            self.truncated += cut
        return rows

    def encode_rows(self, texts: Sequence[str]) -> tuple[dict[str, np.ndarray], int]:
        """What a call gives, and how many texts were cut: for workers, whose counters their parent does not see."""
        parts, cut = self._parts(texts)
        before, after = self._before, self._after
        blank = self._blank()
        if self._pad_left:
            rows = [b"".join((blank[len(part) :], before, part, after)) for part in parts]
        else:
            rows = [b"".join((before, part, after, blank[len(part) :])) for part in parts]
        ids = np.frombuffer(bytearray().join(rows), "<i4").reshape(len(rows), self.max_length)
        lengths = self._lengths(parts)[:, None]
        places = np.arange(self.max_length)
        mask = places >= self.max_length - lengths if self._pad_left else places < lengths
        return {"input_ids": ids.astype(np.int32, copy=False), "attention_mask": mask.astype(np.int32)}, cut

    def at_length(self, max_length: int) -> "Tokenizer":
        """The same tokenizer with rows of another length. Raises DataError for one without room for a text."""
        needed = (len(self._before) + len(self._after)) // 4
        if max_length <= needed:
            raise DataError(f"text length {max_length} leaves no room beside {needed} special tokens")
        other = copy.copy(self)
        other.max_length = max_length
        return other

    def _room(self) -> int:
        """Bytes of a row beside the special tokens."""
        return max(0, 4 * self.max_length - len(self._before) - len(self._after))

    def _blank(self) -> bytes:
        return np.full(self._room() // 4, self.pad_token_id, "<i4").tobytes()

    def _parts(self, texts: Sequence[str]) -> tuple[list[bytes], int]:
        """Ids of each text (int32, as bytes), without special tokens, cut at the length; how many were cut."""
        most, room = _CHARACTERS * self.max_length, self._room()
        huge = {place for place, text in enumerate(texts) if len(text) > most}
        if huge:
            texts = [text[-most:] if self._cut_left else text[:most] for text in texts]
        parts = self._encoder(texts)
        long = [place for place, part in enumerate(parts) if len(part) > room]
        for place in long:
            part = parts[place]
            parts[place] = part[len(part) - room :] if self._cut_left else part[:room]
        return parts, len(huge.union(long))

    def _lengths(self, parts: list[bytes]) -> np.ndarray:
        around = len(self._before) + len(self._after)
        return (np.fromiter(map(len, parts), np.int64, len(parts)) + around) // 4

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """How many ids each text has in a row, special tokens included: int64 [len(texts)]. Not counted."""
        return self._lengths(self._parts(texts)[0])

    def overflow(self, text: str) -> int:
        """How many ids of a text are cut off. Not counted."""
        return max(0, len(self._encoder([text])[0]) - self._room()) // 4

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text with its special tokens, cut at the length, not padded: int32 arrays. Not counted."""
        parts = self._parts(texts)[0]
        rows = (b"".join((self._before, part, self._after)) for part in parts)
        return [np.frombuffer(row, "<i4").astype(np.int32) for row in rows]

    def encode(self, text: str) -> list[int]:
        """The ids of one text with its special tokens, cut at the length, neither padded nor counted."""
        return self.encode_all([text])[0].tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of some ids, special tokens left out."""
        text = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text.replace("</w>", " ").strip()

    def tokens(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The vocabulary entries of some ids."""
        return [self._backend.id_to_token(int(i)) or "" for i in ids]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that `load` and transformers read."""
        os.makedirs(folder, exist_ok=True)
        if self._hf is not None:
            self._hf.save_pretrained(str(folder))
            return
        for name, data in self._files.items():
            pathlib.Path(folder, name).write_bytes(data)

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer` behind it, without padding and truncation. Not to be changed."""
        return self._backend

    @property
    def hf(self) -> Any:
        """The transformers tokenizer it came from, None where it came from plain files."""
        return self._hf

    def token_id(self, token: str) -> int | None:
        """The id of one entry of the vocabulary, None where it has none such."""
        return self._backend.token_to_id(token)

    def __getstate__(self) -> dict[str, Any]:
        """A lock stays in its process."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """With a lock of its own."""
        vars(self).update(state, _lock=threading.Lock())


def _around(backend: Any) -> tuple[bytes, bytes]:
    """The special tokens before and after every text: int32 ids, as bytes. Raises DataError."""
    full, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            before, after = full[:start], full[start + len(bare) :]
            return np.array(before, "<i4").tobytes(), np.array(after, "<i4").tobytes()
    raise DataError(
        f"the tokenizer makes {full} of 'a', which does not contain the ids of the text alone, {bare}"
    )


def load(folder_or_id: str | os.PathLike[str], max_length: int = 77) -> Tokenizer:
    """Open a tokenizer: a folder in Hugging Face's layout, a folder of bare vocabulary files, or a hub id.

    A CLIP folder with its `tokenizer.json` is read by the `tokenizers` library alone; every other goes
    through transformers, so that the rules of its class apply. Bare files work too: `tokenizer.json`, BERT's
    `vocab.txt`, `vocab.json` with `merges.txt`, a sentencepiece BPE `tokenizer.model`, a `.tiktoken` file of Qwen.

    Raises:
        DataError: nothing readable there, or the length has no room for the special tokens.
    """
    path = pathlib.Path(folder_or_id).expanduser()
    if path.is_dir():
        names = {entry.name for entry in path.iterdir()}
        tokenizer = _load_folder(path, names, max_length)
    elif path.exists() or str(folder_or_id).startswith((".", "/", "~")):
        raise DataError(
            f"no tokenizer folder at {folder_or_id}; "
            "give a folder or a hub id such as openai/clip-vit-large-patch14"
        )
    else:
        tokenizer = _from_transformers(str(folder_or_id), max_length)
    needed = len(tokenizer.encode(""))
    if max_length <= needed:
        raise DataError(
            f"text length {max_length} leaves no room beside the {needed} special tokens of {folder_or_id}"
        )
    return tokenizer


def with_token(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The tokenizer with one more special token, such as "<image>"; itself where it has that. `save` writes it too."""
    if tokenizer.token_id(token) is not None:
        return tokenizer
    if tokenizer.hf is not None:
        hf = copy.deepcopy(tokenizer.hf)
        hf.add_special_tokens({"additional_special_tokens": [token]}, replace_extra_special_tokens=False)
        return _wrap(hf, tokenizer.max_length)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        backend = type(tokenizer.backend).from_str(tokenizer.backend.to_str())
        backend.add_special_tokens([token])
        backend.save(os.path.join(folder, "tokenizer.json"))
        return load(folder, tokenizer.max_length)


def _load_folder(path: pathlib.Path, names: set[str], max_length: int) -> Tokenizer:
    settings = _read_json(path / "tokenizer_config.json")
    named = settings.get("tokenizer_class") or (
        "config.json" in names and "model_type" in _read_json(path / "config.json")
    )
    is_clip = str(settings.get("tokenizer_class", "")).startswith("CLIPTokenizer")
    if "tokenizer.json" in names and (is_clip or not named):
        return _from_json(path, settings, max_length)
    if named:
        return _from_transformers(str(path), max_length)
    return _from_bare_files(path, names, max_length)


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not json: {error}") from error
    return value if isinstance(value, dict) else {}


def _from_json(path: pathlib.Path, settings: dict[str, Any], max_length: int) -> Tokenizer:
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path / 'tokenizer.json'} is not a tokenizer: {error}") from error
    settings = _read_json(path / "special_tokens_map.json") | settings
    side = settings.get("padding_side", "right")
    # Kept, not copied at the end: the folder may be temporary.
    files = {name: (path / name).read_bytes() for name in _FILES if (path / name).is_file()}
    ids = _roles(backend, settings)
    files = _written(backend, ids, max_length) | files  # a bare tokenizer.json lacks its settings
    truncation = settings.get("truncation_side", "right")
    return Tokenizer(backend, max_length, **ids, side=side, truncation=truncation, files=files)


def _written(backend: Any, ids: dict[str, int | None], max_length: int) -> dict[str, bytes]:
    """The files of a tokenizer that came from no Hugging Face folder."""
    settings = {f"{role}_token": backend.id_to_token(i) for role, i in ids.items() if i is not None}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_length}
    config = json.dumps(settings, indent=1) + "\n"
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": config.encode()}


def _roles(backend: Any, settings: dict[str, Any]) -> dict[str, int | None]:
    """Ids of the opening, closing and padding tokens: as stated, or special tokens with the usual names."""
    special = {token.content for token in backend.get_added_tokens_decoder().values()}
    ids = {}
    for role, guesses in _ROLES.items():
        stated = settings.get(f"{role}_token")
        stated = stated.get("content") if isinstance(stated, dict) else stated
        candidates = [stated] if stated else [guess for guess in guesses if guess in special]
        ids[role] = next((i for i in map(backend.token_to_id, candidates) if i is not None), None)
    return ids


def _from_bare_files(path: pathlib.Path, names: set[str], max_length: int) -> Tokenizer:
    """Vocabulary files without a word about their class: the file names tell."""
    ranks = sorted(name for name in names if name.endswith(".tiktoken"))
    if ranks or "tokenizer.model" in names:
        read, name = (
            (vocabularies.tiktoken, ranks[0]) if ranks else (vocabularies.sentencepiece, "tokenizer.model")
        )
        backend = read(path / name)
        ids = _roles(backend, {})
        return Tokenizer(backend, max_length, **ids, files=_written(backend, ids, max_length))
    import transformers

    if "vocab.txt" in names:
        hf = transformers.BertTokenizerFast.from_pretrained(str(path))
    elif {"vocab.json", "merges.txt"} <= names:
        vocabulary = _read_json(path / "vocab.json")
        clip = "<|startoftext|>" in vocabulary
        hf = (transformers.CLIPTokenizerFast if clip else transformers.GPT2TokenizerFast).from_pretrained(
            str(path)
        )
    else:
        listing = ", ".join(sorted(names)[:8]) or "nothing"
        raise DataError(
            f"no tokenizer in {path} (it holds {listing}); expected tokenizer.json, vocab.txt, "
            "vocab.json with merges.txt, a sentencepiece BPE tokenizer.model, or a .tiktoken file"
        )
    return _wrap(hf, max_length)


def _from_transformers(name: str, max_length: int) -> Tokenizer:
    import transformers

    try:
        hf = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
    except Exception as error:  # network, permissions, unknown classes: transformers has no common base class
        raise DataError(f"cannot load tokenizer {name!r}: {str(error).splitlines()[0]}") from error
    return _wrap(hf, max_length)


def _wrap(hf: Any, max_length: int) -> Tokenizer:
    if not getattr(hf, "is_fast", False):
        raise DataError(
            f"tokenizer {hf.name_or_path!r} ({type(hf).__name__}) has no fast form; "
            "save it with its tokenizer.json"
        )
    return Tokenizer(
        hf.backend_tokenizer,
        max_length,
        bos=hf.bos_token_id if hf.bos_token_id is not None else hf.cls_token_id,
        eos=hf.eos_token_id if hf.eos_token_id is not None else hf.sep_token_id,
        pad=hf.pad_token_id,
        side=hf.padding_side,
        truncation=hf.truncation_side,
        hf=hf,
    )
