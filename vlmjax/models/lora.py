"""Low-rank adapters (LoRA, arXiv 2106.09685): a frozen kernel learns only a product of two narrow matrices beside it.

Models know nothing of it. The matrices travel as a second collection of variables, which `stack` passes on to its
layers, and a projection whose name has some adds theirs to its output.
"""

import contextlib
import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from vlmjax.errors import RecipeError
from vlmjax.sharding.activations import constrain
from vlmjax.sharding.rules import match_rules

GROUP = "lora"  # of the parameters, beside the model's own, and the collection that the model reads
_KERNEL = "/kernel"

Tree = Any


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels W become W + (alpha / rank) a b, and how that is trained.

    Attributes:
      rank: columns of a and rows of b; 0 is no adapter.
      alpha: the product is multiplied by alpha / rank.
      targets: regexes on whole paths of kernels, such as "language_model/.*/q_proj/kernel".
      dropout: share of the values that a reads which are zero in training.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = ()
    dropout: float = 0.0

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank


def with_adapters(params: Tree, config: LoraConfig, key: PRNGKeyArray) -> Tree:
    """Parameters of a model and, under `lora`, fp32 `a` [.., in, rank] and `b` [.., rank, out] for every target.

    a is drawn as PEFT draws it (uniform within in^-0.5), b is zero: the model starts as it was. Draws are a function of
    the key and the path alone.

    Raises:
      RecipeError: a target that matches nothing, or something else than a kernel; a rank above that of a kernel.
    """
    adapters = {}
    for path, kernel in _targets(params, config).items():
        *layers, rows, columns = kernel.shape
        drawn = jax.random.fold_in(key, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(rows)
        place = f"{GROUP}/{path.removesuffix(_KERNEL)}"
        shape = (*layers, rows, config.rank)
        adapters[f"{place}/a"] = jax.random.uniform(drawn, shape, jnp.float32, -bound, bound)
        adapters[f"{place}/b"] = jnp.zeros((*layers, config.rank, columns), jnp.float32)
    return {**params, **traverse_util.unflatten_dict(adapters, sep="/")}


def _targets(params: Tree, config: LoraConfig) -> dict[str, Any]:
    """The kernels that get an adapter, by path."""
    flat = traverse_util.flatten_dict(params, sep="/")
    found: dict[str, Any] = {}
    for pattern in config.targets:
        matched = {path: leaf for path, leaf in flat.items() if re.fullmatch(pattern, path)}
        if not matched:
            kernels = [path for path in flat if path.endswith(_KERNEL)]
            near = next((path for path in kernels if re.search(pattern, path)), kernels[0])
            raise RecipeError(
                f"config.lora.targets: {pattern!r} matches no parameter; it must match the whole path, such as {near}"
            )
        found |= matched
    for path, leaf in found.items():
        if not path.endswith(_KERNEL):
            raise RecipeError(
                f"config.lora.targets: {path} is no kernel of a projection, which alone can have an adapter; end the "
                "expressions with /kernel"
            )
        smaller = min(leaf.shape[-2:])
        if config.rank > smaller:
            raise RecipeError(
                f"config.lora.rank={config.rank} is larger than {path} {list(leaf.shape)} itself: a rank of at most "
                f"{smaller} changes it, and a small share of that saves memory"
            )
    return found


def variables(params: Tree) -> dict[str, Tree]:
    """Parameters as `model.apply` takes them, those under `lora` as a collection of their own."""
    own = {name: value for name, value in params.items() if name != GROUP}
    return {"params": own, **({GROUP: params[GROUP]} if GROUP in params else {})}


@contextlib.contextmanager
def applied(config: LoraConfig, *, train: bool = False) -> Iterator[None]:
    """In this context a projection with adapters among its variables adds (alpha / rank) (x a) b to its output.

    The product a b itself is never formed. With `train` and config.dropout the model needs the rng "dropout".
    """
    if not config.rank:
        yield
        return

    def add(call: Any, args: tuple, kwargs: dict, context: Any) -> Any:
        y, module = call(*args, **kwargs), context.module
        if type(module) is not nn.Dense or not module.has_variable(GROUP, "a"):
            return y
        a, b = (module.get_variable(GROUP, name).astype(y.dtype) for name in ("a", "b"))
        x = jnp.asarray(args[0], y.dtype)
        if train and config.dropout:
            x = _drop(x, config.dropout, module.make_rng("dropout"))
        narrow = x @ a
        narrow = constrain(narrow, "batch", None, None) if narrow.ndim == 3 else narrow
        return y + jnp.asarray(config.scale, y.dtype) * (narrow @ b)

    with nn.intercept_methods(add):
        yield


def _drop(x: Float[Array, "*batch width"], share: float, key: PRNGKeyArray) -> Float[Array, "*batch width"]:
    """Zeros in a share of the places, the others larger in turn."""
    kept = jax.random.bernoulli(key, 1 - share, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - share, x.dtype), jnp.zeros((), x.dtype))


