"""Which class a record belongs to: by its label, or by a caption that names the class."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmjax.data.canonical import canonicalize_plain
from vlmjax.data.plan import permute
from vlmjax.data.record import Record
from vlmjax.data.sources import Source, captions_of
from vlmjax.errors import BadRecord, DataError

FORMS = "'name' or 'label<TAB>name'"
LABEL_FIELDS = ("cls", "label", "class", "class_name", "category")
# Records that are read to learn which classes there are; a class that none of them is of has to be in a file.
READ = 20_000


class ClassName(NamedTuple):
    """One class: the label that data files use for it, and the name that goes into prompts."""

    label: str
    name: str


def read_classes(path: str) -> list[ClassName]:
    """Read a file of classes, one per line: `name`, or `label<TAB>name`; empty lines are left out.

    Raises:
        DataError: no such file, fewer than two classes, an empty name, or a label that appears twice.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            lines = [line.rstrip("\r\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"classes file {path}: {error}; expected lines {FORMS}") from None
    classes, seen = [], {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, _, name = line.partition("\t") if "\t" in line else (line, "", line)
        label, name = label.strip(), name.strip()
        if not label or not name:
            raise DataError(f"{path}:{number}: {line!r} has an empty label or name; expected {FORMS}")
        if "\t" in line and label in seen:
            raise DataError(f"{path}:{number}: label {label!r} was already given in line {seen[label]}")
        seen[label] = number
        classes.append(ClassName(label, name))
    if len(classes) < 2:
        raise DataError(f"{path}: holds {len(classes)} class(es); classification needs two or more")
    return classes


def label_of(extra: Mapping[str, Any]) -> str | None:
    """The label a record carries: its `.cls` member, or a field `cls`, `label`, ... of it or of its json."""
    for field in LABEL_FIELDS:
        if field in extra and (text := _text(extra[field])) is not None:
            return text
    inner = extra.get("json")
    if isinstance(inner, bytes):
        try:
            inner = json.loads(inner)
        except ValueError:
            return None
    return label_of({k: v for k, v in inner.items() if k != "json"}) if isinstance(inner, Mapping) else None


def own_name(record: Record) -> str:
    """What a record itself calls its class: its only caption, or where it has none, or several, its label.

    Raises:
        BadRecord: it has neither.
    """
    if len(record.captions) == 1:
        return record.captions[0]
    if (label := label_of(record.extra)) is not None:
        return label
    raise BadRecord("no_class", record.key, f"{len(record.captions)} captions and no label (.cls)")


class Classes:
    """The classes of a labelled set in the order of a classifier's outputs, and which of them a record is of.

    Attributes:
        names: of the classes, as they go into prompts.
        labels: what data files call them; empty where the names were taken from records: see `own_name`.
    """

    def __init__(self, names: Sequence[str], labels: Sequence[str] = (), templates: Sequence[str] = ()):
        """With `labels` records are looked up as `ClassFinder` does, with `templates` of their captions."""
        self.names, self.labels = tuple(names), tuple(labels)
        self._index = {name: i for i, name in enumerate(self.names)}
        self._finder = None
        if labels:
            known = [ClassName(*pair) for pair in zip(self.labels, self.names, strict=True)]
            self._finder = ClassFinder(known, templates)

    def of(self, record: Record) -> int:
        """Index of the class of a record. Raises BadRecord where it is of none of them, or of several."""
        if self._finder is not None:
            label = label_of(record.extra)
            if label not in self.labels and len(record.captions) == 1 and record.captions[0] in self._index:
                return self._index[
                    record.captions[0]
                ]  # a number would stand for a line, perhaps of another file
            try:
                return self._finder.find(record.key, label, record.captions)
            except DataError as error:
                raise BadRecord("no_class", record.key, str(error)) from None
        name = own_name(record)
        if name not in self._index:
            raise BadRecord("no_class", record.key, f"{name!r} is none of the {len(self.names)} classes")
        return self._index[name]


def classes_of(path: str, source: Source, templates: Sequence[str] = ()) -> Classes:
    """The classes in a file, or where no file is given those that records of `source` name, in alphabetical order.

    Raises:
        DataError: as of `read_classes`, or the records name fewer than two.
    """
    if path:
        found = read_classes(path)
        return Classes([c.name for c in found], [c.label for c in found], templates)
    names = set()
    for i in permute(np.arange(min(READ, len(source))), len(source), seed=0, epoch=0).tolist():
        try:
            captions = captions_of(source, i)
            names.add(captions[0] if len(captions) == 1 else own_name(source[i]))
        except BadRecord:
            continue  # training meets it again, counts it and says why
    if len(names) < 2:
        raise DataError(
            f"{source.name}: its records name {len(names)} class(es) ({', '.join(sorted(names))}); classification "
            "needs two or more: one caption or one label (.cls) each, or a classes file"
        )
    return Classes(sorted(names))


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value).strip() or None
    return None


class ClassFinder:
    """Finds the class of a record among the classes of a benchmark, or refuses with the reason.

    The first of these that answers: the record's label equals a class's label; it equals exactly one class's
    name; it is a whole number, the line of the class counted from 0 (unless classes have numbers for labels); a
    caption is a class's name, alone or inside one of the templates; a caption mentions exactly one class (a name
    inside a longer matching name does not count: "crocodile head" is no "crocodile"). Names are compared without
    case, ASCII punctuation, underscores and articles.
    """

    def __init__(self, classes: Sequence[ClassName], templates: Sequence[str] = ()):
        """`templates` are those that captions may have been made with."""
        self.classes = list(classes)
        self._labels = {c.label: i for i, c in reversed(list(enumerate(self.classes)))}
        self._names: dict[tuple[str, ...], set[int]] = {}
        self._phrases: dict[tuple[str, ...], set[int]] = {}
        for i, c in enumerate(self.classes):
            label = "" if c.label.isdecimal() else c.label
            for name in {_words(c.name), _words(label)} - {()}:
                self._names.setdefault(name, set()).add(i)
            for template in {"{}", "a photo of a {}.", *templates}:
                self._phrases.setdefault(_words(template.replace("{}", c.name)), set()).add(i)
        self._longest = max(map(len, self._names), default=0)
        self._numbered = any(c.label.isdecimal() and c.label != c.name for c in self.classes)

    def find(self, key: str, label: str | None, captions: Sequence[str]) -> int:
        """Index of the class of the record `key`.

        Raises:
            DataError: no class, several classes, or a line number and a caption that disagree.
        """
        exact = {i for caption in captions for i in self._phrases.get(_words(caption), ())}
        if label is not None:
            if label in self._labels:
                return self._labels[label]
            named = self._names.get(_words(label), set())
            if len(named) == 1:
                return next(iter(named))
            if label.isdecimal() and int(label) < len(self.classes) and not self._numbered:
                return self._checked(key, int(label), exact, captions)
        found = exact or {i for caption in captions for i in self._mentioned(_words(caption))}
        if len(found) == 1:
            return next(iter(found))
        has = f"captions {list(captions)}" if label is None else f"label {label!r}, captions {list(captions)}"
        if found:
            names = ", ".join(repr(self.classes[i].name) for i in sorted(found)[:4])
            raise DataError(
                f"record {key!r}: {has} fit {len(found)} classes ({names}); give each record one label (.cls)"
            )
        raise DataError(
            f"record {key!r}: {has} name none of the {len(self.classes)} classes "
            f"({self.classes[0].name!r}, {self.classes[1].name!r}, ...); "
            "label the records (.cls: a label or a line number from 0) or complete the classes file"
        )

    def _checked(self, key: str, index: int, exact: set[int], captions: Sequence[str]) -> int:
        if exact and index not in exact:
            raise DataError(
                f"record {key!r}: label {index} is line {index} (from 0) of the classes, "
                f"{self.classes[index].name!r}, but its caption says {captions[0]!r}: "
                "write the labels into the classes file, as 'label<TAB>name'"
            )
        return index

    def _mentioned(self, words: tuple[str, ...]) -> set[int]:
        spans = [
            (start, stop)
            for start in range(len(words))
            for stop in range(start + 1, min(start + self._longest, len(words)) + 1)
            if words[start:stop] in self._names
        ]
        outer = [s for s in spans if not any(t != s and t[0] <= s[0] and s[1] <= t[1] for t in spans)]
        return {i for start, stop in outer for i in self._names[words[start:stop]]}


def _words(text: str) -> tuple[str, ...]:
    return tuple(
        word for word in canonicalize_plain(text.replace("-", " ")).split() if word not in ("a", "an", "the")
    )
