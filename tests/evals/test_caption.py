"""Captions scored: the goldens, slow obvious formulas, line breaks that move nothing, files and the command."""

import itertools
import json
import math
import random

import pytest

from vlmjax.errors import DataError, UserError
from vlmjax.evals import caption, caption_files, caption_metrics

LINE_BREAKS = ["\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
WORDS = "a the red dog cat sits runs on grass".split()


def corpus(seed, images=6):
    """References and captions of few words, so that they share many; some without any."""
    draw = random.Random(seed)

    def text():
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(0, 9)))

    return [[text() for _ in range(draw.randint(1, 4))] for _ in range(images)], [
        text() for _ in range(images)
    ]


def slow_bleu(references, captions, n):
    """Matches crossed off one by one."""
    product, length, wanted = 1.0, 0, 0
    for size in range(1, n + 1):
        right = total = 0
        for own, text in zip(references, captions, strict=True):
            grams = runs(text.split(), size)
            total += len(grams)
            for gram in set(grams):
                right += min(grams.count(gram), max(runs(other.split(), size).count(gram) for other in own))
        product *= (right + 1e-15) / (total + 1e-9)
    for own, text in zip(references, captions, strict=True):
        length += len(text.split())
        sizes = sorted(len(other.split()) for other in own)
        wanted += min(sizes, key=lambda size: abs(size - len(text.split())))
    ratio = (length + 1e-15) / (wanted + 1e-9)
    return product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1)


def slow_common(first, second):
    """The longest of all subsequences of the one that the other has too."""
    for size in range(len(first), 0, -1):
        for places in itertools.combinations(range(len(first)), size):
            rest = iter(second)
            if all(first[place] in rest for place in places):
                return size
    return 0


def slow_cider(references, captions, image):
    """The sum of the paper, word by word over every n-gram that occurs anywhere."""
    everything = [text for own in references for text in own] + captions
    score = 0.0
    for n in range(1, 5):
        grams = sorted({gram for text in everything for gram in runs(text.split(), n)})

        def vector(text, n=n, grams=grams):
            found = []
            for gram in grams:
                images = sum(any(gram in runs(text.split(), n) for text in own) for own in references)
                found.append(runs(text.split(), n).count(gram) * math.log(len(references) / max(1, images)))
            return found

        own = vector(captions[image])
        for reference in references[image]:
            other = vector(reference)
            shared = sum(min(a, b) * b for a, b in zip(own, other, strict=True))
            size = math.sqrt(sum(a * a for a in own)) * math.sqrt(sum(b * b for b in other))
            gap = len(runs(captions[image].split(), 2)) - len(runs(reference.split(), 2))
            score += (shared / size if size else 0) * math.exp(-(gap**2) / 72) / len(references[image])
    return 10 * score / 4


def runs(words, size):
    return [tuple(words[at : at + size]) for at in range(len(words) - size + 1)]


@pytest.mark.parametrize("seed", range(12))
def test_metrics_are_the_slow_formulas(seed):
    references, captions = corpus(seed)
    for n, found in enumerate(caption_metrics.bleu(references, captions), 1):
        assert found.whole == pytest.approx(slow_bleu(references, captions, n), rel=1e-9)
        for own, text, value in zip(references, captions, found.each, strict=True):
            assert value == pytest.approx(slow_bleu([own], [text], n), rel=1e-9)
    found = caption_metrics.cider(references, captions)
    assert found.each == pytest.approx(
        [slow_cider(references, captions, image) for image in range(6)], abs=1e-9
    )
    assert found.whole == pytest.approx(sum(found.each) / 6)
    for own, text in zip(references, captions, strict=True):
        for other in own:
            common = caption_metrics.common_words(text.split(), other.split())
            assert common == slow_common(text.split(), other.split())


def test_by_hand():
    one, two = caption_metrics.bleu([["a b c d", "a b"]], ["a b c"])[:2]
    assert one.whole == pytest.approx(
        1.0
    )  # as near to two words as to four: the shorter counts, so no penalty
    assert two.whole == pytest.approx(1.0)
    short = caption_metrics.bleu([["a b c d"]], ["a b"])[0]
    assert short.whole == pytest.approx(math.exp(-1))
    clipped = caption_metrics.bleu([["a b"]], ["a a"])[0]
    assert clipped.whole == pytest.approx(0.5)
    # Precision 2/2 with the first reference, recall 1/1 with the second: F is 1 though neither gives it.
    assert caption_metrics.rouge([["a b c d", "a"]], ["a b"]).whole == pytest.approx(1.0)
    assert caption_metrics.rouge([["a b c d"]], ["a b"]).whole == pytest.approx(2.44 * 0.5 / (0.5 + 1.44))
    assert caption_metrics.rouge([[""], ["a"]], ["", ""]).each == [1.0, 0.0]
    # Four words that no other image has: every cosine is 1.
    exact = caption_metrics.cider([["a b c d"], ["e f g h"]], ["a b c d", "e f g x"])
    assert exact.each[0] == pytest.approx(10.0)
    # One of four words is unheard of: cosines 3/4, 2/3, 1/2 and 0.
    assert exact.each[1] == pytest.approx(10 * (3 / 4 + 2 / 3 + 1 / 2) / 4)
    assert caption_metrics.cider([["a b c d"]], ["a b c d"]).whole == 0.0  # nothing is rare among one image


