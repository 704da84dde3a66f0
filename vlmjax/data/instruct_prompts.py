"""What a language model is told about an image it does not see, and what it is asked to write about it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError

# Of LLaVA's 158K: 58K conversations, 23K descriptions, 77K rounds of reasoning (Liu et al. 2023, section 3).
KINDS = {"conversation": 58, "detail": 23, "reasoning": 77}
Box = tuple[str, tuple[float, float, float, float]]

_FRAME = (
    "You write training data for an assistant that looks at pictures. You cannot see the picture yourself; instead you "
    "get {known}. Write as somebody who is looking at the picture: never mention that you were given text{boxes}, and "
    "state nothing that does not follow from it."
)
_FORM = "Write in exactly this form, with === on lines of their own:\nQuestion:\n...\n===\nAnswer:\n...\n==="
_TASKS = {
    "conversation": (
        "Write a conversation of three to six rounds between a person who asks about the picture and the assistant. "
        "Ask about what is there, of what kind and colour, how many, doing what, where, and how things stand to each "
        "other. Ask only what has a definite answer. One later question may go further, to background or advice; its "
        "answer is longer and explains. " + _FORM + "\nand repeat it for every round."
    ),
    "detail": (
        "Describe the picture as fully as you can in one or a few paragraphs: the whole first, then its parts, their "
        "number, looks, places and relations. Write the description alone, without a heading."
    ),
    "reasoning": (
        "Write one question that cannot be answered by naming what is in the picture but takes thinking about it: why "
        "something is so, what may come next, what to do or to beware of. Do not give away the answer in the question. "
        "Answer step by step, from what can be seen to what follows. " + _FORM
    ),
}
_EXAMPLE = (
    "A man in a yellow raincoat walks two dogs over a wet bridge.\nTwo dogs on leads in the rain.",
    "person: [0.412, 0.188, 0.587, 0.903]\ndog: [0.205, 0.641, 0.366, 0.897]\ndog: [0.611, 0.655, 0.742, 0.889]",
    {
        "conversation": (
            "Question:\nHow many dogs are there?\n===\nAnswer:\nThere are two dogs, both on leads.\n===\n"
            "Question:\nWhat is the man wearing?\n===\nAnswer:\nHe is wearing a yellow raincoat.\n===\n"
            "Question:\nWhat should he watch out for?\n===\nAnswer:\nThe bridge is wet, so it may be slippery. With "
            "two leads in his hands he cannot easily steady himself, and a sudden pull could make him fall; walking "
            "slowly and keeping the leads short would help.\n==="
        ),
        "detail": (
            "It is raining on a bridge whose surface shines with water. In the middle a man in a yellow raincoat is "
            "walking, nearly as tall as the picture. He leads two dogs, one on each side of him: the one on the left "
            "is a little larger and closer to the edge of the picture, the other keeps near to his leg. Both are on "
            "leads. Nobody else is about."
        ),
        "reasoning": (
            "Question:\nWhy might the man have chosen a coat of this colour for this walk?\n===\nAnswer:\nHe is out in "
            "the rain, in which it is hard to see far. A yellow coat stands out against grey surroundings, so that "
            "drivers and cyclists who share the bridge notice him and his dogs in time. Besides that it keeps him dry "
            "and leaves his hands free for the two leads.\n==="
        ),
    },
)
# What a person asks who gets a full description as the answer.
DETAIL_QUESTIONS = (
    "Describe this picture in detail.",
    "What can be seen here? Please go through everything.",
    "Give me a thorough description of the image.",
    "Could you explain what is in the picture, part by part?",
    "Tell me all you can see in this image.",
    "Write a full account of what the picture shows.",
    "I cannot see the picture: what does it look like, in detail?",
    "Walk me through this image.",
)


@dataclass(frozen=True)
class Context:
    """What is known of an image: its captions, and named boxes (left, top, right, bottom) as shares of its sides."""

    key: str
    captions: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


def draw(key: str, what: str, seed: int = 0) -> int:
    """A number below 2**32 that depends on the key alone (and the seed): choices that do not depend on order."""
    words = f"{seed}|{what}|{key}".encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(words, digest_size=4).digest(), "little")


def kind_of(key: str, weights: Mapping[str, int], seed: int = 0) -> str:
    """Which kind of response an image gets."""
    left = draw(key, "kind", seed) * sum(weights.values()) >> 32
    for kind, weight in weights.items():
        left -= weight
        if left < 0:
            return kind
    raise DataError(f"kinds {dict(weights)} have no weight above 0")


def detail_question(key: str, seed: int = 0) -> str:
    """What the full description of an image answers."""
    return DETAIL_QUESTIONS[draw(key, "question", seed) % len(DETAIL_QUESTIONS)]


def messages(context: Context, kind: str) -> list[dict[str, str]]:
    """The request for one response, as {"role", "content"}: a task, one worked example, and the image's text.

    A conversation is written from captions alone, the other kinds from captions and boxes (as LLaVA's).
    """
    boxes = kind != "conversation"
    known = "captions of it" + (
        ", and objects in it with their boxes as shares of its sides" if boxes else ""
    )
    frame = _FRAME.format(known=known, boxes=", boxes or numbers" if boxes else "")
    captions, places, answers = _EXAMPLE
    shown = f"{captions}\n\n{places}" if boxes else captions
    return [
        {"role": "system", "content": f"{frame}\n\n{_TASKS[kind]}"},
        {"role": "user", "content": shown},
        {"role": "assistant", "content": answers[kind]},
        {"role": "user", "content": _told(context, boxes)},
    ]


def _told(context: Context, boxes: bool) -> str:
    lines = "\n".join(context.captions)
    places = "\n".join(
        f"{name}: [{', '.join(f'{edge:.3f}' for edge in box)}]" for name, box in context.boxes if boxes
    )
    return f"{lines}\n\n{places}" if places else lines


def context_of(record: Record) -> Context:
    """What a record tells: its captions, and boxes where `extra` has them.

    `boxes` in `extra` is a list of {"category", "box"} with the box as shares of the sides; a drawn scene has its own.

    Raises:
        BadRecord: `no_caption`, or `bad_boxes`.
    """
    if not record.captions:
        raise BadRecord("no_caption", record.key)
    scene = record.extra.get("scene")
    if scene is not None:
        side = scene.image_size
        boxes = [(f"{o.colour} {o.shape}", tuple(edge / side for edge in o.box)) for o in scene.objects]
    else:
        boxes = [_box(one, record.key) for one in record.extra.get("boxes") or ()]
    return Context(record.key, tuple(record.captions), tuple(boxes))


def _box(value: Any, key: str) -> Box:
    name, box = (value.get("category"), value.get("box")) if isinstance(value, Mapping) else (None, None)
    try:
        edges = tuple(float(edge) for edge in box)
    except (TypeError, ValueError):
        edges = ()
    if not isinstance(name, str) or len(edges) != 4 or not all(0 <= edge <= 1 for edge in edges):
        raise BadRecord(
            "bad_boxes",
            key,
            f'expected {{"category": "dog", "box": four shares of the sides}}, found {value!r}'[:160],
        )
    return name, edges
