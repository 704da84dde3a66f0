"""Conversations about images: messages of texts and images, and the pieces that a template makes of them."""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vlmjax.data.conversation_templates import CONTROL, Template
from vlmjax.errors import BadRecord

MARK, VIDEO_MARK = "<image>", "<video>"
_MARKS = {MARK: "image", VIDEO_MARK: "video"}
TALKS = ("conversations", "messages", "conversation")  # what rows call their turns
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
}  # fmt: skip
_SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}
_SHOWN = 80  # characters of a bad row in a message


class Part(NamedTuple):
    """A piece of a message: kind "text" with its words, or "image" or "video", which are counted in their order."""

    kind: str
    text: str = ""


class Message(NamedTuple):
    """One turn: role "system", "user" or "assistant", and what it consists of."""

    role: str
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The message as LLaVA's files write it, with `<image>` where an image stands."""
        marks = {kind: mark for mark, kind in _MARKS.items()}
        return "".join(part.text if part.kind == "text" else marks[part.kind] for part in self.parts)


Conversation = tuple[Message, ...]


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    Attributes:
        kind: "text", taken literally even where it looks like a control token; "token", a control token by its name
            in the template; "image" or "video".
        text: of a text or a token.
        has_loss: whether the model learns to write it.
    """

    kind: str
    text: str = ""
    has_loss: bool = False


def from_turns(turns: Any, key: str = "") -> Conversation:
    """From LLaVA's list of {"from", "value"}: "human" or "user", "gpt" or "assistant", "system"; `<image>` is an image.

    White space around a message is left out.

    Raises:
        BadRecord: `bad_conversation`, `unknown_role`, or `empty_answer`.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRecord("bad_conversation", key, f"expected a list of turns, found {turns!r}"[:_SHOWN])
    out = []
    for turn in turns:
        who, words = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(who, str) or not isinstance(words, str):
            raise BadRecord("bad_conversation", key, f"expected from and value, found {turn!r}"[:_SHOWN])
        out.append(_message(who, _parts(words), key))
    return tuple(out)


def from_messages(messages: Any, key: str = "") -> Conversation:
    """From Hugging Face's list of {"role", "content"}: content is text with `<image>`, or a list of typed parts.

    Parts are {"type": "text", "text"}, {"type": "image"} (also "image_url") and {"type": "video"}. White space around
    a message is left out.

    Raises:
        BadRecord: `bad_conversation`, `unknown_role`, or `empty_answer`.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise BadRecord("bad_conversation", key, f"expected a list of messages, found {messages!r}"[:_SHOWN])
    out = []
    for message in messages:
        who, content = (
            (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        )
        if isinstance(content, str):
            parts = _parts(content)
        elif isinstance(content, (list, tuple)):
            parts = [_typed(part, key) for part in content]
        else:
            parts = None
        if not isinstance(who, str) or parts is None:
            raise BadRecord("bad_conversation", key, f"expected role and content, found {message!r}"[:_SHOWN])
        out.append(_message(who, parts, key))
    return tuple(out)


def from_caption(caption: str, question: str = "", images: int = 1) -> Conversation:
    """One round: images with a question after them, answered by the caption."""
    ask = [Part("image")] * images + ([Part("text", "\n" + question)] if question else [])
    return Message("user", tuple(ask)), Message("assistant", (Part("text", caption),))


def to_turns(conversation: Conversation) -> list[dict[str, str]]:
    """As a record's `extra["conversations"]` holds it: the inverse of `from_turns`."""
    return [{"from": _SPEAKERS[message.role], "value": message.text} for message in conversation]


def is_messages(said: Any) -> bool:
    """Whether turns are of Hugging Face's form, {"role", "content"}."""
    return isinstance(said, (list, tuple)) and any(
        isinstance(one, Mapping) and "role" in one for one in said[:1]
    )


def plain_turns(said: Any, key: str = "") -> list[dict[str, str]]:
    """Turns of either form in LLaVA's, checked, their words as they are. Raises BadRecord as `from_turns` does."""
    if is_messages(said):
        return to_turns(from_messages(said, key))
    speakers = (turn["from"] for turn in to_turns(from_turns(said, key)))
    return [{"from": who, "value": turn["value"]} for who, turn in zip(speakers, said, strict=True)]


def turns_in(extra: Mapping[str, Any], key: str = "") -> list[dict[str, str]]:
    """The conversation among what a record knows besides: its own, or that in the json of a tar; none where none is.

    Raises:
        BadRecord: as `from_turns` does, or `bad_json`.
    """
    found = extra.get(TALKS[0])
    if not found and any(name.encode() in extra.get("json", b"") for name in TALKS):
        try:
            body = json.loads(extra["json"])
        except (ValueError, RecursionError) as error:
            raise BadRecord("bad_json", key, str(error)) from error
        named = (body.get(name) for name in TALKS) if isinstance(body, dict) else ()
        found = next((said for said in named if isinstance(said, list)), None)
    return plain_turns(found, key) if found else []


def count(conversation: Iterable[Message], kind: str = "image") -> int:
    """How many images (or videos) there are."""
    return sum(part.kind == kind for message in conversation for part in message.parts)


