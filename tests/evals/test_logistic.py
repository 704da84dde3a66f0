"""Logistic regression against scipy's optimum in float64, scikit-learn where it is there, and the search of CLIP."""

import warnings

import jax
import numpy as np
import pytest
import scipy.optimize

from vlmjax.evals.logistic import Fitter, search
from vlmjax.sharding.mesh import make_mesh

ROWS, WIDTH, CLASSES = 203, 9, 5


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    features = (3 * rng.normal(size=(ROWS, WIDTH)) + 1).astype(np.float32)
    scores = features @ rng.normal(size=(WIDTH, CLASSES)) + 4 * rng.normal(size=(ROWS, CLASSES))
    return features, scores.argmax(axis=1)


@pytest.fixture(scope="module")
def fit(data):
    return Fitter(*data, CLASSES, make_mesh())


def objective(flat, features, labels, l2):
    """The loss in float64 and its gradient, one class after the other."""
    kernel, bias = flat[:-CLASSES].reshape(WIDTH, CLASSES), flat[-CLASSES:]
    scores = features.astype(np.float64) @ kernel + bias
    chances = np.exp(scores - scores.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    loss = -np.log(chances[np.arange(len(labels)), labels]).sum() + l2 / 2 * (kernel**2).sum()
    errors = chances - np.eye(CLASSES)[labels]
    return loss, np.concatenate([(features.T @ errors + l2 * kernel).ravel(), errors.sum(axis=0)])


def loss(found, *rest):
    return objective(np.concatenate([found.kernel.ravel(), found.bias]), *rest)[0]


def optimum(*given):
    options = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 9999}
    start = np.zeros((WIDTH + 1) * CLASSES)
    return scipy.optimize.minimize(objective, start, given, "L-BFGS-B", jac=True, options=options)


def centred(bias):
    """The same bias to all classes changes no chance: told apart without it."""
    return bias - bias.mean()


@pytest.mark.parametrize("l2", [1e-3, 1.0, 300.0])
def test_the_optimum_is_scipys(data, fit, l2):
    found = fit(l2)
    best = optimum(*data, l2)
    assert loss(found, *data, l2) == pytest.approx(best.fun, rel=1e-6)
    np.testing.assert_allclose(found.kernel.ravel(), best.x[:-CLASSES], atol=1e-5)
    np.testing.assert_allclose(centred(found.bias), centred(best.x[-CLASSES:]), atol=1e-4)


@pytest.mark.parametrize("l2", [1e-2, 10.0])
def test_the_optimum_is_that_of_scikit_learn(data, fit, l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = linear_model.LogisticRegression(C=1 / l2, tol=1e-9, max_iter=9999)
        theirs.fit(data[0].astype(np.float64), data[1])
    found = fit(l2)
    np.testing.assert_allclose(found.kernel, theirs.coef_.T, atol=1e-4)
    np.testing.assert_allclose(centred(found.bias), centred(theirs.intercept_), atol=1e-4)
    same = found.scores(data[0]).argmax(axis=1) == theirs.predict(data[0])
    assert same.mean() > 0.995


@pytest.mark.slow
def test_in_float32_the_loss_is_as_low(data, fit):
    """As on accelerators."""
    mesh = make_mesh(devices=jax.devices()[:1])
    wide = fit(1.0)
    narrow = Fitter(*data, CLASSES, mesh, wide=False)(1.0)
    losses = [loss(one, *data, 1.0) for one in (wide, narrow)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert (wide.scores(data[0]).argmax(axis=1) == narrow.scores(data[0]).argmax(axis=1)).mean() > 0.995


@pytest.mark.slow
def test_the_same_on_any_mesh_and_every_time(data, fit):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    np.testing.assert_array_equal(fit(1.0).kernel, fit(1.0).kernel)
    np.testing.assert_allclose(Fitter(*data, CLASSES, mesh)(1.0).kernel, fit(1.0).kernel, atol=1e-6)


def test_rows_that_are_left_out_do_not_count(data, fit):
    features, labels = data
    kept = np.arange(0, ROWS, 2)
    best = optimum(features[kept], labels[kept], 1.0)
    np.testing.assert_allclose(fit(1.0, kept).kernel.ravel(), best.x[:-CLASSES], atol=1e-5)


@pytest.mark.parametrize("peak", [-6.0, -5.875, -1.3, 0.0, 2.62, 6.0])
def test_the_search_ends_an_eighth_of_a_power_from_the_peak(peak):
    tried = []

    def score(l2):
        tried.append(np.log10(l2))
        return -abs(tried[-1] - peak)

    found = np.log10(search(score))
    assert abs(found - peak) <= 1 / 16 + 1e-9
    assert len(tried) == len(set(np.round(tried, 6))) <= 15
    assert tried[:7] == pytest.approx([-6, -4, -2, 0, 2, 4, 6])


def test_of_equal_scores_the_strongest_wins():
    assert search(lambda l2: float(l2 < 50)) == pytest.approx(10**1.625)
