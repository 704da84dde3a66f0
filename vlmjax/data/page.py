"""The contact sheet of `inspect`: rows of a batch beside what they were made from, on the terminal and as HTML."""

import base64
import dataclasses
import html
import io
from typing import Any

import numpy as np
from PIL import Image

from vlmjax.data import images
from vlmjax.data.pipeline import TrainData
from vlmjax.data.sources import key_of
from vlmjax.data.text import Tokenizer
from vlmjax.errors import BadRecord

_THUMBNAIL = 192


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a batch with what it was made from.

    Attributes:
        key: of the record.
        reason: why the row is empty; "" for a valid row.
        pixels: uint8 [h, w, 3], what the device gets.
        original: the decoded record, uint8 [h, w, 3], None where it cannot be decoded.
        captions: all that the record has.
        text: what was made of one or all of them, "" where none is.
        tokens: the row's vocabulary entries with their ids, without padding.
        padding: how many ids are padding.
        cut: how many ids of the text did not fit.
    """

    key: str
    reason: str
    pixels: np.ndarray
    original: np.ndarray | None
    captions: tuple[str, ...]
    text: str
    tokens: tuple[tuple[str, int], ...]
    padding: int
    cut: int

    @property
    def valid(self) -> bool:
        """Whether the loss counts the row."""
        return not self.reason


def explain(batch: dict[str, np.ndarray], data: TrainData, step: int, tokenizer: Tokenizer) -> list[Row]:
    """Rows of the batch that `data` gave for a step, from the first on, each with its record read once more."""
    indices = data.indices(step)
    return [
        _explain(batch, row, data, step, int(indices[row]), tokenizer) for row in range(len(batch["valid"]))
    ]


def _explain(
    batch: dict[str, np.ndarray], row: int, data: TrainData, step: int, index: int, tokenizer: Tokenizer
) -> Row:
    original, captions, text, reason = None, (), "", ""
    try:
        record = data.source[index]
        captions = tuple(record.captions)
        original = np.asarray(images.decode(record.image))
        text = data.text(record, step, row).text
    except BadRecord as error:
        reason = f"{error.reason}: {error.detail}" if error.detail else error.reason
    except Exception as error:  # what the pipeline has counted and gone on from
        reason = f"{type(error).__name__}: {error}"
    if batch["valid"][row]:
        reason = ""
    elif not reason:
        reason = "the transform failed"
    used = batch["attention_mask"][row].astype(bool)
    ids = batch["input_ids"][row][used].tolist()
    entries = tuple(zip(tokenizer.tokens(ids), ids, strict=True))
    cut = tokenizer.overflow(text) if not reason else 0
    key = str(batch["key"][row]) or key_of(data.source, index)
    pixels, padding = batch["pixel_values"][row], int((~used).sum())
    return Row(key, reason, pixels, original, captions, text, entries, padding, cut)


def show(rows: list[Row], batch: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
    """Print the rows and the arrays of the batch."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(emoji=False)
    title = f"step {facts['step']} of {facts['data']}"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, side in (
        ("row", "right"),
        ("key", "left"),
        ("image", "right"),
        ("text", "left"),
        ("ids", "right"),
    ):
        table.add_column(name, justify=side, overflow="fold", no_wrap=name in ("image", "ids"))
    for number, row in enumerate(rows):
        shape = "" if row.original is None else f"{row.original.shape[1]} x {row.original.shape[0]}"
        text = row.text if row.valid else f"unusable: {row.reason}"
        count = f"{len(row.tokens)}{f' (-{row.cut})' if row.cut else ''}" if row.valid else ""
        table.add_row(str(number), escape(row.key), shape, escape(text), count)
    console.print(table)
    arrays = Table(box=box.SIMPLE_HEAD)
    for name in ("array", "dtype", "shape", "least", "most"):
        arrays.add_column(name)
    for name, value in batch.items():
        ends = [""] * 2 if value.dtype == object else [str(value.min()), str(value.max())]
        arrays.add_row(name, str(value.dtype), str(list(value.shape)), *ends)
    console.print(arrays)


def html_of(rows: list[Row], batch: dict[str, np.ndarray], facts: dict[str, Any]) -> str:
    """The page: one file, no scripts, pictures inside."""
    valid = sum(row.valid for row in rows)
    head = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in (facts | {"usable rows": f"{valid} of {len(rows)}"}).items()
    )
    arrays = "".join(
        f"<tr><td>{_text(name)}</td><td>{value.dtype}</td><td>{_text(list(value.shape))}</td></tr>"
        for name, value in batch.items()
    )
    cards = "".join(_card(number, row) for number, row in enumerate(rows))
    return _PAGE.format(
        title=_text(f"step {facts['step']}"), style=_STYLE, head=head, cards=cards, arrays=arrays
    )