def _parts(words: str) -> list[Part]:
    found = re.split(f"({'|'.join(_MARKS)})", words)
    return [Part(_MARKS[one]) if one in _MARKS else Part("text", one) for one in found if one]


def _typed(part: Any, key: str) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Part("text", part["text"])
    if kind in ("image", "image_url", "video"):
        return Part(kind.removesuffix("_url"))
    raise BadRecord("bad_conversation", key, f"expected a text or an image part, found {part!r}"[:_SHOWN])


def _message(who: str, parts: Sequence[Part], key: str) -> Message:
    if who not in ROLES:
        raise BadRecord("unknown_role", key, f"{who!r} is none of {', '.join(ROLES)}"[:_SHOWN])
    parts = [part for part in parts if part.kind != "text" or part.text]
    if parts and parts[0].kind == "text":
        parts[0] = Part("text", parts[0].text.lstrip())
    if parts and parts[-1].kind == "text":
        parts[-1] = Part("text", parts[-1].text.rstrip())
    message = Message(ROLES[who], tuple(part for part in parts if part.kind != "text" or part.text))
    if message.role == "assistant" and not any(part.text for part in message.parts):
        raise BadRecord("empty_answer", key)
    return message


def rounds(conversation: Conversation, key: str = "") -> tuple[str, Conversation]:
    """The system message ("" for none) and the turns, which begin with the user and alternate.

    Raises:
        BadRecord: `bad_turns`.
    """
    system = conversation[0].text if conversation and conversation[0].role == "system" else ""
    turns = conversation[bool(conversation and conversation[0].role == "system") :]
    wanted = [("user", "assistant")[place % 2] for place in range(len(turns))]
    if not turns or [turn.role for turn in turns] != wanted:
        found = ", ".join(turn.role for turn in conversation)
        raise BadRecord(
            "bad_turns", key, f"user and assistant take turns, the user begins; found {found or 'nothing'}"
        )
    return system, turns


def images_first(conversation: Conversation) -> Conversation:
    """Each message's images before its text, on a line of their own: how LLaVA trains."""
    out = []
    for message in conversation:
        images = [part for part in message.parts if part.kind != "text"]
        words = "".join(part.text for part in message.parts if part.kind == "text").strip()
        text = [Part("text", ("\n" if images else "") + words)] if words else []
        out.append(Message(message.role, (*images, *text)))
    return tuple(out)


def render(
    conversation: Conversation,
    template: Template,
    *,
    system: str = "",
    image_first: bool = False,
    key: str = "",
) -> list[Segment]:
    """The pieces of a conversation in order; loss on answers and their stop, on nothing else.

    A conversation that ends with the user gives a prompt, without loss after the last `ask`. Neighbouring texts that
    are alike are one piece.

    Args:
        conversation: turns that alternate, perhaps after a system message.
        template: see `conversation_templates`.
        system: in place of the template's own system message; the conversation's goes before both.
        image_first: see `images_first`.
        key: of the record, for messages.

    Raises:
        BadRecord: `bad_turns`; or `not_one_round` where a template without the user's words gets several rounds.
    """
    own, turns = rounds(conversation, key)
    turns = images_first(turns) if image_first and template.user_is_text else turns
    if not template.user_is_text and len(turns) > 2:
        raise BadRecord("not_one_round", key, f"'plain' takes one answer, found {len(turns)} turns")
    around, out = _system(own or system or template.system, template), []
    if not template.system_inside:
        out += around
    for place, turn in enumerate(turns):
        if turn.role == "user":
            out += _written(template.next_user if place else template.first_user)
            out += around if template.system_inside and not place else []
            out += _content(turn, False, template.user_is_text) + _written(template.ask)
        else:
            out += _written(template.before_answer, True) + _content(turn, True)
            out += _written(template.stop, True)
    return joined(out)


def _system(message: str, template: Template) -> list[Segment]:
    if not message:
        return []
    before, after = _written(template.before_system), _written(template.after_system)
    return [*before, Segment("text", message), *after]


def _content(message: Message, has_loss: bool, with_text: bool = True) -> list[Segment]:
    """A message's own parts; nobody learns to write an image."""
    parts = (part for part in message.parts if with_text or part.kind != "text")
    return [Segment(part.kind, part.text, has_loss and part.kind == "text") for part in parts]


@functools.lru_cache(256)
def _control(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def written(text: str, tokens: tuple[str, ...], has_loss: bool = False) -> list[Segment]:
    """A template's own words: text, and the control tokens named in it."""
    pieces = _control(tokens).split(text) if tokens else [text]
    return [
        Segment("token" if place % 2 else "text", one, has_loss) for place, one in enumerate(pieces) if one
    ]


def _written(text: str, has_loss: bool = False) -> list[Segment]:
    return written(text, CONTROL, has_loss)


def joined(segments: Iterable[Segment]) -> list[Segment]:
    """Neighbouring texts with the same loss as one, empty ones left out: fewer seams for a tokenizer to notice."""
    out: list[Segment] = []
    for segment in segments:
        if segment.kind == "text" and not segment.text:
            continue
        if segment.kind == "text" and out and out[-1].kind == "text" and out[-1].has_loss == segment.has_loss:
            out[-1] = out[-1]._replace(text=out[-1].text + segment.text)
        else:
            out.append(segment)
    return out