def test_goldens(shared_path):
    cases = json.loads(shared_path("golden/caption.json").read_text())["cases"]
    cases = [case for case in cases if case["kind"].startswith("corpus")]
    assert len(cases) > 8
    for case in cases:
        references, captions = case["input"]["references"], case["input"]["predictions"]
        how = {} if case["kind"] == "corpus_ptb" else {"tokenize": lambda text: " ".join(text.split())}
        found = caption.score_each(references, captions, **how)
        wanted = {name: case["expected"][name] for name in found.whole}
        assert found.whole == pytest.approx(wanted, abs=1e-9), case["id"]
        for image, own in case["expected"]["per_image"].items():
            assert {name: found.each[image][name] for name in own} == pytest.approx(own, abs=1e-9), case["id"]


@pytest.mark.parametrize("line_break", LINE_BREAKS)
def test_a_line_break_moves_no_caption(line_break):
    references = {n: [f"the {word} dog runs", f"a {word} dog"] for n, word in enumerate(WORDS)}
    captions = {n: f"a {word} dog" for n, word in enumerate(WORDS)}
    plain = caption.score_each(references, captions)
    broken = dict(captions)
    broken[2] = captions[2].replace(" ", line_break) + line_break * 2
    with_breaks = {**references, 3: [text.replace(" ", line_break) for text in references[3]]}
    assert caption.score_each(with_breaks, broken) == plain
    empty = caption.score_each(references, {**captions, 0: "", 4: line_break}).each
    assert empty[0]["ROUGE_L"] == empty[4]["ROUGE_L"] == 0.0
    kept = [n for n in captions if n not in (0, 4)]
    assert [empty[n] for n in kept] == [plain.each[n] for n in kept]


def test_the_order_of_images_does_not_matter():
    references, captions = corpus(3)
    references, captions = dict(enumerate(references)), dict(enumerate(captions))
    turned = {image: captions[image] for image in reversed(captions)}
    assert caption.score(references, turned) == pytest.approx(caption.score(references, captions), rel=1e-12)


@pytest.mark.parametrize(
    ("references", "captions", "said"),
    [
        ({1: ["a"]}, {}, "no captions"),
        ({1: ["a"]}, {1: "a", 2: "b"}, r"1 of 2 captions of images without references \(2\)"),
        ({1: ["a"], 2: ["b"]}, {1: "a"}, r"1 of 2 references of images without a caption \(2\)"),
        ({1: []}, {1: "a"}, r"image 1: its references are \[\]"),
        ({1: "a dog"}, {1: "a"}, "expected a list"),
    ],
)
def test_images_that_do_not_match_are_named(references, captions, said):
    with pytest.raises(DataError, match=said):
        caption.score(references, captions)


def test_metrics_that_do_not_exist_are_named():
    for metrics in (["blue"], [], "bleu"):
        with pytest.raises(UserError, match="expected some of bleu, rouge, cider, meteor, spice"):
            caption.score({1: ["a"]}, {1: "a"}, metrics)


def written(folder, references, results):
    paths = folder / "references.json", folder / "results.json"
    for path, content in zip(paths, (references, results), strict=True):
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return [str(path) for path in paths]


ROWS = [
    {"image_id": 7, "caption": "A dog."},
    {"image_id": 9, "caption": "Cats"},
    {"image_id": 7, "caption": "Dog"},
]


def test_files_are_read_in_their_order(tmp_path):
    references, results = written(tmp_path, {"annotations": ROWS, "images": []}, ROWS[:2])
    assert caption_files.read_references(references) == {7: ["A dog.", "Dog"], 9: ["Cats"]}
    assert caption_files.read_results(results) == {7: "A dog.", 9: "Cats"}


@pytest.mark.parametrize(
    ("references", "results", "said"),
    [
        ({"annotations": ROWS}, ROWS, "results.json: entry 2 is a second caption of image 7"),
        ({"annotations": ROWS}, ROWS[:1], "1 of 2 references of images without a caption (9)"),
        ({"annotations": ROWS[:1]}, ROWS[:2], "1 of 2 captions of images without references (9)"),
        (
            {"annotations": ROWS},
            [{"caption": "a"}],
            "entry 0: its image_id should be a number or a text, it has none",
        ),
        (
            {"annotations": [{"image_id": 1, "caption": None}]},
            ROWS,
            "its caption should be a text, it has None",
        ),
        ({"annotations": ["a"]}, ROWS, "references.json: entry 0"),
        ({"annotations": [{"image_id": True, "caption": ""}]}, ROWS, "image_id should be a number"),
        (ROWS, ROWS[:2], "references.json: expected"),
        ({"annotations": ROWS}, {"a": 1}, "results.json: expected"),
        ({"annotations": ROWS}, [], "results.json: has no captions"),
        ("{", ROWS, "references.json: is not JSON"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(tmp_path, capsys, references, results, said):
    with pytest.raises(SystemExit) as left:
        caption.main(written(tmp_path, references, results))
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ") and error.count("\n") == 1


def test_the_command_prints_and_writes(tmp_path, capsys):
    paths = written(tmp_path, {"annotations": ROWS}, ROWS[:2])
    caption.main([*paths, "--metrics=bleu,rouge", f"--json={tmp_path / 'out.json'}"])
    table = capsys.readouterr().out
    assert "BLEU-4" in table and "ROUGE-L" in table and "CIDEr" not in table and "100.0" in table
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["scores"]["Bleu_1"] == pytest.approx(1.0)
    assert [row["image_id"] for row in out["images"]] == [7, 9]
    caption.main([*written(tmp_path, {"annotations": ROWS}, ROWS[:1]), "--only_results"])
    assert "images: 1" in capsys.readouterr().out
    for wrong in ([f"--json={tmp_path}"], ["--metrics=blue"], ["--metric"]):
        with pytest.raises(SystemExit):
            caption.main([*paths, *wrong])
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        caption.main([str(tmp_path / "none.json"), paths[1]])
    assert "none.json: cannot be read" in capsys.readouterr().err
