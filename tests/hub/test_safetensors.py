"""Reading and writing safetensors, against the reference package and against damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vlmjax.errors import HubError
from vlmjax.hub.safetensors import FILE, INDEX, Pending, open_folder, write_folder

RNG = np.random.default_rng(0)
ARRAYS = {
    "scalar": np.array(2.5, np.float32),
    "half": RNG.normal(size=(3, 5)).astype(np.float16),
    "brain": RNG.normal(size=(7,)).astype(ml_dtypes.bfloat16),
    "single": RNG.normal(size=(4, 2, 3)).astype(np.float32),
    "double": RNG.normal(size=(3,)),
    "long": np.arange(5),
    "flag": np.array([True, False, True]),
    "empty": np.zeros((0, 4), np.float32),
}


def pending(arrays):
    return {name: Pending(a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()}


def check(weights, arrays=ARRAYS):
    assert set(weights) == set(arrays)
    for name, array in arrays.items():
        assert weights[name].dtype == array.dtype and weights.shape(name) == array.shape
        assert np.array_equal(weights[name], array)


def test_written_files_are_read_back_and_by_the_reference(tmp_path):
    write_folder(pending(ARRAYS), tmp_path)
    check(open_folder(tmp_path))
    others = safetensors.numpy.load_file(tmp_path / FILE)
    assert all(np.array_equal(others[name], ARRAYS[name]) for name in ARRAYS if name != "brain")
    assert others["brain"].tobytes() == ARRAYS["brain"].tobytes()
    with safetensors.safe_open(tmp_path / FILE, "np") as file:
        assert file.metadata() == {"format": "pt"}  # transformers 4 insists


def test_files_of_the_reference_are_read(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / FILE)
    check(open_folder(tmp_path))


def test_reading_maps_the_file_and_cannot_change_it(tmp_path):
    write_folder(pending(ARRAYS), tmp_path)
    view = open_folder(tmp_path)["single"]
    base = view
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 0


def test_shards_split_at_the_limit_with_an_index(tmp_path):
    files = write_folder(pending(ARRAYS), tmp_path, max_shard_bytes=100)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in ARRAYS.values())
    for file in files:
        held = sum(ARRAYS[name].nbytes for name, where in index["weight_map"].items() if where == file.name)
        assert held <= 100
    check(open_folder(tmp_path))


def test_a_tensor_above_the_limit_has_a_shard_of_its_own(tmp_path):
    big = {"a": np.zeros(1, np.float32), "b": np.ones(100, np.float32), "c": np.zeros(1, np.float32)}
    files = write_folder(pending(big), tmp_path, max_shard_bytes=10)
    assert len(files) == 3
    check(open_folder(tmp_path), big)


@pytest.mark.parametrize(("first", "second"), [(100, 10**9), (10**9, 100), (60, 200)])
def test_a_second_save_leaves_nothing_of_the_first(tmp_path, first, second):
    write_folder(
        pending({"old": np.ones(50, np.float32), "older": np.ones(50, np.float32)}),
        tmp_path,
        max_shard_bytes=first,
    )
    files = write_folder(pending(ARRAYS), tmp_path, max_shard_bytes=second)
    check(open_folder(tmp_path))
    left = {file.name for file in tmp_path.iterdir()} - {INDEX}
    assert left == {file.name for file in files}
    assert (tmp_path / INDEX).exists() == (len(files) > 1)


def damaged(tmp_path, change):
    write_folder(pending(ARRAYS), tmp_path)
    raw = bytearray((tmp_path / FILE).read_bytes())
    (tmp_path / FILE).write_bytes(change(raw))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw[:-1], "not all there"),
        (lambda raw: raw[:5], "cut short"),
        (lambda raw: b"", "cut short"),
        (lambda raw: b"<html>404 Not Found</html>" * 9, "not a safetensors file"),
        (lambda raw: raw.replace(b'"shape"', b'"shame"'), "damaged safetensors header"),
        (lambda raw: raw.replace(b'{"__meta', b'["__meta'), "damaged safetensors header"),
        (lambda raw: raw.replace(b'"F16"', b'"X16"'), "tensor half is X16"),
        (lambda raw: raw.replace(b"[3,5]", b"[5,5]").replace(b"[3, 5]", b"[5, 5]"), "tensor half .* not all there"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, change, message):
    damaged(tmp_path, change)
    with pytest.raises(HubError, match=message) as caught:
        open_folder(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)


def test_missing_shards_and_tensors_are_listed(tmp_path):
    files = write_folder(pending(ARRAYS), tmp_path, max_shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = files[0].name
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(HubError, match="not in their shard: ghost"):
        open_folder(tmp_path)
    files[1].unlink()
    with pytest.raises(HubError, match=f"1 of {len(files)} shards are missing: {files[1].name}"):
        open_folder(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(HubError, match="damaged index"):
        open_folder(tmp_path)


def test_a_folder_of_pickles_is_explained(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"...")
    with pytest.raises(HubError, match="pytorch_model.bin but no model.safetensors.*save_pretrained"):
        open_folder(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(HubError, match="holds no model.safetensors and no"):
        open_folder(tmp_path)


def test_a_tensor_must_be_what_was_announced(tmp_path):
    with pytest.raises(HubError, match="announced"):
        write_folder({"a": Pending((2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))}, tmp_path)
    with pytest.raises(HubError, match="complex64"):
        write_folder(pending({"a": np.zeros(2, np.complex64)}), tmp_path)
    assert not (tmp_path / FILE).exists()
