"""The report's page: heading, results against chance, curves, and what the run was made with."""

import datetime
import html
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vlmjax.evals.table import TITLES
from vlmjax.training import report_answers, report_figures, report_time
from vlmjax.training.report_charts import Number, line_chart, short
from vlmjax.training.report_style import CSS

Rows = Sequence[Mapping[str, Any]]

# Curves in this order, several keys in one chart; numbers logged under other names follow, one chart each.
CHARTS = (
    ("Loss", ("loss",), False),
    ("Accuracy within the batch", ("image_to_text_accuracy", "text_to_image_accuracy"), True),
    ("Accuracy on the batch", ("accuracy",), True),
    ("Token accuracy", ("token_accuracy",), True),
    ("Learning rate", ("learning_rate",), False),
    ("Gradient norm", ("grad_norm",), False),
    ("Logit scale", ("logit_scale",), False),
    ("Images per second", ("images_per_second",), False),
    ("Share of time waiting for data", ("data_wait_share",), True),
    ("Model TFLOP per second", ("model_tflops_per_second",), False),
    ("Model FLOPs utilisation", ("mfu",), True),
)
# The metric of each benchmark that the top of the page shows.
HEADLINES = {
    "zeroshot": "top1",
    "retrieval": "text_to_image_r1",
    "probe": "top1",
    "classify": "top1",
    "vqa": "exact_match",
    "matching": "accuracy",
    "statements": "right",
    "caption": "exact",
}
_log = logging.getLogger(__name__)
NOT_DRAWN = {"step", "examples", "epoch", "finite", "step_seconds"}


def page(
    *,
    title: str,
    rows: Rows,
    results: Rows,
    similarity: Mapping[str, Any],
    retrieval: Rows,
    zeroshot: Rows,
    recipe: Mapping[str, Any],
    environment: Mapping[str, Any],
    answers: Rows = (),
    attempts: Rows = (),
    hosts: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """The whole page; every part that has nothing to show is left out."""
    fig, talk = report_figures, report_answers
    # What a batch consists of: of several images a row, or none, where rows are conversations.
    rate = "rows per second" if recipe.get("stage") == "generative" else "images per second"
    parts = [
        header(title, recipe, environment),
        section("", tiles, rows, results, rate),
        section("Results", results_table, results, lead="Fractions of what was asked, beside guessing."),
        section("Training", curves, rows, rate),
        section("Evaluation while training", evaluation_curves, rows, results, lead="Dashed: chance."),
        *[
            section(_heading("Answers", found), talk.samples, found, lead=talk.lead(found))
            for found in answers
        ],
        section("Where the time went", report_time.times, attempts, lead=report_time.LEAD),
        section("Hosts", report_time.hosts, hosts, lead=report_time.HOSTS_LEAD),
        section("Similarity", fig.similarity, similarity, lead=fig.SIMILARITY_LEAD),
        *[section(_heading("Retrieval", found), fig.gallery, found) for found in retrieval],
        *[
            section(_heading(found.get("kind", "Zero-shot"), found), fig.confusion, found)
            for found in zeroshot
        ],
        section("Recipe and environment", made_with, recipe, environment),
    ]
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)} · vlmjax</title><style>{CSS}</style></head><body><main>"
        f"{''.join(parts)}<footer>Written by vlmjax, {now}.</footer></main></body></html>\n"
    )


def section(title: str, draw: Callable[..., str], *data: Any, lead: str = "") -> str:
    """A titled part of the page, or nothing where `draw(*data)` has nothing to show.

    Files of the run may hold anything by the time they are read; what cannot be drawn is left out with a
    warning, because a report must not end a run.
    """
    try:
        body = draw(*data)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        _log.warning("report: left out %s: %s: %s", title or draw.__name__, type(error).__name__, error)
        return ""
    if not body or not title:
        return body
    return f'<section><h2>{html.escape(title)}</h2><p class="lead">{lead}</p>{body}</section>'


def _heading(kind: str, found: Mapping[str, Any]) -> str:
    """The kind with the evaluation's name, unless they say the same."""
    name = str(found.get("name", ""))
    return kind if name.lower() == kind.lower().replace("-", "") else f"{kind} · {name}"