def _card(number: int, row: Row) -> str:
    captions = "".join(
        f'<li class="{"chosen" if caption == row.text else ""}">{_text(caption)}</li>'
        for caption in row.captions
    )
    if row.valid and row.text not in row.captions:  # a template's, or several captions together
        captions += f'<li class="chosen">{_text(row.text)}</li>'
    chips = "".join(f'<span title="id {i}">{_text(entry) or "&nbsp;"}</span>' for entry, i in row.tokens)
    rest = f"{len(row.tokens)} ids, {row.padding} of padding" + (f", {row.cut} cut off" if row.cut else "")
    shape = "" if row.original is None else f"{row.original.shape[1]} × {row.original.shape[0]}"
    seen = f"{row.pixels.shape[1]} × {row.pixels.shape[0]}"
    words = f'<ul>{captions}</ul><p class="chips">{chips}</p><p class="rest">{rest}</p>'
    if not row.valid:
        words = f'<p class="reason">unusable, masked out of the loss<br>{_text(row.reason)}</p><ul>{captions}</ul>'
    return (
        f'<article class="{"" if row.valid else "bad"}"><h2><b>{number}</b>{_text(row.key)}</h2>'
        f'<div class="pair">{_picture(row.original, f"file, {shape}", small=True)}'
        f"{_picture(row.pixels if row.valid else None, f'batch, {seen}')}</div>{words}</article>"
    )


def _picture(pixels: np.ndarray | None, label: str, small: bool = False) -> str:
    if pixels is None:
        return f'<figure><div class="none"></div><figcaption>{_text(label.partition(",")[0])}</figcaption></figure>'
    image, out = Image.fromarray(pixels), io.BytesIO()
    if small:
        image.thumbnail((2 * _THUMBNAIL, 2 * _THUMBNAIL))
        image.save(out, "JPEG", quality=88)
    else:
        image.save(out, "PNG")  # the very pixels
    data = base64.b64encode(out.getvalue()).decode()
    kind = "jpeg" if small else "png"
    return f'<figure><img src="data:image/{kind};base64,{data}" alt=""><figcaption>{_text(label)}</figcaption></figure>'


def _text(value: Any) -> str:
    return html.escape(str(value))


_STYLE = """
:root { --ink: #1c2330; --soft: #667085; --line: #e3e6eb; --card: #fff; --page: #f5f6f8; --chip: #eef1f6;
  --bad: #b42318; --mark: #175cd3; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2c333f; --card: #1a1f28;
  --page: #12161d; --chip: #262d39; --bad: #f97066; --mark: #84adff } }
* { box-sizing: border-box }
body { margin: 0; padding: 28px; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif }
h1 { margin: 0 0 14px; font-size: 20px }
dl { display: flex; flex-wrap: wrap; gap: 10px 28px; margin: 0 0 22px }
dt { color: var(--soft); font-size: 12px } dd { margin: 0; overflow-wrap: anywhere }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); gap: 16px }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px; min-width: 0 }
article.bad { border-color: var(--bad) }
h2 { margin: 0 0 10px; font-size: 13px; font-weight: 500; color: var(--soft); overflow-wrap: anywhere }
h2 b { color: var(--ink); margin-right: 8px }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 10px }
figure { margin: 0 } figcaption { color: var(--soft); font-size: 12px; margin-top: 4px }
img, .none { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px;
  background: var(--chip) }
.none { background: repeating-linear-gradient(45deg, var(--chip) 0 8px, transparent 8px 16px) }
ul { margin: 10px 0; padding-left: 18px; color: var(--soft) } li { overflow-wrap: anywhere }
li.chosen { color: var(--ink); font-weight: 600 } li.chosen::marker { color: var(--mark) }
.chips { margin: 0; display: flex; flex-wrap: wrap; gap: 3px }
.chips span { background: var(--chip); border-radius: 4px; padding: 0 5px; font: 12px/1.6 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere }
.rest { margin: 6px 0 0; color: var(--soft); font-size: 12px }
.reason { margin: 10px 0 0; color: var(--bad); overflow-wrap: anywhere }
table { margin-top: 22px; border-collapse: collapse; font: 12px ui-monospace, monospace }
td { padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line) }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body><h1>What the train step sees</h1><dl>{head}</dl><main>{cards}</main><table>{arrays}</table></body></html>
"""
