"""From what a language model wrote to turns of a conversation: read, checked, or refused with a reason."""

import re

# Words that give away that the writer had a text before it and no picture.
_LEAKS = re.compile(
    r"\b(?:captions?|bounding box(?:es)?|coordinates|(?:provided|given|above) (?:text|descriptions?|information|"
    r"sentences?|context)|(?:text|descriptions?|sentences?|context) (?:says?|said|mentions?|states?|provided|given))\b"
    r"|\[\s*0?\.\d+\s*,",
    re.IGNORECASE,
)
_REFUSALS = re.compile(
    r"\bas an? (?:AI|language model|artificial intelligence)\b"
    r"|\bI(?:'m| am)? (?:sorry|cannot see|can't see|can not see|unable to)\b",
    re.IGNORECASE,
)
_SEPARATOR = re.compile(r"^\s*={3,}\s*$", re.MULTILINE)
_HEAD = re.compile(r"^\s*(Question|Answer)\s*:\s*", re.IGNORECASE)
_LEAST_WORDS = {"conversation": 1, "detail": 25, "reasoning": 20}  # of every answer
_MARKS = re.compile(r"<(?:image|video)>")
Turns = list[tuple[str, str]]


class Rejected(Exception):
    """A response that is of no use: why, in a short stable word."""

    def __init__(self, reason: str, detail: str = ""):
        """`detail` is for the side file."""
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def read(kind: str, response: str, detail_question: str = "") -> Turns:
    """The rounds of a response, checked.

    Args:
        kind: "conversation", "detail" or "reasoning".
        response: what the model wrote.
        detail_question: what a "detail" answers.

    Returns:
        (question, answer) of every round.

    Raises:
        Rejected: `empty`, `form` (not Question and Answer in turn), `unequal`, `empty_turn`, `rounds`, `leak`,
            `refusal`, `mark`, `short`, `repeated`.
    """
    if not response.strip():
        raise Rejected("empty")
    turns = [(detail_question, response.strip())] if kind == "detail" else _rounds(response)
    if kind == "reasoning" and len(turns) != 1:
        raise Rejected("rounds", f"{len(turns)} rounds, expected one")
    for question, answer in turns:
        _check(kind, question, answer)
    if len({question.lower() for question, _ in turns}) < len(turns):
        raise Rejected("repeated", "the same question twice")
    return turns


def _rounds(response: str) -> Turns:
    pieces = [piece.strip() for piece in _SEPARATOR.split(response)]
    pieces = [piece for piece in pieces if piece]
    said: dict[str, list[str]] = {"question": [], "answer": []}
    for place, piece in enumerate(pieces):
        head = _HEAD.match(piece)
        if head is None:
            raise Rejected("form", f"expected 'Question:' or 'Answer:', found {piece[:60]!r}")
        who = head[1].lower()
        if who != ("question", "answer")[place % 2]:
            wanted = "unequal" if place else "form"
            raise Rejected(wanted, f"part {place + 1} is another {who}")
        said[who].append(piece[head.end() :].strip())
    if not pieces or len(said["question"]) != len(said["answer"]):
        raise Rejected("unequal", f"{len(said['question'])} questions, {len(said['answer'])} answers")
    return list(zip(said["question"], said["answer"], strict=True))


def _check(kind: str, question: str, answer: str) -> None:
    if not question or not answer:
        raise Rejected("empty_turn", (question or answer)[:60])
    both = f"{question}\n{answer}"
    # People may ask because they cannot see; the one who answers sees.
    for reason, pattern, words in (
        ("leak", _LEAKS, both),
        ("refusal", _REFUSALS, answer),
        ("mark", _MARKS, both),
    ):
        found = pattern.search(words)
        if found:
            raise Rejected(reason, found[0])
    words = len(answer.split())
    if words < _LEAST_WORDS[kind]:
        raise Rejected("short", f"{words} words, expected at least {_LEAST_WORDS[kind]}")


def conversation(turns: Turns, image_first: bool) -> list[dict[str, str]]:
    """LLaVA's turns, with the image before or after the first question."""
    out = []
    for place, (question, answer) in enumerate(turns):
        if not place:
            question = f"<image>\n{question}" if image_first else f"{question}\n<image>"
        out += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return out
