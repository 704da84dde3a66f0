"""From the pieces of a conversation to ids: one call of the tokenizer for each piece, its loss attached to it."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data import chat_template
from vlmjax.data import conversation as talk
from vlmjax.data.conversation import Conversation, Segment
from vlmjax.data.conversation_templates import CLOSE, OPEN, OWN, Template, template
from vlmjax.errors import BadRecord, DataError


class Encoded(NamedTuple):
    """A conversation as tokens.

    Attributes:
        input_ids: int32 [n]; an image is its number of tokens times the same id.
        loss_weights: float32 [n], 1 on tokens that the model learns to write: of each token as a target, not shifted.
        spans: (first token, tokens) of each image that is in, in order.
        cut: how many tokens did not fit.
    """

    input_ids: np.ndarray
    loss_weights: np.ndarray
    spans: tuple[tuple[int, int], ...]
    cut: int


class Pieces:
    """A tokenizer that takes texts in pieces.

    Three things differ from encoding a whole text. Words are literal: a user who writes `</s>` has not ended the
    turn. The opening token stands once, where the tokenizer itself would put it. And tokenizers of sentencepiece's
    kind (Llama) put a space before whatever they are given, which is right where a text begins, and after a control
    token if the tokenizer does so there by itself, but wrong in the middle: " yes" after "ASSISTANT:" is "▁yes", not
    "▁", "▁yes", and "yes" after a line break is not "▁yes". There the piece is encoded behind a line break, whose own
    ids are taken off.

    Attributes:
        opening: ids before every text.
        eos_token_id, pad_token_id: as of `text.Tokenizer`.
        chat: the tokenizer's own chat template, or None.
    """

    def __init__(self, tokenizer: Any):
        """`tokenizer` is a `text.Tokenizer`, a fast one of transformers, or a bare `tokenizers.Tokenizer`."""
        backend, hf, ids = _parts_of(tokenizer)
        self._words = backend.to_str()
        self._ids, self._hf = ids, hf
        self._prepare()

    def _prepare(self) -> None:
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(self._words)
        backend.no_padding()
        backend.no_truncation()
        self.opening = _opening(backend)
        self._bos, self.eos_token_id, self.pad_token_id = self._ids
        self._anew = self._sections_begin_anew(backend)
        # Only now: what stands in a text is text.
        backend.encode_special_tokens = True
        self._backend = backend
        self._spaced = (backend.encode("a", add_special_tokens=False).tokens or [""])[0].startswith("▁")
        self._anchor = self._find_anchor() if self._spaced else None
        self.chat = chat_template.of(self._hf, bool(self.opening))

    def __getstate__(self) -> dict[str, Any]:
        """The library forgets that special tokens are literal when it is pickled: made anew from its words."""
        return {"_words": self._words, "_ids": self._ids, "_hf": self._hf}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """From `__getstate__`."""
        vars(self).update(state)
        self._prepare()

    def _sections_begin_anew(self, backend: Any) -> bool:
        """Whether text after a control token is encoded as at the beginning of a text."""
        control = next((t.content for t in backend.get_added_tokens_decoder().values() if t.special), None)
        if control is None:
            return True
        after = backend.encode(control + "a", add_special_tokens=False).ids[1:]
        return after == backend.encode("a", add_special_tokens=False).ids

    def _find_anchor(self) -> tuple[str, list[int]] | None:
        """What can be put before a piece and taken off again."""
        anchor = "\n"
        ids = self._whole(anchor)
        whole = bool(ids) and self._whole(anchor + " a") == ids + self._whole("a")
        return (anchor, ids) if whole else None

    def _whole(self, text: str) -> list[int]:
        if not text.isascii():  # half of a surrogate pair, which json may hold, is no text to the library
            text = text.encode("utf-8", "replace").decode()
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str, place: str = "start") -> list[int]:
        """The ids of a piece, without opening and closing tokens.

        Args:
            text: any text, taken literally.
            place: "start" of all text, "after" a control token or an image, or "inside", right after other text.
        """
        if not self._spaced or place == "start" or (place == "after" and self._anew):
            return self._whole(text)
        if self._anchor:
            anchor, before = self._anchor
            ids = self._whole(anchor + text)
            if ids[: len(before)] == before:
                return ids[len(before) :]
        return self._whole(text.removeprefix(" "))

    def token(self, name: str) -> int | None:
        """The id of a control token of a template; None for one that the vocabulary lacks.

        Raises:
            DataError: the opening or closing token, where the tokenizer has none.
        """
        known = {OPEN: self._bos, CLOSE: self.eos_token_id}
        if name in known:
            if known[name] is None:
                raise DataError(
                    f"the tokenizer has no token for {name!r}, which the template wants: choose another one"
                )
            return known[name]
        return self._backend.token_to_id(name)

    def readable(self, segments: Sequence[Segment]) -> list[Segment]:
        """The pieces with control tokens that the vocabulary lacks as plain text, joined with what is beside them."""
        lacks = {s.text for s in segments if s.kind == "token" and self.token(s.text) is None}
        return talk.joined(s._replace(kind="text") if s.text in lacks else s for s in segments)

    def template(self, name: str | Template) -> Template | None:
        """A template by its name, as this tokenizer can write it; None for the tokenizer's own.

        Tokenizers that take no notice of line breaks (CLIP, BERT) cannot stop at one; their closing token stands in.

        Raises:
            DataError: an unknown name, or "tokenizer" where the tokenizer has no chat template.
        """
        if name == OWN:
            if self.chat is None:
                raise DataError("this tokenizer has no chat template: choose a named one, such as 'v1'")
            return None
        found = template(name) if isinstance(name, str) else name
        stops = found.stop.strip() or self.encode(found.stop, "inside")
        return found if stops else _stopping(found)


@functools.lru_cache
def _stopping(one: Template) -> Template:
    import dataclasses

    return dataclasses.replace(one, stop=CLOSE)


def _parts_of(tokenizer: Any) -> tuple[Any, Any, tuple[int | None, int | None, int]]:
    """The library's tokenizer, the one of transformers or None, and the ids of bos, eos, pad."""
    hf = getattr(tokenizer, "hf", None)
    if hasattr(tokenizer, "backend_tokenizer"):
        tokenizer, hf = tokenizer, tokenizer
    backend = (
        getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None) or tokenizer
    )
    if not hasattr(backend, "to_str"):
        raise DataError(
            f"{type(tokenizer).__name__} is no fast tokenizer: open it with vlmjax.data.text.load"
        )
    if backend is tokenizer:
        bos, eos, pad = (backend.token_to_id(name) for name in (OPEN, CLOSE, "<pad>"))
    else:
        bos, eos, pad = (getattr(tokenizer, f"{role}_token_id", None) for role in ("bos", "eos", "pad"))
    return backend, hf, (bos, eos, next((i for i in (pad, eos) if i is not None), 0))