def merged(params: Tree, alpha: float) -> Tree:
    """Parameters of the model alone: every adapted kernel is W + (alpha / rank) a b, computed and kept in fp32.

    Arrays of jax stay where the kernel is, those of numpy on the host. Without adapters, the parameters as they are.
    """
    if GROUP not in params:
        return params
    flat = traverse_util.flatten_dict(variables(params)["params"], sep="/")
    for path, (a, b) in pairs(params[GROUP]).items():
        flat[path] = _sum(flat[path], a, b, alpha / a.shape[-1])
    return traverse_util.unflatten_dict(flat, sep="/")


def pairs(adapters: Tree) -> dict[str, tuple[Any, Any]]:
    """a and b (arrays, or anything with a shape) of each adapted kernel, by its path."""
    flat = traverse_util.flatten_dict(adapters, sep="/")
    places = [path.removesuffix("/a") for path in flat if path.endswith("/a")]
    return {place + _KERNEL: (flat[f"{place}/a"], flat[f"{place}/b"]) for place in places}


def _sum(
    kernel: Float[Array | np.ndarray, "*layers inputs outputs"],
    a: Float[Array | np.ndarray, "*layers inputs rank"],
    b: Float[Array | np.ndarray, "*layers rank outputs"],
    scale: float,
) -> Float[Array | np.ndarray, "*layers inputs outputs"]:
    """kernel + scale a b in float32, where the kernel is."""
    if not isinstance(kernel, jax.Array):
        return np.asarray(kernel, np.float32) + np.float32(scale) * np.matmul(a, b, dtype=np.float32)

    def add(kernel: Array, a: Array, b: Array) -> Array:
        return kernel.astype(jnp.float32) + jnp.float32(scale) * jnp.matmul(a, b, precision="highest")

    place = kernel.sharding if isinstance(kernel.sharding, NamedSharding) else None
    return jax.jit(add, out_shardings=place)(kernel, a, b)


def placement(rules: Sequence[tuple[str, Any]], params: Tree) -> tuple[tuple[str, Any], ...]:
    """Rules that also place adapters: a is cut along its inputs as its kernel is, b along its outputs."""
    if GROUP not in params:
        return tuple(rules)
    own = variables(params)["params"]
    specs = traverse_util.flatten_dict(match_rules(rules, own, what="sharding"), sep="/", is_leaf=_is_spec)
    added = []
    for path, (a, _) in pairs(params[GROUP]).items():
        *layers, rows, columns = (*specs[path], *[None] * (len(a.shape) - len(specs[path])))
        place = re.escape(f"{GROUP}/{path.removesuffix(_KERNEL)}")
        added += [(f"{place}/a", (*layers, rows, None)), (f"{place}/b", (*layers, None, columns))]
    return (*added, *rules)


def _is_spec(_: tuple, value: Any) -> bool:
    return not isinstance(value, Mapping)


def sizes(adapters: Tree) -> dict[str, int]:
    """How many parameters of adapters each part of the model has."""
    return {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in adapters.items()}
