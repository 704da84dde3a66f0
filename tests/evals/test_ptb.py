"""Captions as tokens: what the Java tokeniser makes of them, written down, and one caption in, one caption out."""

import json
import random

import pytest

from vlmjax.evals import ptb

# What Stanford's tokeniser gave, punctuation left out.
KNOWN = {
    "A man, a dog -- and a cat!": "a man a dog and a cat",
    "The cat's toys aren't the dogs' toys": "the cat 's toys are n't the dogs toys",
    "it\u2019s a dog\u2019s, don\u2019t": "it 's a dog 's do n't",
    "They'll say we've, I'm, he'd; CAN'T": "they 'll say we 've i 'm he 'd ca n't",
    "cannot cannots gonna WANNA gimme lemme": "can not cannots gon na wan na gim me lem me",
    "'tis 'twas 'em 'til '80s '80 80's": "'t is 't was 'em 'til '80s '80 80 's",
    "rock'n'roll o'clock O'Neil y'all d'or": "rock 'n' roll o'clock o'neil y' all d'or",
    "x'yz it'sx isn'tx": "x yz it sx is n'tx",
    "\"a\" 'b' `c` ``de'' \u201ce\u201d \u2018f\u2019": "a b c de e f",
    "Mr. Smith, Jr. of St. Louis, Mo. etc.": "mr. smith jr. of st. louis mo. etc.",
    "No. 5, no. five, no.7 fig. 2 fig. b": "no. 5 no five no. 7 fig. 2 fig b",
    "la. La. LA. wash. Wash.": "la la. la. wash wash.",
    "pty. Pty. PTY. Ph.D. mfg.": "pty. pty. pty ph.d. mfg.",
    "the U.S. Army, a U.K. fair at 5 p.m. e.g. here": "the u.s. army a u.k. fair at 5 p.m. e.g. here",
    "plan b. The end": "plan b the end",
    "plan b. the end": "plan b. the end",
    "plan b. Foo": "plan b. foo",
    "end.of line.Here a?b": "end.of line.here a?b",
    "half-full well-known-to 5-year-old non-U.S. a--b": "half-full well-known-to 5-year-old non-u.s. a b",
    "and/or red/white/blue a/b/c/d": "and/or red/white/blue a/b/c / d",
    "$5.00 US$5 \u20ac5 \xa35 5% 50\xa2": "$ 5.00 us$ 5 $ 5 # 5 5 % 50 cents",
    "1,000 3.5 .5 -5 +5 5:30pm 10:00 5pm 1st": "1,000 3.5 .5 -5 +5 5:30 pm 10:00 5pm 1st",
    "1/2 12/12/2012 24/7 \xbd 1\xbd": "1/2 12/12/2012 24/7 1/2 1 1/2",
    "1 1/2 cups, call 555-1234": "1\xa01/2 cups call 555-1234",
    "(a) [b] {c} <d> <a b>": "-lrb- a -rrb- -lsb- b -rsb- -lcb- c -rcb- <d> <a\xa0b>",
    ":) :-( ;D =) ^_^ (-_-) <3": ":-rrb- :--lrb- ;d =-rrb- ^_^ -lrb--_--rrb- < 3",
    "? ?! !!! ... .. . - -- ---": "?! !!!",
    "#tag #5 @home a@b.com www.foo.com foo.org/bar http://a.b/c?d=e.": (
        "#tag # 5 @home a@b.com www.foo.com foo.org/bar http://a.b/c?d=e"
    ),
    "AT&T R&B a&b a &amp; b &quot;c&quot; C++ c#": "at&t r&b a & b a & b c c++ c#",
    "a_b _ ** a*b | \\ ~ ^ = + @@ ##": "a_b _ ** a * b | \\ ~ ^ = + @@ ##",
    "caf\xe9 \u65e5\u672c\u8a9e na\xefve 20\xb0C co\xadop": "caf\xe9 \u65e5\u672c\u8a9e na\xefve 20 \xb0 c coop",
    "\U0001f600 a\U0001f600b \u200b zero\u200bwidth": "a b zero width",
    "": "",
    " \t\xa0": "",
    "...": "",
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_captions(text):
    assert ptb.tokenize(text) == KNOWN[text]


def test_goldens(shared_path):
    cases = json.loads(shared_path("golden/caption.json").read_text())["cases"]
    cases = [case for case in cases if case["kind"] == "ptb_tokenize"]
    assert len(cases) > 60
    for case in cases:
        assert ptb.tokenize(case["input"]["text"]) == case["expected"], case["id"]


@pytest.mark.parametrize("line_break", "\n \r \r\n \x0b \x0c \x1c \x1d \x1e \x85 \u2028 \u2029".split(" "))
def test_a_line_break_is_a_space(line_break):
    assert ptb.tokenize(f"a dog{line_break}runs{line_break}{line_break}.{line_break}") == "a dog runs"
    assert ptb.tokenize(line_break) == ""
    # Where what is read depends on what comes after.
    for text in ("plan b.|The end", "no.|5", "<a|b>", "1|1/2", "etc.|."):
        spaces = text.replace("|", " " * len(line_break))
        assert ptb.tokenize(text.replace("|", line_break)) == ptb.tokenize(spaces)


def test_any_text_is_one_line_in_lower_case():
    draw = random.Random(0)
    ranges = [(32, 126)] * 3 + [(1, 0x24F), (0x2000, 0x2100), (1, 0xD7FF), (0xE000, 0x1FFFF)]
    for _ in range(2000):
        text = "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 12)))
        tokens = ptb.tokenize(text)
        assert len(tokens.splitlines()) <= 1, ascii(text)
        assert tokens == tokens.lower().strip(" "), ascii(text)
        assert not set(tokens.split(" ")) & ptb.PUNCTUATION, ascii(text)


def test_plain_words_are_read_the_same_without_the_short_cut(monkeypatch):
    texts = [*KNOWN, "A man riding a wave on top of a surfboard.", "Two dogs , one cat . A bird", "a man ."]
    fast = [ptb.tokenize(text) for text in texts]
    monkeypatch.setattr(ptb, "_PLAIN", ptb.re.compile("(?!)"))
    assert [ptb.tokenize(text) for text in texts] == fast
