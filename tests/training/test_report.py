"""The report: its charts and pictures, and that any half-finished or damaged folder still gives a page."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from vlmjax.evals import gallery
from vlmjax.evals.benchmark import EvalResult
from vlmjax.evals.retrieval import distinct_captions, score_retrieval
from vlmjax.evals.zeroshot import score_zeroshot
from vlmjax.training import report, report_charts, report_figures, report_html

VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Collects the text of a page and insists that every element is closed where it should be."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


def read(workdir) -> Checker:
    path = report.write_report(workdir)
    checker = Checker()
    checker.feed(path.read_text(encoding="utf-8"))
    assert checker.open == []
    for _, attributes in checker.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), "the page must need no other file"
    checker.words = " ".join(" ".join(checker.text).split())
    return checker


def picture(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (20 + i % 3, 24, 3), np.uint8)


def retrieval_result(n: int = 12, name: str = "pairs") -> EvalResult:
    rng = np.random.default_rng(0)
    texts, of_image, of_text = distinct_captions([[f"<b>caption</b> {i}"] for i in range(n)])
    features = rng.normal(size=(2, n, 8)).astype(np.float32)
    scored = score_retrieval(features[0], features[1], of_image, of_text)
    details = gallery.retrieval_details(*features, texts, of_image, of_text, scored["ranks"], picture)
    counts = {"records": n + 1, "used": n, "skipped": 1}
    return EvalResult(name, "retrieval", scored["metrics"], scored["chance"], counts, {"bomb": 1}, details)


def zeroshot_result(classes: int, n: int = 60) -> EvalResult:
    rng = np.random.default_rng(1)
    labels = [[int(i)] for i in rng.integers(0, classes, n)]
    weights = rng.normal(size=(classes, 8)).astype(np.float32)
    images = np.stack([weights[own[0]] for own in labels]) + rng.normal(size=(n, 8)).astype(np.float32)
    scored = score_zeroshot(weights, images, labels)
    names = [f"class {i} & more" for i in range(classes)]
    details = gallery.zeroshot_details(names, labels, scored["predictions"], picture)
    counts = {"records": n, "used": n, "skipped": 0}
    return EvalResult("heldout", "zeroshot", scored["metrics"], scored["chance"], counts, {}, details)


def write_rows(workdir, rows):
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_whole_run(tmp_path):
    rows = [
        {"step": s, "loss": 5 / s, "image_to_text_accuracy": 0.5, "images_per_second": 1234.5, "odd_name": s}
        for s in range(1, 200)
    ]
    rows += [
        {"step": s, "eval/pairs/text_to_image_r1": s / 400, "eval/heldout/top1": 0.5} for s in (100, 199)
    ]
    write_rows(tmp_path, rows)
    (tmp_path / "recipe.json").write_text(
        json.dumps({"stage": "contrastive", "data": {"train": "a<b", "std": [1, 2]}})
    )
    (tmp_path / "environment.json").write_text(
        json.dumps({"devices": "8 x cpu", "packages": {"jax": "0.10"}})
    )
    for result in (retrieval_result(), zeroshot_result(30)):
        report.save_result(tmp_path, result)
    page = read(tmp_path)
    for expected in (
        *("Results", "Training", "Evaluation while training", "Similarity", "Retrieval · pairs"),
        *("Zero-shot · heldout", "Loss", "Odd name", "1,234", "12 (1 skipped)", "a<b", "8 x cpu"),
        *("<b>caption</b> 3", "The 14 of 30 classes", "class 0 & more", "data.train" if False else "train"),
    ):
        assert expected in page.words, expected
    assert ("b", {}) in page.tags
    assert sum(tag == "svg" for tag, _ in page.tags) >= 7
    assert len([1 for tag, a in page.tags if tag == "div" and a.get("class") == "hit"]) > 20
    assert (tmp_path / "report.html").stat().st_size < 2_000_000


def test_an_empty_folder(tmp_path):
    assert "Nothing was logged yet" in read(tmp_path).words


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"step": 1, "loss": 2.5}\n',
        '{"step": 1, "loss": "nan"}\n{"step": 2, "loss": "inf"}\n',
        '{"step": 1, "loss": 2.5}\n{"step": 2, "lo',
        '[1]\nnull\n{"loss": 1}\n{"step": "x"}\n\n{"step": 3, "loss": NaN, "flag": true, "text": "hello"}\n',
        '{"step": 5, "loss": -1}\n{"step": 2, "loss": 0}\n',
        '{"step": 1, "eval/a/top1": 0.5}\n{"step": 2, "eval/a/top1": "nan", "eval/odd": 3, "eval/a/b/c": 1}\n',
        "\x00\xff garbage",
    ],
)
def test_metrics_of_any_kind(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text, encoding="latin-1")
    read(tmp_path)


def test_rows_are_read_in_order_with_numbers_for_nan(tmp_path):
    (tmp_path / "m").write_text('{"step": 3, "a": "-inf"}\n{"step": 1, "a": null, "b": "x"}\n{"st')
    first, second = report.read_metrics(tmp_path / "m")
    assert (first["step"], second["step"], second["a"], first["b"]) == (1, 3, -math.inf, "x")
    assert math.isnan(first["a"])


@pytest.mark.parametrize(
    "name",
    [
        "similarity.npz",
        "results.json",
        "retrieval_pairs.json",
        "retrieval_pairs.npz",
        "zeroshot_heldout.json",
    ],
)
@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "other"])
def test_damaged_files_cost_only_their_part(tmp_path, name, damage):
    for result in (retrieval_result(), zeroshot_result(4)):
        report.save_result(tmp_path, result)
    path = tmp_path / "report" / name
    data = path.read_bytes()
    new = {"cut": data[: len(data) // 2], "empty": b"", "other": b'{"name": [1], "text_to_image": 3}'}
    path.unlink() if damage == "missing" else path.write_bytes(new[damage])
    page = read(tmp_path)
    kept = [
        part
        for part in ("Results", "Similarity", "Retrieval · pairs", "Zero-shot · heldout")
        if part in page.words
    ]
    assert len(kept) >= 3


def test_a_later_result_replaces_the_earlier_one(tmp_path):
    first, second = retrieval_result(), retrieval_result()
    second.metrics["text_to_image_r1"] = 0.4321
    report.save_result(tmp_path, first)
    report.save_result(tmp_path, second)
    report.save_result(tmp_path, retrieval_result(name="x / y"))
    stored = json.loads((tmp_path / "report" / "results.json").read_text())
    assert [row["name"] for row in stored] == ["pairs", "x / y"]
    assert "43.2%" in read(tmp_path).words


@pytest.mark.parametrize("classes", [2, 14, 40])
def test_confusions_add_up(tmp_path, classes):
    result = zeroshot_result(classes)
    details = result.details
    assert len(details["names"]) == min(classes, 14)
    assert details["counts"].sum(1).tolist() == (details["total"] - details["other"]).tolist()
    report.save_result(tmp_path, result)
    page = read(tmp_path)
    assert ("All classes" in page.words) == (classes <= 14)


def test_few_records_are_enough(tmp_path):
    report.save_result(tmp_path, retrieval_result(n=1))
    read(tmp_path)


def test_a_similarity_matrix_keeps_its_values(tmp_path):
    values = np.array([[0.9, 0.1], [np.nan, -0.5]], np.float32)
    report.save_similarity(tmp_path, [picture(0), picture(1)], ["one", "two"], values)
    page = read(tmp_path)
    assert "one: 0.900" in page.words and "two: -0.500" in page.words and "0.90" in page.words
    report.save_similarity(tmp_path, [picture(0)], ["one"], np.array([[np.nan]]))
    assert "Similarity" not in read(tmp_path).words


def test_colours_run_from_dark_to_light():
    url = report_figures._png(np.array([[0.0, 0.5, 1.0]]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))), int)
    assert np.all(np.diff(pixels.sum(-1)[0]) > 100)


def chart_of(*values, **options):
    svg = report_charts.line_chart({"a": list(enumerate(values))}, **options)
    return ElementTree.fromstring(svg), svg


def test_a_chart_places_values_linearly_upwards():
    root, _ = chart_of(0.0, 1.0, 2.0, 4.0)
    (line,) = root.findall("polyline")
    points = np.array([[float(v) for v in p.split(",")] for p in line.get("points").split()])
    assert np.allclose(np.diff(points[:, 0]), np.diff(points[:, 0])[0], atol=0.11)
    assert np.allclose(np.diff(points[:, 1]) / np.diff(points[:, 1])[0], [1, 1, 2], atol=0.02)
    assert points[-1, 1] < points[0, 1]


def test_nan_leaves_a_gap_and_a_mark():
    root, _ = chart_of(1.0, 2.0, math.nan, 3.0, 2.0, math.inf)
    assert len(root.findall("polyline")) == 2
    assert len(root.findall("path")) == 2
    assert "no finite value" in report_charts.line_chart({"a": [(1, math.nan)]})


def test_wide_ranges_get_a_logarithmic_axis():
    root, _ = chart_of(1000.0, 10.0, 0.1)
    labels = {text.text for text in root.findall("text")}
    assert {"1,000", "10", "0.1"} <= labels
    (line,) = root.findall("polyline")
    ys = [float(p.split(",")[1]) for p in line.get("points").split()]
    assert ys[1] - ys[0] == pytest.approx(ys[2] - ys[1], abs=0.2)
    assert not report_charts.log_scale([0.0, 1000.0])


@pytest.mark.parametrize(
    "values", [(0.0,), (5.0, 5.0), (1e-9, 2e-9), (1e12, 3e12), (-3.0, 4.0), (0.2, 0.2, 0.2)]
)
def test_any_range_has_a_few_round_ticks_inside_the_picture(values):
    root, _ = chart_of(*values)
    heights = [float(line.get("y1")) for line in root.findall("line") if line.get("class") == "grid"]
    assert 2 <= len(heights) <= 8
    assert all(0 <= y <= report_charts.HEIGHT for y in heights)
    for point in re.findall(r'c[xy]="([^"]+)"', ElementTree.tostring(root).decode()):
        assert math.isfinite(float(point))


def test_percentages_start_at_zero_and_show_chance():
    root, svg = chart_of(0.2, 0.6, percent=True, baselines={"a": 0.1})
    labels = [text.text for text in root.findall("text")]
    assert "0%" in labels and "chance c0" in svg
    assert all(label.endswith("%") or label.isdigit() for label in labels)


def test_thinning_keeps_spikes_and_gaps():
    line = [(x, math.sin(x / 300)) for x in range(10_000)]
    line[1234] = (1234, 50.0)
    line[5000] = (5000, math.nan)
    short = report_charts.thin(line)
    assert len(short) < 400 and (1234, 50.0) in short
    assert any(math.isnan(y) for _, y in short)
    assert [x for x, _ in short] == sorted(x for x, _ in short)


def test_the_moving_average_is_a_mean_of_neighbours():
    line = [(x, float(x)) for x in range(101)]
    line[50] = (50, math.nan)
    smooth = report_charts.moving_average(line)
    assert smooth[30] == (30, 30.0) and math.isnan(smooth[50][1])
    assert smooth[51][1] == pytest.approx(np.mean([49, 51, 52, 53]))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (5e-4, "5e-4"),
        (0.25, "0.25"),
        (1234, "1,234"),
        (1_234_567, "1.23M"),
        (25_000, "25k"),
        (-2.5, "-2.5"),
    ],
)
def test_short_numbers(value, text):
    assert report_charts.short(value) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0, "0.0%"), (0.2, "20.0%"), (0.0039, "0.39%"), (0.00002, "0.002%")]
)
def test_small_shares(share, text):
    assert report_html._small(share) == text
