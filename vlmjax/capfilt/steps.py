"""The steps of CapFilt: captions for every image, then only those that a filter believes (2201.12086, section 3.3)."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from vlmjax.capfilt.models import Captioner, Scorer, readable
from vlmjax.capfilt.shards import Outcome
from vlmjax.data.formats.fields import CAPTION_FIELDS, parse_json
from vlmjax.data.record import Record

SYNTHETIC = "synthetic"  # in `extra` of a record: captions that a model wrote
ORIGIN = "origin"  # beside captions that were kept: of each, WEB or SYNTHETIC
WEB = "web"


def caption(captioner: Captioner, records: list[Record]) -> Iterator[Outcome]:
    """Records with captions of the captioner's beside their own, under SYNTHETIC."""
    good, pixels, bad = readable(captioner, records)
    written = iter(captioner([records[at].key for at in good], pixels) if good else [])
    for at, record in enumerate(records):
        if at in bad:
            yield Outcome(None, {"key": record.key, "reason": bad[at].reason}, bad[at].reason)
            continue
        new = next(written)
        note = {"key": record.key, WEB: list(record.captions), SYNTHETIC: new}
        yield Outcome(dataclasses.replace(record, extra={**known(record), SYNTHETIC: new}), note)


def known(record: Record) -> dict[str, Any]:
    """All that a record knows beside its captions, what a shard keeps in its json laid open."""
    out = {
        name: record.extra[name] for name in record.extra if name != "json"
    }  # a shard reads what is looked up
    if "json" in record.extra:
        inside = parse_json(record.extra["json"], record.key)
        out |= inside if isinstance(inside, dict) else {}
    return {name: value for name, value in out.items() if name not in CAPTION_FIELDS}


def texts_of(record: Record) -> list[tuple[str, str]]:
    """(origin, text) of all captions of a record, each text once, its own first."""
    rest = known(record)
    origins = rest.get(ORIGIN)
    whole = isinstance(origins, list) and len(origins) == len(record.captions)
    found = dict(zip(record.captions, origins if whole else [WEB] * len(record.captions), strict=True))
    for text in _texts(rest.get(SYNTHETIC)):
        found.setdefault(text, SYNTHETIC)
    return [(origin, text) for text, origin in found.items()]


def _texts(value: Any) -> list[str]:
    """A list of texts, of whatever a shard of somebody else's has under our name."""
    return [text for text in value if isinstance(text, str) and text] if isinstance(value, list) else []


def filter_captions(
    scorer: Scorer, records: list[Record], threshold: float, least_cosine: float
) -> Iterator[Outcome]:
    """Records with those of their captions that match; a record of which none does is left out.

    A caption is kept where the probability of a match is at least `threshold` and the cosine at least `least_cosine`.
    """

    def kept(scores: Sequence[tuple[float, float]]) -> list[bool]:
        return [match >= threshold and cosine >= least_cosine for match, cosine in scores]

    yield from _chosen(scorer, records, kept, "no_caption_kept")


def rank(scorer: Scorer, records: list[Record], keep: int) -> Iterator[Outcome]:
    """Records with the `keep` captions that are most alike to their image (BLIP-2, 2301.12597, section 3.4)."""

    def kept(scores: Sequence[tuple[float, float]]) -> list[bool]:
        order = sorted(range(len(scores)), key=lambda at: (-scores[at][1], at))
        return [at in order[:keep] for at in range(len(scores))]

    yield from _chosen(scorer, records, kept, "no_caption")


def _chosen(scorer: Scorer, records: list[Record], kept: Any, reason: str) -> Iterator[Outcome]:
    good, pixels, bad = readable(scorer, records)
    texts = [texts_of(records[at]) for at in good]
    scored = iter(scorer(pixels, [[text for _, text in own] for own in texts]) if good else [])
    told = iter(texts)
    for at, record in enumerate(records):
        if at in bad:
            yield Outcome(None, {"key": record.key, "reason": bad[at].reason}, bad[at].reason)
            continue
        own, scores = next(told), next(scored)
        stays = kept(scores)
        lines = [
            {"text": text, ORIGIN: origin, "match": round(match, 6), "cosine": round(cosine, 6), "kept": keep}
            for (origin, text), (match, cosine), keep in zip(own, scores, stays, strict=True)
        ]
        left = [(origin, text) for (origin, text), keep in zip(own, stays, strict=True) if keep]
        note = {"key": record.key, "captions": lines}
        if not left:
            yield Outcome(None, note, reason)
            continue
        extra = {name: value for name, value in known(record).items() if name != SYNTHETIC}
        extra[ORIGIN] = [origin for origin, _ in left]
        yield Outcome(
            dataclasses.replace(record, captions=tuple(text for _, text in left), extra=extra), note
        )
