"""One table for both directions: a row pairs a Hugging Face tensor with a parameter, by an invertible map.

A family's table is a list of `Row`. `read` consumes every tensor of a folder exactly once and fills every
parameter exactly once; `write` walks the same rows the other way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.safetensors import Pending, Weights

Shape = tuple[int, ...]


class Transform(NamedTuple):
    """A change of layout and its inverse; `hf_shape` maps the shape of a parameter to the one in the file."""

    from_hf: Callable[[np.ndarray], np.ndarray]
    to_hf: Callable[[np.ndarray], np.ndarray]
    hf_shape: Callable[[Shape], Shape]


def _reversed(shape: Shape) -> Shape:
    return shape[::-1]


SAME = Transform(lambda x: x, lambda x: x, lambda shape: shape)
LINEAR = Transform(np.transpose, np.transpose, _reversed)  # torch keeps [out, in], flax [in, out]


def batched(axes: int) -> Transform:
    """With so many leading axes of length 1, for batch and tokens."""
    ones = (1,) * axes
    return Transform(lambda x: x[(0,) * axes], lambda x: x[(None,) * axes], lambda shape: ones + shape)


def patches(size: int, channels: int = 3) -> Transform:
    """Convolution [out, channel, row, column] <-> matrix [row x column x channel, out]."""
    return Transform(
        lambda x: x.transpose(2, 3, 1, 0).reshape(size * size * channels, -1),
        lambda x: x.reshape(size, size, channels, -1).transpose(3, 2, 0, 1),
        lambda shape: (*shape[1:], channels, size, size),
    )


class Row(NamedTuple):
    """`hf` is the name in the file; with `layers` it holds `{layer}`, and the parameter stacks on axis 0.

    Several paths are parameters of one shape that the file lays end to end, on the first axis of its tensor. `first`
    is the number of the first layer, where the stack does not begin with layer 0, and `step` what lies between two of
    its layers, where it holds not every one.
    """

    hf: str
    path: str | tuple[str, ...]
    transform: Transform = SAME
    layers: int | None = None
    first: int = 0
    step: int = 1

    @property
    def paths(self) -> tuple[str, ...]:
        """Of all parameters of this row."""
        return (self.path,) if isinstance(self.path, str) else self.path

    def names(self) -> list[str]:
        """Names of all tensors of this row, in layer order."""
        if self.layers is None:
            return [self.hf]
        return [self.hf.format(layer=self.first + self.step * i) for i in range(self.layers)]

    def under(self, hf_prefix: str, prefix: str) -> "Row":
        """Return the same row inside a larger model."""
        paths = tuple(prefix + path for path in self.paths)
        return self._replace(hf=hf_prefix + self.hf, path=paths[0] if isinstance(self.path, str) else paths)


class Names(NamedTuple):
    """How names in files differ from the table's: other spellings, and buffers that are no parameters."""

    spellings: tuple[tuple[str, str], ...] = ()  # (regex, replacement), each applied once, in order
    ignored: tuple[str, ...] = ()  # regexes matched against the whole name, after the spellings

    def resolve(self, found: Sequence[str]) -> dict[str, str]:
        """Map the table's name to the name in the file, leaving out what is ignored.

        Raises:
            HubError: two tensors of the file are spellings of one.
        """
        result: dict[str, str] = {}
        for original in found:
            name = original
            for pattern, replacement in self.spellings:
                name = re.sub(pattern, replacement, name)
            if any(re.fullmatch(pattern, name) for pattern in self.ignored):
                continue
            if name in result:
                raise HubError(
                    f"tensors {result[name]} and {original} are two spellings of {name}; remove one"
                )
            result[name] = original
        return result


def linear(hf: str, path: str, *, bias: bool = True, layers: int | None = None) -> list[Row]:
    """Rows of a torch Linear and our kernel and bias."""
    rows = [Row(f"{hf}.weight", f"{path}/kernel", LINEAR, layers)]
    return rows + [Row(f"{hf}.bias", f"{path}/bias", SAME, layers)] * bias


def norm(hf: str, path: str, *, layers: int | None = None) -> list[Row]:
    """Rows of a LayerNorm."""
    return [
        Row(f"{hf}.weight", f"{path}/scale", SAME, layers),
        Row(f"{hf}.bias", f"{path}/bias", SAME, layers),
    ]


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"a/b/c": leaf} of nested dicts."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}/{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def read(
    rows: Sequence[Row],
    weights: Weights,
    names: Names,
    expected: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
    shardings: Mapping[str, Any] | None = None,
    where: str = "weights",
    only: Callable[[str], bool] | None = None,
) -> dict[str, Any]:
    """Fill the parameters of a model from a folder's tensors.

    Args:
        rows: the family's table for this model.
        weights: tensors by name, memory-mapped.
        names: spellings and ignored buffers of the family.
        expected: nested dict of anything with `.shape` (`jax.eval_shape` of the model's init).
        dtype: floating dtype of the parameters.
        shardings: nested dict of `jax.sharding.Sharding` like `expected`; each device then reads from the
            file the part that it holds and nothing else. None puts whole parameters on the default device.
        where: what error messages call the folder.
        only: of a parameter's path, whether it is wanted; None: all are.

    Returns:
        nested dict of jax.Array, of those that are wanted.

    Raises:
        HubError: listing, with shapes, every missing, left-over and ill-shaped tensor.
    """
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    _check_paths(rows, shapes)
    found = names.resolve(list(weights))
    _check_tensors(rows, shapes, found, weights, where)
    places = None if shardings is None else flatten(shardings)
    params = {}
    wanted = [(row, place, path) for row in rows for place, path in enumerate(row.paths)]
    for row, place, path in wanted:
        if only is not None and not only(path):
            continue
        sources = [found[name] for name in row.names()]
        load = partial(_load, row, sources, weights, shapes[path], np.dtype(dtype), place=place)
        if places is None:
            params[path] = jax.device_put(load((slice(None),) * len(shapes[path])))
        else:
            params[path] = jax.make_array_from_callback(shapes[path], places[path], load)
    return unflatten(params)


