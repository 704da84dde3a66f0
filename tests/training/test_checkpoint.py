"""Checkpoints: which are kept, restored onto any mesh, and what is said when they do not fit or cannot be written."""

import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vlmjax.errors import CheckpointError
from vlmjax.sharding.mesh import make_mesh
from vlmjax.training.checkpoint import Checkpoints

SPECS = {"params": PartitionSpec("data", "fsdp"), "opt_state": PartitionSpec(None, "tensor")}


def state(step, ema=False):
    kernel = jnp.arange(64, dtype=jnp.float32).reshape(8, 8) + step
    return {
        "params": {"kernel": kernel},
        "frozen": {"bias": jnp.ones(3, jnp.bfloat16)},
        "opt_state": {"mu": kernel * 2, "count": jnp.int32(step)},
        "ema": {"kernel": kernel / 2} if ema else {},
    }


def placed(tree, mesh):
    """Shapes of the tree with today's shardings, as a run that continues gives them."""

    def place(path, x):
        spec = SPECS.get(path[0].key, PartitionSpec()) if x.ndim == 2 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def on(mesh, tree):
    return jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, placed(tree, mesh))


def written(folder, steps, metrics=(), **options):
    checkpoints = Checkpoints(str(folder), **options)
    for step, score in zip(steps, metrics or [None] * len(steps), strict=True):
        checkpoints.save(step, state(step), {"step": step}, {} if score is None else {"eval/x/top1": score})
    checkpoints.close()
    return sorted(int(name) for name in os.listdir(folder) if name.isdigit())


def test_the_newest_are_kept(tmp_path):
    assert written(tmp_path / "c", range(1, 6), keep_last=2) == [4, 5]


def test_the_best_are_kept_besides(tmp_path):
    options = {"keep_last": 1, "keep_best": 2, "best_metric": "eval/x/top1"}
    kept = written(tmp_path / "c", range(1, 7), [0.5, 0.9, 0.1, 0.8, None, 0.2], **options)
    assert kept == [2, 4, 6]
    assert written(tmp_path / "c", [8], [0.85], **options) == [2, 8]  # the scores of before are known
    again = Checkpoints(str(tmp_path / "c"), **{**options, "best_metric": "eval/y/top1"})
    again.save(9, state(9), {"step": 9}, {"eval/y/top1": 0.1})  # another measure than before
    again.close()
    assert again.latest() == 9


def test_restored_onto_another_mesh_bit_for_bit(tmp_path):
    before, after = make_mesh(data=8), make_mesh(data=2, fsdp=2, tensor=2)
    saved = on(before, state(3, ema=True))
    checkpoints = Checkpoints(str(tmp_path / "c"))
    data = {"step": 3, "seed": 1, "fingerprint": "x"}
    checkpoints.save(3, saved, data, {})
    checkpoints.close()
    reader = Checkpoints(str(tmp_path / "c"))
    assert reader.latest() == 3
    found, position = reader.restore(3, placed(state(0, ema=True), after))
    assert position == data
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(), found, saved)
    assert found["params"]["kernel"].sharding == NamedSharding(after, PartitionSpec("data", "fsdp"))
    assert found["opt_state"]["mu"].sharding.spec == PartitionSpec(None, "tensor")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "c"
    written(folder, [2, 5])
    return folder


def test_the_parameters_alone(one, tmp_path, capfd):
    reader = Checkpoints(str(one), writable=False)
    read, _ = reader.read_params(5)
    assert set(read) == {"params", "frozen", "ema"} and not read["ema"]
    assert isinstance(read["params"]["kernel"], np.ndarray)
    np.testing.assert_array_equal(read["params"]["kernel"], state(5)["params"]["kernel"])
    assert read["frozen"]["bias"].dtype == jnp.bfloat16
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; there are: 2, 5"):
        reader.read_params(3)
    reader.close()
    averaged = Checkpoints(str(tmp_path / "c"))
    averaged.save(1, state(1, ema=True), {}, {})
    averaged.wait()
    np.testing.assert_array_equal(
        averaged.read_params(1)[0]["ema"]["kernel"], state(1)["params"]["kernel"] / 2
    )
    averaged.close()
    assert "WARNING" not in capfd.readouterr().err


def test_reading_writes_nothing(one):
    before = sorted((path, path.stat().st_mtime_ns) for path in one.rglob("*"))
    reader = Checkpoints(str(one), writable=False)
    reader.read_params(reader.latest())
    reader.close()
    assert before == sorted((path, path.stat().st_mtime_ns) for path in one.rglob("*"))
    with pytest.raises(CheckpointError, match="no such folder of checkpoints"):
        Checkpoints(str(one / "absent"), writable=False)
    assert not (one / "absent").exists()


def test_another_models_checkpoint_is_explained(one):
    wanted = state(0)
    wanted["params"] = {"kernel": jnp.zeros((8, 4)), "bias": jnp.zeros(4)}
    del wanted["opt_state"]["mu"]
    reader = Checkpoints(str(one))
    with pytest.raises(CheckpointError) as caught:
        reader.restore(5, placed(wanted, make_mesh()))
    message = str(caught.value)
    assert f"{one}/5 belongs to another model" in message and "\n" not in message
    assert "missing params/bias (4,)" in message
    assert "left over opt_state/mu (8, 8)" in message
    assert "params/kernel is (8, 8) there and (8, 4) in the recipe" in message
    assert "--workdir" in message
    many = {**wanted, "ema": {f"x{i}": jnp.zeros(1) for i in range(20)}}
    with pytest.raises(CheckpointError, match="and 17 more"):
        reader.restore(5, placed(many, make_mesh()))
    reader.close()


def test_a_step_is_written_once(tmp_path):
    checkpoints = Checkpoints(str(tmp_path / "c"))
    checkpoints.save(1, state(1), {"step": 1}, {})
    checkpoints.wait()
    checkpoints.save(1, state(9), {"step": 9}, {})
    checkpoints.wait()
    _, data = checkpoints.restore(1, placed(state(0), make_mesh()))
    assert data == {"step": 1}
    checkpoints.close()


@pytest.mark.parametrize("when", ["next step", "next save", "close"])
def test_a_write_that_fails_in_the_background_is_not_lost(tmp_path, monkeypatch, when):
    import orbax.checkpoint as ocp

    checkpoints = Checkpoints(str(tmp_path / "c"))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
    checkpoints.save(1, state(1), {}, {})
    with pytest.raises(CheckpointError, match="cannot be written.*No space left on device"):
        if when == "close":
            checkpoints.close()
        elif when == "next step":  # `check` waits for nothing: it may be called at every step
            for _ in range(3000):
                checkpoints.check()
                time.sleep(0.01)
        else:
            checkpoints.save(2, state(2), {}, {})
            checkpoints.save(3, state(3), {}, {})
    monkeypatch.undo()
