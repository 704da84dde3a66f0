"""Which text goes with an image: the choice among its captions, and the sentence a template makes of it."""

import dataclasses
import functools
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.errors import BadRecord, DataError

CHOICES = "'random', 'first', 'all', or weights such as 'weights:3,1'"
_SIGNS = re.compile(r"""[.!"()*#:;~]""")
_HOW = "'a photo of {caption}' names the caption, {{ and }} are braces"


class Text(NamedTuple):
    """`caption` as the data has it (equal captions are positives of each other's images), `text` for the model."""

    caption: str
    text: str


@dataclasses.dataclass(frozen=True)
class CaptionRule:
    """From an example's captions to one text, a pure function of (captions, rng).

    Attributes:
        choice: "random" draws one, each as likely as any other; "first" takes the first; "all" joins them with
            spaces, in their order; "weights:3,1" draws the first three times as often as the second (data with a
            caption from the web and a generated one). Captions beyond the weights are not drawn; an example with
            fewer shares its weights among those it has.
        templates: one is drawn each time. `{caption}` stands for the caption, any other name for that field of the
            record's `extra`: "a {style} drawing of {caption}". None leaves the caption as it is.
        clean: "blip" for captions as BLIP reads them, see `blip_caption`; "" leaves them alone.
    """

    choice: str = "random"
    templates: tuple[str, ...] = ()
    clean: str = ""

    def __post_init__(self):
        """Raises DataError for a choice or a template that means nothing."""
        if self.choice not in ("random", "first", "all"):
            _weights(self.choice)
        for template in self.templates:
            _check_template(template)
        check_clean(self.clean)

    @classmethod
    def parse(cls, choice: str, templates: str | Sequence[Any] = (), clean: str = "") -> "CaptionRule":
        """From the strings of a recipe; one template needs no list. Raises DataError."""
        if not isinstance(templates, str) and not all(isinstance(one, str) for one in templates):
            odd = next(one for one in templates if not isinstance(one, str))
            raise DataError(f"template {odd!r} is a {type(odd).__name__}, not a string; {_HOW}")
        given = ([templates] if templates else []) if isinstance(templates, str) else templates
        return cls(choice, tuple(given), clean)

    def __call__(
        self, captions: Sequence[str], rng: np.random.Generator, extra: Mapping[str, Any] | None = None
    ) -> Text:
        """The text of an example. Numbers are drawn only where there is something to choose, and by weights.

        Raises:
            BadRecord: `no_caption`, or `no_field` when a template names a field that the record lacks.
        """
        if not captions:
            raise BadRecord("no_caption")
        caption = self._choose(captions, rng)
        if self.clean:
            caption = cleaned(caption, self.clean)
            if not caption:
                raise BadRecord("no_caption", detail="nothing of it is left without its signs")
        if not self.templates:
            return Text(caption, caption)
        which = int(rng.integers(len(self.templates))) if len(self.templates) > 1 else 0
        return Text(caption, _fill(self.templates[which], caption, extra or {}))

    def _choose(self, captions: Sequence[str], rng: np.random.Generator) -> str:
        if self.choice == "first":
            return captions[0]
        if self.choice == "all":
            return " ".join(captions)
        if self.choice == "random":  # one of one takes nothing from the generator either way
            return captions[int(rng.integers(len(captions)))] if len(captions) > 1 else captions[0]
        ends = np.cumsum(_weights(self.choice)[: len(captions)])
        if not ends[-1]:  # the captions it has are those never wanted
            raise BadRecord("no_caption", detail=f"{len(captions)} captions, none of them has a weight")
        return captions[int(np.searchsorted(ends, rng.random() * ends[-1], side="right"))]


def check_clean(clean: str) -> str:
    """`clean`, which `cleaned` knows. Raises DataError."""
    if clean not in ("", "blip"):
        raise DataError(f"clean={clean!r} is neither 'blip' nor empty")
    return clean


def blip_caption(text: str, words: int = 30) -> str:
    """A caption in lower case, its signs made blanks, cut after so many words (salesforce/BLIP, data/utils.py)."""
    return " ".join(_SIGNS.sub(" ", text.lower()).split()[:words])


def blip_question(text: str, words: int = 50) -> str:
    """A question likewise, its signs left out; a question mark is none of them (salesforce/BLIP, data/utils.py)."""
    return " ".join(_SIGNS.sub("", text.lower()).split()[:words])


def cleaned(text: str, clean: str) -> str:
    """A text as `data.clean` of a recipe has it: "blip" for `blip_caption`, "" for itself."""
    return blip_caption(text) if clean else text


@functools.lru_cache
def _weights(choice: str) -> np.ndarray:
    kind, _, numbers = choice.partition(":")
    if kind != "weights":
        raise DataError(f"captions={choice!r} is not one of {CHOICES}")
    try:
        weights = np.array([float(number) for number in numbers.split(",")])
    except ValueError:
        weights = np.array([-1.0])
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
        raise DataError(f"captions={choice!r}: weights are numbers from 0 up, such as 'weights:3,1'")
    return weights


@functools.lru_cache
def _fields(template: str) -> list[str]:
    """The names in a template. Raises DataError."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"template {template!r}: {error}; {_HOW}") from None
    for _, name, layout, conversion in parts:
        # Only plain names: an index or an attribute would reach into what lies behind the text.
        if name is not None and (not name.isidentifier() or layout or conversion):
            written = (
                "{" + name + (f"!{conversion}" if conversion else "") + (f":{layout}" if layout else "") + "}"
            )
            raise DataError(f"template {template!r}: {written} is not a plain name; {_HOW}")
    return [name for _, name, _, _ in parts if name is not None]


def _check_template(template: str) -> None:
    if "caption" not in _fields(template):
        raise DataError(f"template {template!r} has no {{caption}}; {_HOW}")


def _fill(template: str, caption: str, extra: Mapping[str, Any]) -> str:
    values = {"caption": caption}
    for name in _fields(template):
        if name not in values:
            value = extra.get(name)
            if not isinstance(value, (str, int, float)):
                raise BadRecord("no_field", detail=f"template {template!r} needs {name}, which is {value!r}")
            values[name] = str(value)
    return template.format_map(values)