def _load(
    row: Row,
    sources: list[str],
    weights: Weights,
    shape: Shape,
    dtype: np.dtype,
    index: tuple[slice, ...],
    place: int = 0,
) -> np.ndarray:
    """Read the part `index` of the parameter row.paths[place].

    Transposes are views, so only that part's pages are touched.
    """

    def whole(source: str) -> np.ndarray:
        tensor = weights[source]
        if len(row.paths) > 1:
            tensor = np.split(tensor, len(row.paths))[place]
        return row.transform.from_hf(tensor)

    if row.layers is None:
        part = whole(sources[0])[index]
        return np.asarray(part, dtype, order="C", copy=True)  # a copy: the file must not be held open by jax
    layers = range(shape[0])[index[0]]
    sizes = [len(range(size)[part]) for size, part in zip(shape[1:], index[1:], strict=True)]
    out = np.empty((len(layers), *sizes), dtype)
    for position, layer in enumerate(layers):
        out[position] = whole(sources[layer])[index[1:]].astype(dtype)
    return out


def _tensor_shape(row: Row, shapes: Mapping[str, Shape]) -> Shape:
    shape = shapes[row.paths[0]]
    shape = row.transform.hf_shape(shape if row.layers is None else shape[1:])
    return shape if len(row.paths) == 1 else (len(row.paths) * shape[0], *shape[1:])


def _check_paths(rows: Sequence[Row], shapes: Mapping[str, Shape]) -> None:
    """Every parameter has one row, and every row a parameter as deep as the configuration says."""
    places = [(row, path) for row in rows for path in row.paths]
    paths = [path for _, path in places]
    extra = [f"{path} {list(shapes[path])}" for path in shapes if path not in set(paths)]
    absent = [path for path in paths if path not in shapes]
    stacks = [
        f"{path} {list(shapes[path])} (the configuration says {row.layers} layers)"
        for row, path in places
        if row.layers is not None and path in shapes and shapes[path][:1] != (row.layers,)
    ]
    problems = _problem("parameters without a Hugging Face name", extra) + _problem(
        "parameters not there", absent
    )
    problems += _problem("stacks of another depth", stacks)
    if problems:
        raise HubError("parameters do not match the table of this family: " + "; ".join(problems))


def _check_tensors(
    rows: Sequence[Row], shapes: Mapping[str, Shape], found: Mapping[str, str], weights: Weights, where: str
) -> None:
    wanted = {name: _tensor_shape(row, shapes) for row in rows for name in row.names()}
    missing = [f"{name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    left = [f"{name} {list(weights.shape(name))}" for key, name in found.items() if key not in wanted]
    ill = [
        f"{found[name]} is {list(weights.shape(found[name]))}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in found and weights.shape(found[name]) != shape
    ]
    integers = [
        f"{found[name]} is {weights.entries[found[name]].dtype}"
        for name in wanted
        if name in found and not _is_float(weights.entries[found[name]].dtype)
    ]
    problems = _problem("missing", missing) + _problem("left over", left) + _problem("ill-shaped", ill)
    problems += _problem("not floating point", integers)
    if problems:
        raise HubError(f"{where}: tensors do not fit the configuration: " + "; ".join(problems))


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _problem(what: str, items: list[str], shown: int = 12) -> list[str]:
    """One clause of an error message: how many, and the first of them."""
    if not items:
        return []
    more = f", and {len(items) - shown} more" if len(items) > shown else ""
    return [f"{len(items)} {what}: {', '.join(items[:shown])}{more}"]


def write(
    rows: Sequence[Row], params: Mapping[str, Any], expected: Mapping[str, Any], *, dtype: Any = np.float32
) -> dict[str, Pending]:
    """Turn parameters into the tensors of the family, each made only when it is asked for.

    Raises:
        HubError: a parameter that the Hugging Face class has no place for, one that is not there, or one of
            another shape than the model's own (`expected`).
    """
    flat = flatten(params)
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items()}
    _check_paths(rows, shapes)
    model = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    pairs = [(path, list(shape), list(model[path])) for path, shape in shapes.items()]
    ill = [f"{path} is {given}, expected {wanted}" for path, given, wanted in pairs if given != wanted]
    far = [path for path, x in flat.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    problems = _problem("ill-shaped", ill) + _problem(
        "spread over several processes (gather them first)", far
    )
    if problems:
        raise HubError("parameters cannot be written: " + "; ".join(problems))
    tensors: dict[str, Pending] = {}
    for row in rows:
        shape = _tensor_shape(row, shapes)
        for layer, name in enumerate(row.names()):
            part = None if row.layers is None else layer
            leaves = [flat[path] for path in row.paths]
            make = partial(_make, leaves, row.transform, part, np.dtype(dtype))
            tensors[name] = Pending(shape, np.dtype(dtype), make)
    return tensors


def constant(value: np.ndarray, dtype: Any) -> Pending:
    """A tensor that no parameter holds, to be written beside the others."""
    return Pending(value.shape, np.dtype(dtype), lambda: value.astype(dtype))


def _make(leaves: Sequence[Any], transform: Transform, layer: int | None, dtype: np.dtype) -> np.ndarray:
    # jax keeps this copy with the array: layers share one transfer
    wholes = [np.asarray(jax.device_get(leaf)) for leaf in leaves]
    parts = [transform.to_hf((whole if layer is None else whole[layer]).astype(dtype)) for whole in wholes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
