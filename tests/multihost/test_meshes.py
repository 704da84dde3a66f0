"""A run goes on with other processes and devices than it began with, and comes back: what its losses are then."""

import shutil

import numpy as np
import pytest
from multihost import pair
from training import tiny

pytestmark = pytest.mark.slow
STEPS, SAVED = 8, 2
# Processes, devices in all, and how these lie: the state is in other pieces on each.
MESHES = {
    "2x2": (2, 4, {"data": 2, "fsdp": 2, "tensor": 1}),
    "1x4": (1, 4, {"data": 1, "fsdp": 4, "tensor": 1}),
    "4x1": (4, 4, {"data": 1, "fsdp": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(
        tmp_path_factory.mktemp("recipe"),
        total__steps=STEPS,
        checkpoint__every__steps=SAVED,
        checkpoint__keep_last=STEPS,
        ema__decay=0.9,
        data__threads=1,
        model__image__depth=1,
        model__text__depth=1,
    )


def train(recipe, workdir, mesh):
    """The losses of a run that ends, or goes on to its end, on a mesh."""
    processes, devices, axes = MESHES[mesh]
    arguments = [f"--config.mesh.{name}={size}" for name, size in axes.items()]
    pair.run(workdir.parent, recipe, workdir, *arguments, processes=processes, devices=devices)
    rows = [row for row in tiny.rows(workdir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    return np.array([row["loss"] for row in rows])


def back_at(workdir, step, copy):
    """A copy of a run as it was when `step` had been saved."""
    shutil.copytree(workdir, copy)
    for later in range(step + SAVED, STEPS + 1, SAVED):
        shutil.rmtree(copy / "checkpoints" / str(later))
    return copy


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train(recipe, folder, "2x2")


def test_a_run_that_moves_on_with_each_checkpoint_and_comes_back(recipe, whole, tmp_path):
    """Sums over devices have another order on each mesh, which is a rounding error of float32 here and no more.

    That a run goes on bit for bit on its own mesh is shown by test_stopping.py and test_faults.py, and on one device
    after several by test_training.py.
    """
    folder, expected = whole
    before = expected
    for i, mesh in enumerate(["1x4", "4x1", "2x2"], start=1):
        folder = back_at(folder, i * SAVED, tmp_path / mesh)
        losses = train(recipe, folder, mesh)
        np.testing.assert_array_equal(
            losses[: i * SAVED], before[: i * SAVED]
        )  # the log is continued as well
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
        before = losses
