"""Damaged checkpoints: whatever happens to whichever file, what is restored is what was saved, or older and said so."""

import gc
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import damage

from vlmjax.errors import CheckpointError, DamagedCheckpoint
from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training.checkpoint import Checkpoints

# Where a read fails, threads of tensorstore complain of an event loop that orbax has closed, whenever they come to it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SHAPES = {"params": {"kernel": (16, 8), "scale": ()}, "frozen": {"bias": (3,)}, "opt_state": {"mu": (16, 8)}}


def state(step):
    rng = np.random.default_rng(step)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    tree = jax.tree.map(draw, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
    return {**tree, "ema": {}, "step": jnp.int32(step)}


def abstract(like):
    place = replicated(make_mesh())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like)


def write(folder, steps=(1, 2), data=lambda step: {"step": step, "seed": 7}, change=lambda x: x, **options):
    checkpoints = Checkpoints(str(folder), **options)
    for step in steps:
        checkpoints.save(step, change(state(step)), data(step), {})
    checkpoints.close()
    return folder


def same(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


@pytest.fixture(scope="module", autouse=True)
def collected():
    """What failed reads leave behind is collected while the mark above holds."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "c")


def restore(folder, writable=False):
    checkpoints = Checkpoints(str(folder), writable=writable)
    try:
        return checkpoints.restore_newest(abstract(state(0)))
    finally:
        checkpoints.close()


def check_fell_back_or_right(folder, capsys, what):
    """Right weights of step 2, or those of step 1 with the reason on stderr and beside what was renamed."""
    found, data = restore(folder)
    said = capsys.readouterr().err
    assert data == {"step": data["step"], "seed": 7}, what
    assert same(found, state(data["step"])), what
    if data["step"] == 2:
        assert "checkpoint  " not in said and (folder / "2").is_dir(), what
        return False
    why = (folder / "2.damaged" / "why.txt").read_text()
    assert not (folder / "2").exists(), what
    assert f"{folder}/2" in why and why.count("\n") == 1, what
    # Not alone: where a read fails, threads of tensorstore may complain of an event loop that orbax closed.
    assert f"checkpoint  damaged: {why[:-1]}; kept as 2.damaged, going on from an older one" in said, what
    return True


def table(whole, tmp_path, capsys, ways):
    """The number of damages of each file that made a run fall back."""
    counts = {}
    for path in damage.files(whole / "2"):
        name = str(path.relative_to(whole / "2"))
        for way in ways:
            shutil.copytree(whole, tmp_path / "c")
            way(tmp_path / "c" / "2" / name)
            fell = check_fell_back_or_right(tmp_path / "c", capsys, (name, way.__name__))
            counts[name] = counts.get(name, 0) + fell
            shutil.rmtree(tmp_path / "c")
    return counts


@pytest.mark.slow
def test_no_damage_to_any_file_gives_wrong_weights(whole, tmp_path, capsys):
    counts = table(whole, tmp_path, capsys, damage.ways(2))
    assert len(counts) >= 15
    assert counts["record/metadata"] == counts["data/metadata"] == 5
    payload = max((whole / "2" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    assert counts[str(payload.relative_to(whole / "2"))] == 5


@pytest.mark.slow
def test_no_flip_anywhere_gives_wrong_weights(whole, tmp_path, capsys):
    """At more places than above."""
    table(whole, tmp_path, capsys, damage.ways(6)[5:])


def test_every_bit_of_the_arrays_is_looked_at(tmp_path, monkeypatch):
    """Where storage has no checksums of its own, a bit that changes between disk and device is found all the same."""
    from vlmjax.training import reading

    folder = write(tmp_path / "c", (1,))
    read = reading.ocp.StandardCheckpointHandler.restore
    for bit in (1, 1 << 31):

        def changed(self, path, args, bit=bit):
            tree = read(self, path, args=args)
            words = np.asarray(tree["params"]["kernel"]).view(np.uint32).copy()
            words[11, 3] ^= np.uint32(bit)
            tree["params"]["kernel"] = jnp.asarray(words.view(np.float32))
            return tree

        monkeypatch.setattr(reading.ocp.StandardCheckpointHandler, "restore", changed)
        with pytest.raises(DamagedCheckpoint, match=r"c/1: params/kernel not what was saved"):
            Checkpoints(str(folder)).restore(1, abstract(state(0)))


def test_the_last_one_is_not_renamed(whole, tmp_path):
    """Nothing begins anew unasked: with no good checkpoint a run is refused, also the second time."""
    shutil.copytree(whole, tmp_path / "c")
    for step in "12":
        (tmp_path / "c" / step / "state" / "manifest.ocdbt").unlink()
    for _ in range(2):
        with pytest.raises(CheckpointError, match="no good checkpoint is left: .*/c/1: .*To begin anew"):
            restore(tmp_path / "c")
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2.damaged"]


def test_going_on_after_damage(whole, tmp_path, capsys):
    """The number of the damaged one is free again, and each damaged one stays."""
    shutil.copytree(whole, tmp_path / "c")
    for expected in ("2.damaged", "2.damaged.1"):
        damage.flip(0.5)(tmp_path / "c" / "2" / "data" / "metadata")
        checkpoints = Checkpoints(str(tmp_path / "c"))
        _, data = checkpoints.restore_newest(abstract(state(0)))
        assert data["step"] == 1 and expected in capsys.readouterr().err
        checkpoints.save(2, state(2), {"step": 2, "seed": 7}, {})
        checkpoints.close()
        assert (tmp_path / "c" / expected / "why.txt").exists()
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2", "2.damaged", "2.damaged.1"]


def test_what_is_not_damage_renames_nothing(whole, tmp_path, monkeypatch):
    from vlmjax.training import reading

    shutil.copytree(whole, tmp_path / "c")
    for error in (PermissionError(13, "Permission denied"), ValueError("UNAVAILABLE: try later")):

        def refuse(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(reading.ocp.StandardCheckpointHandler, "restore", refuse)
        with pytest.raises(CheckpointError, match="cannot be read from here or now") as caught:
            restore(tmp_path / "c")
        assert not isinstance(caught.value, DamagedCheckpoint)
    wanted = abstract({**state(0), "ema": {"kernel": jnp.zeros(3)}})
    with pytest.raises(CheckpointError, match=r"belongs to another model: missing ema/kernel \(3,\)"):
        Checkpoints(str(tmp_path / "c")).restore_newest(wanted)
    assert sorted(os.listdir(tmp_path / "c")) == ["1", "2"]


def test_checkpoints_without_a_record_are_restored_and_it_is_said(tmp_path, capsys, monkeypatch):
    """As they were written before there were records."""
    import orbax.checkpoint as ocp

    items = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
    old = ocp.CheckpointManager(tmp_path / "c", item_names=("state", "data"), item_handlers=items)
    args = {"state": ocp.args.StandardSave(state(3)), "data": ocp.args.JsonSave({"step": 3, "seed": 7})}
    old.save(3, args=ocp.args.Composite(**args))
    old.close()
    checkpoints = Checkpoints(str(tmp_path / "c"))
    found, data = checkpoints.restore_newest(abstract(state(0)))
    assert same(found, state(3)) and data == {"step": 3, "seed": 7}
    said = capsys.readouterr().err
    assert (
        said == f"checkpoint  {tmp_path}/c/3 was written without digests: what it holds cannot be verified\n"
    )
    checkpoints.save(4, state(4), {"step": 4, "seed": 7}, {})
    checkpoints.close()
    assert restore(tmp_path / "c")[1]["step"] == 4
    assert capsys.readouterr().err == ""


def test_another_dtype_than_was_saved(tmp_path):
    """A recipe may ask for other dtypes: what was saved is verified first."""
    folder = write(tmp_path / "c", (1,))
    wanted = abstract(state(0))
    kernel = wanted["params"]["kernel"]
    wanted["params"]["kernel"] = jax.ShapeDtypeStruct(kernel.shape, jnp.bfloat16, sharding=kernel.sharding)
    found, _ = Checkpoints(str(folder)).restore(1, wanted)
    np.testing.assert_array_equal(
        found["params"]["kernel"], state(1)["params"]["kernel"].astype(jnp.bfloat16)
    )


def broken(tree, value=np.nan):
    return {**tree, "params": {**tree["params"], "scale": jnp.float32(value)}}


def test_the_newest_finite_checkpoint_is_never_rotated_away(tmp_path, capsys):
    """Nor after the run was started again; and a run goes on from it."""
    folder = write(tmp_path / "c", (1, 2), keep_last=1)
    assert sorted(os.listdir(folder)) == ["2"]
    write(folder, (3, 4), change=broken, keep_last=1)
    write(folder, (5,), change=lambda tree: broken(tree, np.inf), keep_last=1)
    assert sorted(os.listdir(folder)) == ["2", "5"]
    _, data = restore(folder)
    assert data["step"] == 2 and "/5: params/scale not finite" in capsys.readouterr().err
    write(folder, (6,), keep_last=1)
    assert sorted(os.listdir(folder)) == ["5.damaged", "6"]


def test_what_made_a_checkpoint_is_recorded(tmp_path):
    about = {"recipe": {"seed": 3, "betas": (0.9, 0.98)}, "mesh": {"data": 8}}
    folder = write(tmp_path / "c", (1,), about=about)
    record = json.loads((folder / "1" / "record" / "metadata").read_text())["record"]
    assert record["recipe"] == {"seed": 3, "betas": [0.9, 0.98]} and record["mesh"] == {"data": 8}
    assert record["arrays"]["params/kernel"][:2] == ["float32", [16, 8]]


def test_a_lost_record_does_not_make_it_a_checkpoint_from_before(whole, tmp_path, capsys):
    """In a bucket a folder goes with its last file."""
    shutil.copytree(whole, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "2" / "record")
    assert check_fell_back_or_right(tmp_path / "c", capsys, "no record")
    assert "its record is lost" in (tmp_path / "c" / "2.damaged" / "why.txt").read_text()


def test_reading_parameters_for_export_verifies_them(tmp_path, monkeypatch):
    from vlmjax.training import reading, records

    make = records.make
    monkeypatch.setattr(records, "make", lambda tree, *rest: make(broken(tree, 0.5), *rest))
    folder = write(tmp_path / "c", (1,))
    monkeypatch.undo()
    with pytest.raises(DamagedCheckpoint, match="c/1: params/scale not what was saved"):
        Checkpoints(str(folder), writable=False).read_params(1)
    arrays, compared = reading.read_arrays(str(folder), 1, ("frozen",))
    assert compared and same(arrays, {"frozen": state(1)["frozen"]})
