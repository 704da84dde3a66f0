"""Choosing among captions and filling templates: the shares drawn, the order of draws, and what is refused."""

from collections import Counter

import numpy as np
import pytest

from vlmjax.data.captions import CaptionRule, blip_caption
from vlmjax.errors import BadRecord, DataError


def drawn(rule: CaptionRule, captions, count: int = 6000, **extra) -> Counter:
    rng = np.random.default_rng(0)
    return Counter(rule(captions, rng, extra).text for _ in range(count))


@pytest.mark.parametrize(
    ("choice", "captions", "shares"),
    [
        ("random", "ab", {"a": 0.5, "b": 0.5}),
        ("random", "abc", {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        ("first", "ab", {"a": 1.0}),
        ("all", "abc", {"a b c": 1.0}),
        ("weights:3,1", "ab", {"a": 0.75, "b": 0.25}),
        ("weights:3,1", "abc", {"a": 0.75, "b": 0.25}),
        ("weights:3,1", "a", {"a": 1.0}),
        ("weights:0,1,1", "abc", {"b": 0.5, "c": 0.5}),
        ("weights:1,0,3", "ab", {"a": 1.0}),
    ],
)
def test_shares(choice, captions, shares):
    found = drawn(CaptionRule.parse(choice), tuple(captions))
    assert set(found) == set(shares)
    for text, share in shares.items():
        assert abs(found[text] / 6000 - share) < 0.02


def test_templates():
    rule = CaptionRule.parse("first", ["a photo of {caption}", "{{{caption}}} {style}"])
    found = drawn(rule, ("cat {x}",), style="oil", unused=object())
    assert set(found) == {"a photo of cat {x}", "{cat {x}} oil"}
    assert abs(found["a photo of cat {x}"] / 6000 - 0.5) < 0.02
    one = CaptionRule.parse("first", "this is {caption}, {caption}!")
    assert one(("it",), np.random.default_rng(0)) == ("it", "this is it, it!")


def test_draws_are_those_of_the_plain_rule():
    """Runs without templates keep the numbers they had: one integer for a random caption, none for the first."""
    for captions in (("a",), ("a", "b", "c")):
        left, right = np.random.default_rng(5), np.random.default_rng(5)
        chosen = CaptionRule("random")(captions, left).text
        assert chosen == captions[int(right.integers(len(captions)))] and left.random() == right.random()
        CaptionRule("first", ("x {caption}",))(captions, left)
        assert left.random() == right.random()


@pytest.mark.parametrize(
    ("choice", "templates", "words"),
    [
        ("longest", (), "captions='longest' is not one of 'random'"),
        ("weights:", (), "weights are numbers from 0 up"),
        ("weights:1,-1", (), "weights are numbers"),
        ("weights:0,0", (), "weights are numbers"),
        ("weights:nan", (), "weights are numbers"),
        ("first", "a photo", "template 'a photo' has no {caption}"),
        ("first", "a {caption", "template 'a {caption'"),
        ("first", "a {}", "{} is not a plain name"),
        ("first", "a {0} {caption}", "{0} is not a plain name"),
        ("first", "a {caption.__class__}", "{caption.__class__} is not a plain name"),
        ("first", "a {caption!r}", "{caption!r} is not a plain name"),
        ("first", "a {caption:>9}", "{caption:>9} is not a plain name"),
        ("first", [3], "template 3 is a int"),
    ],
)
def test_refused(choice, templates, words):
    with pytest.raises(DataError) as caught:
        CaptionRule.parse(choice, templates)
    assert words in str(caught.value)


def test_records_without_what_is_needed():
    rng = np.random.default_rng(0)
    with pytest.raises(BadRecord, match="no_caption"):
        CaptionRule()((), rng)
    with pytest.raises(BadRecord, match="no_caption"):
        CaptionRule("weights:0,1")(("only one",), rng)
    for extra in (None, {}, {"style": ["list"]}):
        with pytest.raises(BadRecord, match="no_field"):
            CaptionRule("first", ("{style} {caption}",))(("a",), rng, extra)


def test_captions_as_blip_reads_them():
    """Its punctuation is not all there is: commas, hyphens and apostrophes stay."""
    for text, clean in (
        ('  A (small) Dog: "it\'s" here!  ', "a small dog it's here"),
        ("Red-brown, 5 * 3 ~ #tag;  a.b", "red-brown, 5 3 tag a b"),
        ("one " * 40, " ".join(["one"] * 30)),
    ):
        assert blip_caption(text) == clean
    rule, rng = CaptionRule.parse("first", "a picture of {caption}", "blip"), np.random.default_rng(0)
    assert rule(("A Dog.",), rng).text == "a picture of a dog"
    with pytest.raises(BadRecord, match="no_caption"):
        rule(("!!!",), rng)
    with pytest.raises(DataError, match="clean='lower' is neither"):
        CaptionRule.parse("first", (), "lower")
