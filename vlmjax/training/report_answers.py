"""The report's part for models that write: what they said to the same questions as training went on."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

LEAD = (
    "The same questions at every evaluation, with a right answer and what the model said. Equal answers in a row stand "
    "together."
)
BLIND_LEAD = "Every image in one colour, the mean: what can be known from the questions alone."
SHOWN = 6  # answers per question


def joined(samples: Sequence[Mapping[str, Any]], before: Any, step: int) -> list[dict[str, Any]]:
    """Samples of an evaluation with their answers of earlier steps, where those were to the same questions.

    Args:
        samples: {image, question, expected, answer, right} each, see `vlmjax.evals.answers`.
        before: what this function returned last time, as the run's folder holds it, whatever that is.
        step: of the run. Answers of this step and later ones, which a run that went back has left, are dropped.
    """
    before = before if isinstance(before, list) else []
    out = []
    for place, sample in enumerate(samples):
        earlier = before[place] if place < len(before) and isinstance(before[place], Mapping) else {}
        same = all(earlier.get(name) == sample[name] for name in ("question", "expected"))
        kept = [one for one in earlier.get("answers", []) if _before(one, step)] if same else []
        now = {"step": step, "answer": sample["answer"], "right": bool(sample["right"])}
        asked = {name: sample[name] for name in ("image", "question", "expected")}
        out.append({**asked, "answers": [*kept, now]})
    return out


def _before(answer: Any, step: int) -> bool:
    """Whether this is a whole answer of an earlier step."""
    whole = isinstance(answer, Mapping) and {"step", "answer", "right"} <= set(answer)
    return whole and isinstance(answer["step"], int) and answer["step"] < step


def lead(found: Mapping[str, Any]) -> str:
    """What stands over the samples of an evaluation."""
    return BLIND_LEAD if found.get("blind") else LEAD


def samples(found: Mapping[str, Any]) -> str:
    """Each question beside its picture, and the answers step by step; then how each kind of question went."""
    rows = "".join(_sample(sample) for sample in found.get("samples", []))
    return f'<div class="card">{rows}</div>{_kinds(found.get("kinds", []))}' if rows else ""


def _sample(sample: Mapping[str, Any]) -> str:
    about = f"<div>{_text(sample['question'])}<small>right: {_text(sample['expected'])}</small></div>"
    ask = f'<div class="ask seen"><img class="thumb" alt="" src="{sample["image"]}">{about}</div>'
    hits = "".join(_answer(*run) for run in _thinned(_runs(sample["answers"])))
    return f'<div class="query talk">{ask}<div class="found">{hits}</div></div>'


def _runs(answers: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str, bool]]:
    """(first step, last step, answer, whether right) of equal answers in a row."""
    out: list[tuple[int, int, str, bool]] = []
    for one in answers:
        if out and out[-1][2] == one["answer"]:
            out[-1] = (out[-1][0], one["step"], *out[-1][2:])
        else:
            out.append((one["step"], one["step"], one["answer"], one["right"]))
    return out


def _thinned(runs: list[tuple]) -> list[tuple]:
    """At most SHOWN of them: the first, the last, and some between."""
    most = min(len(runs), SHOWN)
    return [runs[round(i * (len(runs) - 1) / max(most - 1, 1))] for i in range(most)]


def _answer(first: int, last: int, answer: str, right: bool) -> str:
    mark = f'<span class="mark">{"✓" if right else "✗"}</span>'
    steps = f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"
    said = _text(answer) or "<i>(nothing)</i>"
    return f'<div class="hit text{" right" if right else ""}">{said}<br>{mark} <small>{steps}</small></div>'


def _kinds(kinds: Sequence[Mapping[str, Any]]) -> str:
    """A line for each kind of question that makes up at least a fiftieth of them."""
    total = sum(kind["questions"] for kind in kinds)
    lines = "".join(
        f'<tr><td class="name">{_text(kind["kind"])} …</td><td class="num">{kind["questions"]:,}</td>'
        f'<td class="num"><b>{kind["right"] / kind["questions"]:.0%}</b></td>'
        f'<td class="num soft">{kind["chance"] / kind["questions"]:.0%}</td><td>{_text(kind["guess"])}</td></tr>'
        for kind in kinds
        if len(kinds) > 1 and 50 * kind["questions"] >= total
    )
    head = '<th>question</th><th class="num">asked</th><th class="num">right</th><th class="num">chance</th>'
    table = (
        f'<table class="results"><thead><tr>{head}<th>most frequent answer</th></tr></thead>{lines}</table>'
    )
    return f'<div class="card scroll" style="margin-top:14px">{table}</div>' if lines else ""


def _text(text: Any, most: int = 160) -> str:
    words = " ".join(str(text).split())
    return html.escape(words if len(words) <= most else words[: most - 1].rstrip() + "…")
