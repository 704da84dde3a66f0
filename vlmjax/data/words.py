"""Texts to ids word by word: a bounded memory of words, for tokenizers that split every text at its spaces."""

import itertools
import logging
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

_log = logging.getLogger(__name__)
WORDS = 2_000_000  # words kept, about 200 bytes each
TEXTS = 200_000  # whole texts kept, where words cannot be
_LONGEST = 64  # characters; what is longer (a link, a sentence without spaces) seldom comes again
_CHECKED_TEXTS = 1_000
_CROSSING = 2_000  # entries with a space inside that are tried
# Each of these is put before and after a space and before and after each other one: letters with and without case,
# contractions, digits, signs, other scripts, marks that combine, invisible characters, spaces of other kinds, and
# the letters that vocabularies use for a space or the edge of a word.
_AWKWARD = (
    "a Cat of the in it's 's ' o'clock N'T don't 4 1234567 3.14 1st x2 . ... ,b !? ( (c) #tag $3 a_b _ - -- a-b "
    "& &amp; http://x.y/z?q=1 é e\u0301 \u0301 \u0308a İ ß Σ ΑΣ ǅ ﬁ Ⅷ ½ ² 日本 日本。 カ ガ 한국 привет עב ไทย "
    "हिन्दी 🙂 👩\u200d👧 🏽 🇫🇷 \u200d \u200b \ufeff \u00ad \u0600 \u202e ’s “q” — ▁ a▁ Ġ Ġa </w> ##ing <b> "
    "\x00 \x7f \ue000 \U0010ffff"
).split(" ")
_SPACED = ("\n", "a\n", "\nb", "a\tb", "\u3000", "a\u3000", "\xa0", "\xa0b", "\x85", "\x1c", "\u2028", "\r")
_SENTENCES = (
    "a photo of a cat on the table, in the style of Van Gogh.",
    "Don't panic! It's 42 o'clock; we're   late…",
    " leading, trailing and  double spaces ",
    "one\ntwo\r\n three\t four \n\n five",
    "naïve café – 日本の写真 (2019) 🙂🙂 #sunset @home",
)


class Cut(NamedTuple):
    """How texts fall into words: the ids of a text are those of its words, in order.

    A text is cut at U+0020. The first word is encoded as it is, the others with `lead` before them. With `loose`,
    spaces have no ids of their own; else a text with spaces at its ends, in a row, or beside others goes as a whole.
    """

    lead: str
    loose: bool


