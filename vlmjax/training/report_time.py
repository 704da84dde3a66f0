"""The report's account of time: the seconds of a run by what they went into."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from vlmjax.training.attempts import account, goodput
from vlmjax.training.hosts import slowest_first

_TITLES = {
    "step": "steps",
    "data": "waiting for data",
    "evaluate": "evaluation",
    "checkpoint": "checkpoints",
    "finish": "reports",
    "initialise": "set-up",
    "restore": "first state",
    "compile": "compilation",
    "lost": "work lost and done again",
    "down": "between starts",
}
MOST_HOSTS = 12
HOSTS_LEAD = (
    "Steps take all hosts equally long: one that waits for its data makes the others wait for their devices."
)
LEAD = "All seconds since the first start, by the wait of the first process."


def times(attempts: Sequence[Mapping[str, Any]]) -> str:
    """A line with a bar for each phase that took time, and the goodput; nothing where nothing was recorded."""
    seconds = account(attempts)
    whole = sum(seconds.values())
    if whole <= 0:
        return ""
    lines = [
        f'<tr><td class="name">{html.escape(title)}</td><td class="num"><b>{seconds[phase] / whole:.1%}</b></td>'
        f'<td class="wide"><div class="bar"><i style="width:{seconds[phase] / whole:.2%}"></i></div></td>'
        f'<td class="num soft">{duration(seconds[phase])}</td></tr>'
        for phase, title in _TITLES.items()
        if seconds[phase] > 0
    ]
    starts = f"{len(attempts)} start{'s' if len(attempts) > 1 else ''}"
    lines.append(
        f'<tr class=first><td class="name">goodput</td><td class="num"><b>{goodput(seconds):.1%}</b></td>'
        f'<td class="wide"></td><td class="num soft">{duration(whole)}, {starts}</td></tr>'
    )
    return f'<div class="card scroll"><table class="results"><tbody>{"".join(lines)}</tbody></table></div>'


def hosts(sums: Mapping[str, Sequence[float]]) -> str:
    """A line for each of several hosts of the last start, the one that waited longest for its data first."""
    order = slowest_first(sums) if sums else []
    if len(order) < 2:
        return ""
    lines = [
        f'<tr><td class="name">host {host}</td><td class="num">{duration(waits["data"])}</td>'
        f'<td class="num">{duration(waits["step"])}</td></tr>'
        for host, waits in order[:MOST_HOSTS]
    ]
    head = '<tr><th></th><th class="num">waited for data</th><th class="num">waited for its devices</th></tr>'
    return (
        f'<div class="card scroll"><table class="results"><thead>{head}</thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def duration(seconds: float | int) -> str:
    """Seconds as people say them: 8.4 s, 12 min, 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