def header(title: str, recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Name of the run and one line on what it is."""
    facts = [recipe.get("stage"), environment.get("devices")]
    if isinstance(recipe.get("batch_size"), int):
        facts.insert(1, f"batch {recipe['batch_size']:,}")
    data = recipe.get("data")
    if isinstance(data, Mapping) and data.get("train"):
        facts.insert(1, str(data["train"]))
    line = " · ".join(html.escape(str(fact)) for fact in facts if fact)
    return f'<header><div class="mark">vlmjax</div><h1>{html.escape(title)}</h1><p>{line}</p></header>'


def tiles(rows: Rows, results: Rows, rate: str = "images per second") -> str:
    """The few numbers one looks for first; `rate` is what `images_per_second` counts."""
    found: list[tuple[str, str]] = []
    losses = _line(rows, "loss")
    if rows:
        found.append((f"{rows[-1]['step']:,}", "steps"))
    examples = [y for _, y in _line(rows, "examples")]
    if examples:
        found.append(
            (short(examples[-1]) if examples[-1] >= 1e5 else f"{examples[-1]:,.0f}", "examples seen")
        )
    if losses:
        found.append((short(losses[-1][1]), "last loss"))
    rates = [y for _, y in _line(rows, "images_per_second") if math.isfinite(y)]
    if rates:
        found.append((f"{statistics.median(rates):,.0f}", rate))
    for result in results:
        metric = HEADLINES.get(result["benchmark"], "")
        if _is_number(result.get(metric)):
            found.append((f"{result[metric]:.1%}", f"{TITLES[metric]}, {result['name']}"))
    shown = "".join(
        f'<div class="card tile"><b>{html.escape(b)}</b><span>{html.escape(s)}</span></div>'
        for b, s in found[:8]
    )
    return f'<div class="tiles">{shown}</div>' if shown else '<p class="none">Nothing was logged yet.</p>'


def results_table(results: Rows) -> str:
    """One line per metric with a bar, a mark at chance, and how many times chance it is."""
    lines = []
    for result in results:
        first = True
        for metric, chance in result["chance"].items():
            value = result.get(metric)
            if not (_is_number(value) and _is_number(chance)):
                continue
            times = f"{value / chance:,.1f} ×" if chance else ""
            name = html.escape(str(result["name"])) if first else ""
            used = _used(result) if first else ""
            bar = f'<div class="bar"><i style="width:{value:.2%}"></i><u style="left:{chance:.2%}"></u></div>'
            lines.append(
                f'<tr{" class=first" if first else ""}><td class="name">{name}</td>'
                f"<td>{html.escape(TITLES.get(metric, metric))}</td>"
                f'<td class="num"><b>{value:.1%}</b></td><td class="wide">{bar}</td>'
                f'<td class="num soft">{_small(chance)}</td>'
                f'<td class="num">{times}</td><td class="num soft">{used}</td></tr>'
            )
            first = False
    if not lines:
        return ""
    head = '<th></th><th>metric</th><th class="num">result</th><th></th><th class="num">chance</th>'
    head += '<th class="num">result / chance</th><th class="num">records</th>'
    return (
        f'<div class="card scroll"><table class="results"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _used(result: Mapping[str, Any]) -> str:
    used, skipped = result.get("used", 0), result.get("skipped", 0)
    reasons = result.get("skipped_reasons") or {}
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    more = f' <span title="{html.escape(listed)}">({skipped:,} skipped)</span>' if skipped else ""
    return f"{used:,}{more}"


def _small(share: Number) -> str:
    """A share in percent with two digits that say something."""
    if share == 0 or share >= 0.01:
        return f"{share:.1%}"
    return f"{share:.2%}" if share >= 1e-4 else f"{share * 100:.2g}%"


def curves(rows: Rows, rate: str = "images per second") -> str:
    """Every number of the training lines as a chart, the known ones first; `rate` as of `tiles`."""
    names = {name: None for row in rows for name, value in row.items() if _is_number(value)}
    plots, drawn = [], set(NOT_DRAWN)
    for title, keys, percent in CHARTS:
        drawn |= set(keys)
        counted = keys == ("images_per_second",)
        title = rate.capitalize() if counted else title
        series = {rate if counted else _short_name(key): _line(rows, key) for key in keys if key in names}
        if series:
            plots.append(plot(title, series, percent=percent))
    for name in names:
        # A count that never moved, such as skipped records, is no news.
        moved = any(y for _, y in _line(rows, name))
        if moved and name not in drawn and not name.startswith(("eval/", "seconds/")):
            plots.append(plot(_plain(name).capitalize(), {_plain(name): _line(rows, name)}))
    return f'<div class="grid2">{"".join(plots)}</div>' if plots else ""


def evaluation_curves(rows: Rows, results: Rows) -> str:
    """Metrics of each evaluation over the run, with chance."""
    chances = {f"eval/{r['name']}/{metric}": value for r in results for metric, value in r["chance"].items()}
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in {name: None for row in rows for name in row if name.startswith("eval/")}:
        name, _, metric = key[len("eval/") :].rpartition("/")
        for prefix, title in (
            ("text_to_image_", "text → image"),
            ("image_to_text_", "image → text"),
            ("", ""),
        ):
            if metric.startswith(prefix):
                groups.setdefault((name, title), {})[key] = TITLES.get(metric, metric).replace(
                    f"{title} ", ""
                )
                break
    plots = []
    for (name, title), keys in groups.items():
        series = {label: _line(rows, key) for key, label in keys.items()}
        if max((len(line) for line in series.values()), default=0) > 1:
            marks = {label: chances[key] for key, label in keys.items() if _is_number(chances.get(key))}
            heading = f"{name} · {title}" if title else name
            plots.append(plot(heading, series, percent=_is_share(series), baselines=marks))
    return f'<div class="grid2">{"".join(plots)}</div>' if plots else ""


def plot(
    title: str,
    series: Mapping[str, Any],
    *,
    percent: bool = False,
    baselines: Mapping[str, Number] | None = None,
) -> str:
    """A titled chart with its last value; several lines have theirs in a legend."""
    last = {name: line[-1][1] for name, line in series.items() if line}
    shown = {n: f"{y:.1%}" if percent and math.isfinite(y) else short(y) for n, y in last.items()}
    now, legend = next(iter(shown.values()), ""), ""
    if len(series) > 1:
        items = (f'<i class="c{i % 6}"></i>{html.escape(n)} <b>{shown[n]}</b>' for i, n in enumerate(shown))
        now, legend = "", "".join(f"<span>{item}</span>" for item in items)
    heading = f'<div class="head"><h3>{html.escape(title)}</h3><span class="now">{now}</span></div>'
    chart = line_chart(series, percent=percent, baselines=baselines)
    return f'<div class="card plot">{heading}<div class="legend">{legend}</div>{chart}</div>'


def made_with(recipe: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Recipe and environment as folded lists of facts."""
    out = []
    for title, value, note in (
        ("Environment", environment, ""),
        ("Recipe", recipe, "every value the run used"),
    ):
        if value:
            shown = " open" if title == "Environment" else ""
            body = f'<div class="facts">{facts(value)}</div>'
            out.append(
                f'<details class="card"{shown}><summary>{title}<small>{note}</small></summary>'
                f"{body}</details>"
            )
    return "".join(out)


def facts(value: Mapping[str, Any], title: str = "") -> str:
    """Nested values as groups: plain values of one level together, each inner level under its dotted name."""
    plain = {k: v for k, v in value.items() if not (isinstance(v, Mapping) and v)}
    inner = {k: v for k, v in value.items() if isinstance(v, Mapping) and v}
    out = ""
    if plain:
        heading = f"<h3>{html.escape(title)}</h3>" if title else ""
        items = "".join(
            f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(_value(v))}</dd>" for k, v in plain.items()
        )
        out = f'<div class="group">{heading}<dl>{items}</dl></div>'
    return out + "".join(facts(v, f"{title}.{k}" if title else str(k)) for k, v in inner.items())


def _value(value: Any) -> str:
    if value is None or value == {} or value == "":
        return "–"
    if isinstance(value, (list, tuple)):
        return (
            ", ".join(_value(v) if not isinstance(v, (list, tuple)) else f"({_value(v)})" for v in value)
            or "–"
        )
    return f"{value:g}" if isinstance(value, float) and math.isfinite(value) else str(value)


def _line(rows: Rows, key: str) -> list[tuple[Number, Number]]:
    return [(row["step"], float(row[key])) for row in rows if _is_number(row.get(key))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_share(series: Mapping[str, Any]) -> bool:
    values = [y for line in series.values() for _, y in line if math.isfinite(y)]
    return bool(values) and min(values) >= 0 and max(values) <= 1


def _short_name(key: str) -> str:
    """The name of a line in a chart whose title already says what is measured."""
    return key.removesuffix("_accuracy").replace("_to_", " → ").replace("_", " ")


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("/", " · ")
