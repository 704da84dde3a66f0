"""Exact match of short answers, beside what somebody gets who knows the questions and sees no picture."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any


def plain(answer: str) -> str:
    """An answer as it is compared: lower case, without white space around it and without a final full stop."""
    return answer.strip().lower().removesuffix(".").rstrip()


def is_right(answers: Sequence[str], written: str) -> bool:
    """Whether what was written is one of the right answers."""
    return plain(written) in {plain(answer) for answer in answers}


def kind_of(question: str) -> str:
    """The first two words of a question, by which VQA sorts its questions too (Antol et al. 2015, section 4)."""
    return " ".join(question.lower().split()[:2]).rstrip("?.,:") or "(no words)"


def score(
    questions: Sequence[str], answers: Sequence[Sequence[str]], written: Sequence[str]
) -> dict[str, Any]:
    """Compare answers.

    Args:
        questions: what was asked.
        answers: the right answers of each, at least one.
        written: the model's.

    Returns:
        `metrics` and `chance` with `exact_match`, where chance is the share of the most frequent answer of each kind
        of question; `counts` with the number of `questions` and of `kinds`, and `most_frequent_answer`, its share of
        all; `kinds`: {kind, questions, right, chance, guess} each, the most frequent first.
    """
    hits = [is_right(own, text) for own, text in zip(answers, written, strict=True)]
    groups: dict[str, list[int]] = defaultdict(list)
    for place, question in enumerate(questions):
        groups[kind_of(question)].append(place)
    kinds = []
    for kind, places in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        guess, count = _most_frequent([answers[place] for place in places])
        right = sum(hits[place] for place in places)
        kinds.append(
            {"kind": kind, "questions": len(places), "right": right, "chance": count, "guess": guess}
        )
    total = len(questions)
    counts = {
        "questions": total,
        "kinds": len(kinds),
        "most_frequent_answer": _most_frequent(answers)[1] / total,
    }
    return {
        "metrics": {"exact_match": sum(hits) / total},
        "chance": {"exact_match": sum(kind["chance"] for kind in kinds) / total},
        "counts": counts,
        "kinds": kinds,
    }


def _most_frequent(answers: Sequence[Sequence[str]]) -> tuple[str, int]:
    """The answer that is right most often, and how often."""
    found = Counter(text for own in answers for text in dict.fromkeys(plain(one) for one in own))
    return min(found.items(), key=lambda item: (-item[1], item[0]))
