"""The report's pictures: the similarity matrix, the retrieval gallery, the confusion of classes."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

SIMILARITY_LEAD = (
    "Cosine of every image (rows) with every caption (columns). Pairs that belong together lie on the "
    "diagonal: the brighter it stands out, the better the model tells them apart."
)
CELL = 30  # units of a matrix cell
# Colours of the map from low to high, dark to light so that it also reads in grey.
COLOURS = np.array(
    [[22, 18, 48], [64, 38, 112], [133, 52, 122], [201, 76, 98], [240, 132, 84], [250, 214, 130]], float
)


def similarity(data: Mapping[str, Any]) -> str:
    """The matrix as one SVG: pictures down the side, captions on top, right pairs outlined."""
    if not data or not len(data["images"]):
        return ""
    values = np.asarray(data["similarity"], float)
    n = len(data["images"])
    finite = values[np.isfinite(values)]
    if values.shape != (n, n) or not finite.size:
        return ""
    low, high = float(finite.min()), float(finite.max())
    shares = np.nan_to_num((values - low) / max(high - low, 1e-9))
    captions = [_cut(c, 34) for c in data["captions"]]
    top = 16 + int(6 * max(len(c) for c in captions))  # about the width of the longest caption
    side, right = n * CELL, 56
    left = CELL + 10
    parts = [f'<svg class="matrix" viewBox="0 0 {left + side + right} {top + side + 34}" role="img">']
    parts.append(_picture(_png(shares), left, top, side, side))
    for i, (url, caption) in enumerate(zip(data["images"], captions, strict=True)):
        x, y = left + i * CELL, top + i * CELL
        parts.append(
            f'<image class="thumb" x="0" y="{y + 1}" width="{CELL + 4}" height="{CELL - 2}" href="{url}"/>'
            f'<text transform="translate({x + CELL / 2 + 4} {top - 8}) rotate(-90)">{html.escape(caption)}</text>'
            f'<rect class="own" x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="2">'
            f"<title>{html.escape(str(data['captions'][i]))}: {values[i, i]:.3f}</title></rect>"
        )
    best = float(np.mean(np.argmax(np.nan_to_num(values, nan=-np.inf), axis=1) == np.arange(n)))
    ramp = _png(np.linspace(1, 0, 64)[:, None])
    bar = min(side, 180)
    note = f"{best:.0%} of these {n} images are nearest to their own caption"
    parts.append(
        _picture(ramp, left + side + 14, top, 10, bar)
        + f'<text x="{left + side + 28}" y="{top + 9}">{high:.2f}</text>'
        f'<text x="{left + side + 28}" y="{top + bar}">{low:.2f}</text>'
        f'<text x="{left}" y="{top + side + 22}">{note}</text></svg>'
    )
    return f'<div class="card">{"".join(parts)}</div>'


def _picture(url: str, x: int, y: int, width: int, height: int) -> str:
    size = f'width="{width}" height="{height}"'
    return f'<image x="{x}" y="{y}" {size} preserveAspectRatio="none" href="{url}"/>'


def _png(shares: np.ndarray) -> str:
    """Values in [0, 1] through the colour map, one pixel each."""
    at = np.clip(shares, 0, 1) * (len(COLOURS) - 1)
    low = np.minimum(at.astype(int), len(COLOURS) - 2)
    part = (at - low)[..., None]
    pixels = np.rint(COLOURS[low] * (1 - part) + COLOURS[low + 1] * part).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def gallery(data: Mapping[str, Any]) -> str:
    """Queries with their five best answers, right ones framed."""
    to_image = [_query_by_text(query) for query in data.get("text_to_image", [])]
    to_text = [_query_by_image(query) for query in data.get("image_to_text", [])]
    out = ""
    if to_image:
        out += f'<div class="card"><h3>Text → image</h3>{"".join(to_image)}</div>'
    if to_text:
        out += f'<div class="card" style="margin-top:14px"><h3>Image → text</h3>{"".join(to_text)}</div>'
    return out


def _query_by_text(query: Mapping[str, Any]) -> str:
    hits = "".join(
        f'<div class="hit{" right" if hit["right"] else ""}"><img class="thumb" alt="" src="{hit["image"]}">'
        f"{_mark(hit)} {hit['score']:.3f}</div>"
        for hit in query["found"]
    )
    ask = f"{html.escape(_cut(query['text'], 140))}<small>{_place(query['rank'])}</small>"
    return f'<div class="query"><div class="ask">{ask}</div><div class="found">{hits}</div></div>'


def _query_by_image(query: Mapping[str, Any]) -> str:
    hits = "".join(
        f'<div class="hit text{" right" if hit["right"] else ""}">{html.escape(_cut(hit["text"], 90))}'
        f"<br>{_mark(hit)} <small>{hit['score']:.3f}</small></div>"
        for hit in query["found"]
    )
    about = f"<div>{html.escape(_cut(query['text'], 70))}<small>{_place(query['rank'])}</small></div>"
    ask = f'<div class="ask seen"><img class="thumb" alt="" src="{query["image"]}">{about}</div>'
    return f'<div class="query">{ask}<div class="found">{hits}</div></div>'


def _mark(hit: Mapping[str, Any]) -> str:
    return '<span class="mark">✓</span>' if hit["right"] else '<span class="mark">✗</span>'


def _place(rank: int) -> str:
    return "found first" if rank == 0 else f"right answer at place {rank + 1:,}"


def confusion(data: Mapping[str, Any]) -> str:
    """The table of right (rows) and predicted (columns) classes, and frequent mistakes with a picture."""
    names, counts = data.get("names", []), np.asarray(data.get("counts", []))
    if not names or counts.shape != (len(names), len(names)):
        return ""
    totals, other = data["total"], data["other"]
    head = "".join(f'<th class="col"><div>{html.escape(_cut(name, 22))}</div></th>' for name in names)
    few = data["all_classes"] > len(names)
    head += '<th class="col"><div>another class</div></th>' if few else ""
    head += '<th class="col"><div>right</div></th>'
    lines = []
    for i, name in enumerate(names):
        total = max(int(totals[i]), 1)
        cells = "".join(_cell(int(counts[i, j]), total, i == j) for j in range(len(names)))
        cells += f'<td class="side">{int(other[i]) or ""}</td>' if few else ""
        right = f"{counts[i, i] / total:.0%}" if totals[i] else "–"
        lines.append(
            f'<tr><th class="row">{html.escape(_cut(name, 34))}</th>{cells}<td class="side">{right}</td></tr>'
        )
    which = (
        f"The {len(names)} of {data['all_classes']:,} classes mistaken most often" if few else "All classes"
    )
    lead = f'<p class="lead">{which}. Rows: the right class; columns: what the model said.</p>'
    table = (
        f'<div class="scroll"><table class="confusion"><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'
    )
    return f'{lead}<div class="card">{table}{_mistakes(data.get("pairs", []))}</div>'


def _cell(count: int, total: int, right: bool) -> str:
    if not count:
        return "<td></td>"
    tone = "--heat" if right else "--heat-bad"
    return f'<td style="background:rgba(var({tone}),{0.12 + 0.6 * count / total:.2f})">{count}</td>'


def _mistakes(pairs: Sequence[Mapping[str, Any]]) -> str:
    items = "".join(
        f'<div class="mistake"><img class="thumb" alt="" src="{pair["image"]}"><div>'
        f'<span class="was">{html.escape(_cut(pair["right"], 60))}</span> taken for '
        f'<span class="said">{html.escape(_cut(pair["predicted"], 60))}</span>'
        f"<small>{_times(pair['count'])}</small></div></div>"
        for pair in pairs
    )
    return f'<div class="mistakes">{items}</div>' if items else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _cut(text: str, most: int) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
