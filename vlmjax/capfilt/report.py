"""What a filter did: how many captions stayed, their scores, and some that stayed and went beside their images."""

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlmjax.capfilt.steps import ORIGIN
from vlmjax.data.images import decode, shrink
from vlmjax.data.sources import Source
from vlmjax.errors import BadRecord

SHOWN = 24  # captions of each kind in the gallery
BINS = 20


def summary(notes: Sequence[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Captions in all and kept ones, by where they are from: {"web": {"captions": 9, "kept": 6}, ...}."""
    counts: dict[str, Counter[str]] = {}
    for note in notes:
        for line in note.get("captions", ()):
            own = counts.setdefault(line[ORIGIN], Counter())
            own.update({"captions": 1, "kept": int(line["kept"])})
    return {origin: dict(own) for origin, own in sorted(counts.items())}


def histogram(notes: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the scores called `name`: edges float [bins + 1], how many kept and how many dropped ones in each bin."""
    lines = [line for note in notes for line in note.get("captions", ())]
    scores, kept = np.array([line[name] for line in lines]), np.array([line["kept"] for line in lines], bool)
    edges = np.linspace(0, 1, BINS + 1) if name == "match" else np.linspace(-1, 1, BINS + 1)
    return edges, np.histogram(scores[kept], edges)[0], np.histogram(scores[~kept], edges)[0]


def page(notes: Sequence[dict[str, Any]], source: Source, title: str) -> str:
    """One HTML file without scripts, its pictures inside. `source` is what was filtered, for its images."""
    table = "".join(
        f"<tr><td>{origin}</td><td>{own['captions']:,}</td><td>{own['kept']:,}</td>"
        f"<td>{own['kept'] / own['captions']:.1%}</td></tr>"
        for origin, own in summary(notes).items()
    )
    charts = "".join(_chart(notes, name) for name in ("match", "cosine"))
    galleries = "".join(
        f"<h2>{words}</h2><main>{_cards(notes, kept, source)}</main>"
        for kept, words in ((True, "Kept"), (False, "Dropped"))
    )
    return _PAGE.format(
        title=html.escape(title), style=_STYLE, table=table, charts=charts, galleries=galleries
    )


def _cards(notes: Sequence[dict[str, Any]], kept: bool, source: Source) -> str:
    return "".join(_card(line, note, source) for line, note in _some(notes, kept))


def _some(notes: Sequence[dict[str, Any]], kept: bool) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Captions spread over the whole run."""
    found = [(line, note) for note in notes for line in note.get("captions", ()) if line["kept"] is kept]
    step = max(1, len(found) // SHOWN)
    return found[::step][:SHOWN]


def _card(line: dict[str, Any], note: dict[str, Any], source: Source) -> str:
    picture = ""
    try:
        out, pixels = io.BytesIO(), shrink(decode(source[note["index"]].image), 160)
        Image.fromarray(pixels).save(out, "JPEG", quality=88)
        picture = f'<img src="data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}" alt="">'
    except BadRecord:
        picture = ""  # its scores are shown all the same
    scores = f"match {line['match']:.2f}, cosine {line['cosine']:.2f}"
    return (
        f"<article>{picture}<p>{html.escape(line['text'])}</p><small>{line[ORIGIN]}, {scores}<br>"
        f"{html.escape(str(note['key']))}</small></article>"
    )


def _chart(notes: Sequence[dict[str, Any]], name: str) -> str:
    """Bars of kept captions above those dropped, as one SVG."""
    edges, kept, dropped = histogram(notes, name)
    most, width = max(1, int((kept + dropped).max())), 480 / BINS
    bars = []
    for number, (up, down) in enumerate(zip(kept.tolist(), dropped.tolist(), strict=True)):
        low, high = 120 * down / most, 120 * up / most
        told = f"<title>{edges[number]:.2f} to {edges[number + 1]:.2f}: {up} kept, {down} dropped</title>"
        x = number * width
        bars.append(
            f'<g>{told}<rect class="down" x="{x:.1f}" y="{120 - low:.1f}" width="{width - 1:.1f}" height="{low:.1f}"/>'
            f'<rect class="up" x="{x:.1f}" y="{120 - low - high:.1f}" width="{width - 1:.1f}" height="{high:.1f}"/></g>'
        )
    return (
        f'<figure><svg viewBox="0 0 480 136" role="img">{"".join(bars)}<text x="0" y="134">{edges[0]:g}</text>'
        f'<text x="480" y="134" text-anchor="end">{edges[-1]:g}</text></svg><figcaption>{name}: '
        "<b>kept</b> above dropped</figcaption></figure>"
    )


_STYLE = """
:root { --ink: #1c2330; --soft: #667085; --line: #e3e6eb; --card: #fff; --page: #f5f6f8; --up: #175cd3; --down: #cfd4dc;
  color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c333f; --card: #1a1f28;
  --page: #12161d; --up: #84adff; --down: #3a4250 } }
* { box-sizing: border-box }
body { margin: 0; padding: 28px; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
h1 { margin: 0 0 14px; font-size: 20px } h2 { margin: 28px 0 10px; font-size: 16px }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 3px 20px 3px 0; text-align: right; border-bottom: 1px solid var(--line) }
th:first-child, td:first-child { text-align: left }
.charts { display: flex; flex-wrap: wrap; gap: 28px; margin-top: 20px } figure { margin: 0; width: 480px; 
  max-width: 100% }
svg { width: 100% } svg text { font-size: 11px; fill: var(--soft) } .up { fill: var(--up) } .down { fill: var(--down) }
figcaption, small { color: var(--soft) } figcaption b { color: var(--up) }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; min-width: 0;
  overflow-wrap: anywhere }
img { width: 100%; border-radius: 5px; display: block } p { margin: 8px 0 4px }
"""
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body><h1>{title}</h1><table><tr><th>captions</th><th>all</th><th>kept</th><th>share</th></tr>{table}</table>
<div class="charts">{charts}</div>{galleries}</body></html>
"""
