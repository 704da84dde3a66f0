"""What a filter did: how many captions stayed, their scores, and some that stayed and went beside their images."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from vlmjax.capfilt.steps import ORIGIN
from vlmjax.data.images import decode, shrink
from vlmjax.data.sources import Source
from vlmjax.errors import BadRecord

SHOWN = 24  # captions of each kind in the gallery
BINS = 20
RANGES = {"match": (0.0, 1.0), "cosine": (-1.0, 1.0)}  # of scores


class Told(NamedTuple):
    """What all notes say together.

    Attributes:
        counts: captions in all and kept ones, by where they are from: {"web": {"captions": 9, "kept": 6}, ...}.
        scores: by the name of a score, how many captions in each of BINS bins: dropped ones, kept ones.
    """

    counts: dict[str, dict[str, int]]
    scores: dict[str, Int[np.ndarray, "2 bins"]]

    @property
    def sizes(self) -> dict[bool, int]:
        """How many captions were kept (True), and how many were not."""
        kept = sum(own["kept"] for own in self.counts.values())
        return {True: kept, False: sum(own["captions"] for own in self.counts.values()) - kept}


def told(notes: Iterable[dict[str, Any]]) -> Told:
    """Count what notes say, one after another."""
    counts: dict[str, Counter[str]] = {}
    scores = {name: np.zeros((2, BINS), np.int64) for name in RANGES}
    for _, line in _lines(notes):
        counts.setdefault(line[ORIGIN], Counter()).update({"captions": 1, "kept": int(line["kept"])})
        for name, (low, high) in RANGES.items():
            place = int((line[name] - low) / (high - low) * BINS)
            scores[name][int(line["kept"]), min(max(place, 0), BINS - 1)] += 1
    return Told({origin: dict(own) for origin, own in sorted(counts.items())}, scores)


def _lines(notes: Iterable[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(note, what it says of one caption)."""
    return ((note, line) for note in notes for line in note.get("captions", ()))


def page(found: Told, notes: Iterable[dict[str, Any]], source: Source, title: str) -> str:
    """One HTML file without scripts, its pictures inside.

    Args:
        found: from `told`.
        notes: the same ones again, read one after another for some examples.
        source: what was filtered, for its images.
        title: of the page.
    """
    table = "".join(
        f"<tr><td>{origin}</td><td>{own['captions']:,}</td><td>{own['kept']:,}</td>"
        f"<td>{own['kept'] / own['captions']:.1%}</td></tr>"
        for origin, own in found.counts.items()
    )
    charts = "".join(_chart(name, *found.scores[name]) for name in RANGES)
    chosen = _some(notes, found.sizes)
    galleries = "".join(
        f"<h2>{words}</h2><main>{''.join(_card(line, note, source) for note, line in chosen[kept])}</main>"
        for kept, words in ((True, "Kept"), (False, "Dropped"))
    )
    return _PAGE.format(
        title=html.escape(title), style=_STYLE, table=table, charts=charts, galleries=galleries
    )


def _some(
    notes: Iterable[dict[str, Any]], sizes: dict[bool, int]
) -> dict[bool, list[tuple[dict[str, Any], dict[str, Any]]]]:
    """Captions of both kinds, of which there are `sizes`, spread over the whole run."""
    found: dict[bool, list] = {True: [], False: []}
    seen: Counter[bool] = Counter()
    for note, line in _lines(notes):
        kept = line["kept"]
        if seen[kept] % max(1, sizes[kept] // SHOWN) == 0 and len(found[kept]) < SHOWN:
            found[kept].append((note, line))
        seen[kept] += 1
    return found


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


def _chart(name: str, dropped: Int[np.ndarray, " bins"], kept: Int[np.ndarray, " bins"]) -> str:
    """Bars of kept captions above those dropped, as one SVG."""
    edges = np.linspace(*RANGES[name], BINS + 1)
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
