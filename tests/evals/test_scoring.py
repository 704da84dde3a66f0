"""Scoring rules: recorded cases of the field's own scorers where at hand, and slow obvious oracles."""

import json

import numpy as np
import pytest

from vlmjax.data import canonical
from vlmjax.errors import NonFiniteError
from vlmjax.evals import ranks, retrieval, zeroshot


@pytest.fixture
def golden(shared_path):
    def cases(benchmark: str, kind: str) -> list[dict]:
        path = shared_path(f"golden/{benchmark}.json")
        found = [c for c in json.loads(path.read_text())["cases"] if c["kind"] == kind]
        assert found
        return found

    return cases


@pytest.mark.parametrize("kind", ["canonicalize_template", "canonicalize_class", "canonicalize_plain"])
def test_recorded_canonical_forms(golden, kind):
    for case in golden("zeroshot", kind):
        assert getattr(canonical, kind)(**case["input"]) == case["expected"], case["id"]


def test_recorded_classifications(golden):
    for case in golden("zeroshot", "classify"):
        got = zeroshot.classify(**case["input"])
        assert set(got) == set(case["expected"])
        assert got["pred"] == case["expected"]["pred"], case["id"]
        for name in ("classifier", "logits", "top1", "top5"):
            np.testing.assert_allclose(got[name], case["expected"][name], atol=1e-6, rtol=0)


def test_recorded_recalls(golden):
    for case in golden("retrieval", "recall"):
        got = retrieval.recall(**case["input"])
        assert set(got) == set(case["expected"])
        if not case["ties"]:
            assert got == pytest.approx(case["expected"], abs=1e-9), case["id"]
        for name, best in case["tie_bounds"]["optimistic"].items() if case["ties"] else ():
            worst = case["tie_bounds"]["pessimistic"][name]
            assert worst - 1e-9 <= got[name] <= best + 1e-9, (case["id"], name)


def test_recorded_paired_metrics(golden):
    for case in golden("retrieval", "paired"):
        got = retrieval.paired(**case["input"])
        assert got == pytest.approx(case["expected"], abs=1e-9), case["id"]


def slow_rank(row: np.ndarray, positives: list[int], tie: str) -> int:
    """Sort (score down, then the tie rule) and look where the first right candidate stands."""
    right = {
        "stable": lambda i: i,
        "optimistic": lambda i: i not in positives,
        "pessimistic": lambda i: i in positives,
    }
    order = sorted(range(len(row)), key=lambda i: (-row[i], right[tie](i)))
    return next(place for place, i in enumerate(order) if i in positives)


@pytest.mark.parametrize("levels", [3, 1000])
def test_ranks_equal_a_sort_under_every_tie_rule(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(0, levels, (40, 17)) / levels
    positives = [rng.choice(17, size=rng.integers(1, 5), replace=False).tolist() for _ in range(40)]
    got = ranks.ranks_of_positives(scores, positives)
    for tie in ("stable", "optimistic", "pessimistic"):
        want = [slow_rank(row, p, tie) for row, p in zip(scores, positives, strict=True)]
        assert getattr(got, tie).tolist() == want, tie


def test_a_positive_listed_twice_counts_once():
    scores = np.array([[0.5, 0.5, 0.1]])
    assert ranks.ranks_of_positives(scores, [[0, 0]]).pessimistic.tolist() == [1]
    assert ranks.ranks_of_positives(scores, [[1, 1]]).stable.tolist() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused_not_perfect(bad):
    with pytest.raises(NonFiniteError, match="not finite"):
        ranks.ranks_of_positives(np.array([[0.1, bad]]), [[0]])


def test_blocks_give_what_one_matrix_gives():
    rng = np.random.default_rng(0)
    queries = rng.integers(-2, 3, (23, 3)).astype(np.float32)
    candidates = rng.integers(-2, 3, (31, 3)).astype(np.float32)
    positives = [[int(i), int(j)] for i, j in rng.integers(0, 31, (23, 2))]
    whole = ranks.ranks_of_positives(queries @ candidates.T, positives)
    for block in (1, 5, 23, 100):
        got = ranks.blocked_ranks(queries, candidates, positives, block=block)
        for a, b in zip(got, whole, strict=True):
            assert a.tolist() == b.tolist()


def test_chance_is_what_drawing_at_random_gives():
    rng = np.random.default_rng(1)
    sizes = np.array([1, 3, 6])
    draws = [[(rng.permutation(7)[:2] < size).any() for size in sizes] for _ in range(20_000)]
    assert ranks.chance_of_hit(7, sizes, 2) == pytest.approx(np.mean(draws), abs=0.01)
    assert ranks.chance_of_hit(1697, np.ones(1697), 1) == pytest.approx(1 / 1697)
    assert ranks.chance_of_hit(3, np.ones(3), 10) == 1.0


def test_classifier_normalises_before_and_after_the_mean():
    prompts = np.array([[[10.0, 0.0], [0.0, 1.0]], [[0.0, -2.0], [0.0, -1.0]]])
    half = np.sqrt(0.5)
    np.testing.assert_allclose(zeroshot.build_classifier(prompts), [[half, half], [0, -1]], atol=1e-12)


def test_classes_with_equal_names_tie_and_the_first_wins():
    text = [[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]]]
    got = zeroshot.classify(text, [[1.0, 0.0], [1.0, 0.0]], [0, 1])
    assert got["pred"] == [0, 0]
    assert got["top1"] == 0.5