class _Memory(dict):
    """Words to their ids, as bytes; a word not met before is encoded on the way. None marks what must not be cut.

    Half of the room is for what was used since the last clearing, half for what was there before it, so the words
    in use stay. Clearing beside a reader costs that reader some encoding and nothing else.
    """

    def __init__(self, make: Callable[[str], bytes | None], limit: int):
        super().__init__()
        self._make, self._half, self._older = make, max(1, limit // 2), {}

    def __missing__(self, word: str) -> bytes | None:
        older = self._older
        ids = older[word] if word in older else self._make(word)
        if len(word) <= _LONGEST:
            self.keep(word, ids)
        return ids

    def keep(self, word: str, ids: bytes | None) -> None:
        if len(self) >= self._half:
            self._older = self.copy()
            self.clear()
        self[word] = ids

    def held(self) -> int:
        return len(self) + len(self._older)


class Encoder:
    """Ids of texts without special tokens, equal to `backend.encode(text, add_special_tokens=False).ids`.

    Safe to call from many threads, and can be sent to another process, where its memory starts empty.

    Attributes:
        cut: how texts are cut into words; None where the tokenizer does not allow it, and texts go whole.
    """

    def __init__(self, backend: Any, *, words: int = WORDS, texts: int = TEXTS):
        """`backend` is a `tokenizers.Tokenizer` without padding and truncation; `words` and `texts` bound memory."""
        self._backend, self._limits = backend, (words, texts)
        self._added = frozenset(backend.get_added_tokens_decoder())
        self._unknown = _plain_unknown(backend)
        self.cut = find_cut(self)
        self._unchecked = _CHECKED_TEXTS
        self._reset()

    def _reset(self) -> None:
        words, texts = self._limits
        self._texts: _Memory = _Memory(_absent, texts)
        if self.cut is None:
            return
        cut = self.cut
        self._head = self._tail = _Memory(lambda word: self.word(word, cut), words)
        if cut.lead:  # a word that opens a text is another one than inside
            self._head = _Memory(lambda word: self.word(word, cut, first=True), words // 8)

    def __call__(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of each text: little-endian int32, as bytes."""
        if self.cut is None:
            return self._whole(texts)
        out = self._by_words(texts)
        missing = [place for place, ids in enumerate(out) if ids is None]
        if missing:
            for place, ids in zip(missing, self._whole([texts[place] for place in missing]), strict=True):
                out[place] = ids
        return self._checked(texts, out) if self._unchecked > 0 else out

    def _by_words(self, texts: Sequence[str]) -> list[bytes | None]:
        out: list[bytes | None] = []
        join, tail, head = b"".join, self._tail.__getitem__, self._head
        for text in texts:
            first, *rest = text.split(" ")
            try:
                out.append(head[first] + join(map(tail, rest)))
            except TypeError:  # a None among them
                out.append(None)
        return out

    def _whole(self, texts: Sequence[str]) -> list[bytes]:
        """Texts that cannot be cut. A caption comes back every epoch, so some results are kept."""
        known = self._texts
        found = {text: known[text] for text in texts}
        new = [text for text, ids in found.items() if ids is None]
        if new:
            for text, ids in zip(new, self.plain(new), strict=True):
                found[text] = ids
                known.keep(text, ids)
        return [found[text] for text in texts]

    def plain(self, texts: Sequence[str]) -> list[bytes]:
        """Straight from the tokenizer."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, "<i4").tobytes() for one in encoded]

    def word(self, word: str, cut: Cut, first: bool = False) -> bytes | None:
        """The ids of one word in its place in a text; None where they depend on what is beside it."""
        if not cut.loose and (not word or word[-1].isspace() or "▁" in word):
            return None
        if not word:
            return b""
        ids = self._backend.encode(word if first else cut.lead + word, add_special_tokens=False).ids
        if not self._added.isdisjoint(ids) and any(self._is_added(one, word) for one in ids):
            return None  # text beside an added token starts anew for some tokenizers
        return np.array(ids, "<i4").tobytes()

    def _is_added(self, one: int, word: str) -> bool:
        unknown, content = self._unknown
        return one in self._added and not (one == unknown and content not in word)

    def _checked(self, texts: Sequence[str], out: list[bytes]) -> list[bytes]:
        """The first texts are encoded both ways; words are given up for good when one differs."""
        right = self.plain(texts)
        self._unchecked -= len(texts)
        wrong = next((i for i, pair in enumerate(zip(out, right, strict=True)) if pair[0] != pair[1]), None)
        if wrong is not None:
            _log.warning(
                "tokenizer: %r has other ids word by word; texts are encoded whole, slower", texts[wrong]
            )
            self.cut = None
        return right

    def held(self) -> int:
        """How many words and texts are kept."""
        if self.cut is None:
            return self._texts.held()
        heads = 0 if self._head is self._tail else self._head.held()
        return self._texts.held() + self._tail.held() + heads

    def __getstate__(self) -> dict[str, Any]:
        """Another process fills a memory of its own."""
        return {n: v for n, v in vars(self).items() if n not in ("_head", "_tail", "_texts")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Start with an empty memory."""
        vars(self).update(state)
        self._reset()


def _absent(_: str) -> None:
    return None


def _plain_unknown(backend: Any) -> tuple[int | None, str]:
    """(id, content) of the unknown token, where its content alone tells whether a text names it; else (None, "")."""
    content = getattr(backend.model, "unk_token", None)
    if not content:
        return None, ""
    number = backend.token_to_id(content)
    token = backend.get_added_tokens_decoder().get(number)
    return (None, "") if token is None or token.normalized else (number, content)


def find_cut(encoder: Encoder) -> Cut | None:
    """How a tokenizer's texts can be cut, found by trying: awkward neighbours, sentences, odd vocabulary entries.

    What stands at a space decides whether it may be cut there, so all pairs of awkward fragments around a space are
    compared with the tokenizer itself. Entries with a space inside (trained across words) would join what was cut:
    those are tried too.
    """
    backend = encoder._backend
    model = type(backend.model).__name__
    if getattr(backend.model, "dropout", None) or (model == "Unigram" and backend.pre_tokenizer is None):
        return None  # random, or the best path through a whole text
    contents = (token.content for token in backend.get_added_tokens_decoder().values())
    if any(" " in content.strip() or content == " " for content in contents):
        return None
    pairs = [f"{a} {b}" for a, b in itertools.product(_AWKWARD, repeat=2)]
    spaced = [f"{a} {b}" for a, b in itertools.product((*_SPACED, "", " "), _AWKWARD[:30])]
    spaced += [f"{b} {a}" for a, b in itertools.product((*_SPACED, "", " "), _AWKWARD[:30])]
    tried = [*pairs, *spaced, *_SENTENCES, *_crossing_texts(backend)]
    right = encoder.plain(tried)
    for cut in (Cut("", True), Cut("", False), Cut(" ", False)):
        if all(map(_agrees(encoder, cut), tried, right)):
            return cut
    return None


def _agrees(encoder: Encoder, cut: Cut) -> Callable[[str, bytes], bool]:
    known: dict[tuple[str, bool], bytes | None] = {}

    def word(word: str, first: bool) -> bytes | None:
        if (word, first) not in known:
            known[word, first] = encoder.word(word, cut, first)
        return known[word, first]

    def agrees(text: str, right: bytes) -> bool:
        parts = [word(part, not place) for place, part in enumerate(text.split(" "))]
        return None in parts or b"".join(parts) == right

    return agrees


def _crossing_texts(backend: Any) -> list[str]:
    """Texts of vocabulary entries in which a space follows something else, at their ends too."""
    inner = re.compile(r"[^\sĠ▁ĉĊčł][Ġ▁ ]")
    vocabulary: Iterable[tuple[str, int]] = backend.get_vocab(with_added_tokens=False).items()
    found = sorted((entry for entry in vocabulary if inner.search(entry[0])), key=operator.itemgetter(1))
    texts = [backend.decode([i], skip_special_tokens=False) for _, i in found[:_CROSSING]]
    texts += [entry.replace("Ġ", " ").replace("▁", " ") for entry, _ in found[:_CROSSING]]
    return [text + end for text in texts for end in ("", "a")]