def _opening(backend: Any) -> list[int]:
    """The special tokens that the tokenizer puts before every text."""
    full, bare = backend.encode("a").ids, backend.encode("a", add_special_tokens=False).ids
    starts = (at for at in range(len(full)) if full[at : at + len(bare)] == bare)
    return full[: next(starts, 0)]


def encode(
    conversation: Conversation,
    name: str | Template,
    tokenizer: Pieces,
    *,
    image_tokens: int | Sequence[int],
    image_token_id: int,
    max_length: int,
    max_images: int | None = None,
    system: str = "",
    image_first: bool = False,
    key: str = "",
) -> Encoded:
    """A conversation as ids with the weight that each has as a target.

    It ends with the last token that has loss. What is longer than `max_length`, or needs more than `max_images`, is
    cut at its end, before an image rather than inside it, and then back to the last token that has loss.

    Args:
        conversation: see `conversation.from_turns`.
        name: of a template, or "tokenizer" for the tokenizer's own.
        tokenizer: made once.
        image_tokens: how many tokens an image has: one number for all, or one for each.
        image_token_id: which stands for each of them.
        max_length: tokens that fit.
        max_images: images that fit; None for any number.
        system, image_first, key: as of `conversation.render`.

    Raises:
        BadRecord: `too_long` or `too_many_images` when nothing with loss is left; `no_loss` when there was none, as in
            a prompt; `video`; and what `conversation.render` raises.
        DataError: no such template.
    """
    if talk.count(conversation, "video"):
        raise BadRecord("video", key, "videos are not read yet")
    segments = rendered(conversation, name, tokenizer, system=system, image_first=image_first, key=key)
    counts = _counts(image_tokens, talk.count(conversation), key)
    ids, weights, spans = _laid(segments, tokenizer, counts, image_token_id)
    whole = _last(weights, len(ids))
    if not whole:
        raise BadRecord("no_loss", key, "nothing in it is an answer")
    fits = [at for at, _ in spans[max_images:]] if max_images is not None else []
    end, reason = (fits[0], "too_many_images") if fits else (whole, "too_long")
    if max_length < end:
        end, reason = max_length, "too_long"
        end = next((at for at, n in spans if at < end < at + n), end)
    end = _last(weights, end)
    if not end:
        raise BadRecord(reason, key, f"{whole} tokens and {len(spans)} images, no answer in what fits")
    return Encoded(
        np.array(ids[:end], np.int32),
        np.array(weights[:end], np.float32),
        tuple(span for span in spans if sum(span) <= end),
        whole - end,
    )