def test_zeroshot_counts_a_hit_on_any_right_class():
    classifier = np.eye(4, dtype=np.float32)
    images = np.array([[0.1, 0.9, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]], np.float32)
    got = zeroshot.score_zeroshot(classifier, images, [[0, 1], [2, 3]])
    assert got["metrics"] == {"top1": 0.5, "top5": 1.0}
    assert got["chance"] == {"top1": 0.5, "top5": 1.0}


def test_recall_equals_a_loop_over_sorted_lists():
    rng = np.random.default_rng(2)
    txt2img = [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11]
    scores = rng.normal(size=(12, len(txt2img)))
    got = retrieval.recall(scores.tolist(), txt2img)
    for k in (1, 5, 10):
        tr = np.mean([any(txt2img[t] == i for t in np.argsort(-scores[i])[:k]) for i in range(12)])
        ir = np.mean([txt2img[t] in np.argsort(-scores[:, t])[:k] for t in range(len(txt2img))])
        assert (got[f"txt_r{k}"], got[f"img_r{k}"]) == pytest.approx((100 * tr, 100 * ir))


def test_repeated_captions_are_one_text_with_several_right_images():
    texts, of_image, of_text = retrieval.distinct_captions(
        [["dog", "a dog"], ["cat"], ["dog"], ["cat", "cat"]]
    )
    assert texts == ["dog", "a dog", "cat"]
    assert of_image == [[0, 1], [2], [0], [2]]
    assert of_text == [[0, 2], [0], [1, 3]]


def test_without_repetitions_the_benchmark_equals_the_usual_protocol():
    rng = np.random.default_rng(3)
    captions = [[f"{i} {j}" for j in range(rng.integers(1, 4))] for i in range(30)]
    texts, of_image, of_text = retrieval.distinct_captions(captions)
    images = rng.normal(size=(30, 8)).astype(np.float32)
    features = rng.normal(size=(len(texts), 8)).astype(np.float32)
    got = retrieval.score_retrieval(images, features, of_image, of_text)
    want = retrieval.recall(images @ features.T, [own[0] for own in of_text])
    for k in (1, 5, 10):
        assert got["metrics"][f"image_to_text_r{k}"] == pytest.approx(want[f"txt_r{k}"] / 100)
        assert got["metrics"][f"text_to_image_r{k}"] == pytest.approx(want[f"img_r{k}"] / 100)
    assert got["ties"] == {}


def test_ties_are_reported_with_what_they_could_cost():
    same = np.ones((4, 2), np.float32)
    got = retrieval.score_retrieval(same, same, [[0], [1], [2], [3]], [[0], [1], [2], [3]])
    assert got["metrics"]["text_to_image_r1"] == 0.25
    assert got["ties"]["text_to_image_tied_queries"] == 4
    assert got["ties"]["text_to_image_r1_ties_lost"] == 0.0