def _last(weights: Sequence[float], end: int) -> int:
    """Where the last token with loss before `end` ends; 0 for none. The very first token is never predicted."""
    return next((at + 1 for at in range(min(end, len(weights)) - 1, 0, -1) if weights[at]), 0)


def rendered(
    conversation: Conversation,
    name: str | Template,
    tokenizer: Pieces,
    *,
    system: str = "",
    image_first: bool = False,
    key: str = "",
) -> list[Segment]:
    """The pieces of a conversation by a template's name, the tokenizer's own template among them."""
    form = tokenizer.template(name)
    options = {"system": system, "image_first": image_first, "key": key}
    if form is None:
        return tokenizer.chat(conversation, **options)
    return talk.render(conversation, form, **options)


def encode_prompt(
    conversation: Conversation,
    name: str | Template,
    tokenizer: Pieces,
    *,
    image_tokens: int | Sequence[int],
    image_token_id: int,
    system: str = "",
    image_first: bool = False,
) -> np.ndarray:
    """The ids of a conversation that ends with the user, up to where the answer begins: int32 [n]."""
    segments = rendered(conversation, name, tokenizer, system=system, image_first=image_first)
    counts = _counts(image_tokens, talk.count(conversation), "")
    return np.array(_laid(segments, tokenizer, counts, image_token_id)[0], np.int32)


def _counts(image_tokens: int | Sequence[int], images: int, key: str) -> list[int]:
    if isinstance(image_tokens, int):
        return [image_tokens] * images
    if len(image_tokens) != images:
        raise BadRecord("image_marks", key, f"{images} images in the text, {len(image_tokens)} given")
    return list(image_tokens)


def _laid(
    segments: Sequence[Segment], tokenizer: Pieces, counts: Sequence[int], image_token_id: int
) -> tuple[list[int], list[float], list[tuple[int, int]]]:
    ids, weights, spans = list(tokenizer.opening), [0.0] * len(tokenizer.opening), []
    place = "start"
    for segment in tokenizer.readable(segments):
        if segment.kind == "text":
            piece, place = tokenizer.encode(segment.text, place), "inside"
        elif segment.kind == "token":
            piece, place = [tokenizer.token(segment.text)], "after"
        else:
            piece, place = [image_token_id] * counts[len(spans)], "after"
            spans.append((len(ids), len(piece)))
        ids += piece
        weights += [float(segment.has_loss)] * len(piece)
    return ids, weights, spans
