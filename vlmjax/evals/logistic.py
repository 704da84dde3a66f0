"""Multinomial logistic regression with L2 on all rows at once, and how its strength is chosen."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Float, Int

from vlmjax.sharding.mesh import batch_sharding, batch_shards, replicated

MOST_STEPS = 1000  # CLIP, appendix A.3
# log10 of the strengths that are tried first, and how near to each other they come round the best of them: eight for
# each factor of ten (CLIP, appendix A.3).
FIRST, FINEST = range(-6, 7, 2), 1 / 8
Tree = Any


class Logistic(NamedTuple):
    """Scores are `features @ kernel + bias`; float32 [width, classes] and [classes]."""

    kernel: np.ndarray
    bias: np.ndarray

    def scores(self, features: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows classes"]:
        """Of each class, before the softmax."""
        return features @ self.kernel + self.bias


class Fitter:
    """Fits some rows or all at any strength, by one compiled program.

    In float64 where devices are CPUs, else in float32: there coefficients may be off by some thousandths.
    """

    def __init__(
        self,
        features: Float[np.ndarray, "rows width"],
        labels: Int[np.ndarray, " rows"],
        classes: int,
        mesh: Mesh,
        *,
        wide: bool | None = None,
    ):
        """Rows are dealt out over the mesh's batch axes; every process has them all and makes the same calls.

        `wide` says whether in float64.
        """
        self._wide = mesh.devices.flat[0].platform == "cpu" if wide is None else wide
        self._kind = np.dtype(np.float64 if self._wide else np.float32)
        rows, width = features.shape
        padded = -(-rows // batch_shards(mesh)) * batch_shards(mesh)
        arrays = {"features": features.astype(self._kind), "labels": labels.astype(np.int32)}
        self._shape, self._mesh = (width, classes), mesh
        self._rows, self._more = rows, padded - rows
        with self._precision():
            self._data = {name: self._dealt(value) for name, value in arrays.items()}

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        with jax.enable_x64(self._wide), jax.numpy_dtype_promotion("standard"):  # optax counts in int32
            yield

    def _dealt(self, value: np.ndarray) -> jax.Array:
        value = np.pad(value, [(0, self._more)] + [(0, 0)] * (value.ndim - 1))
        return jax.make_array_from_callback(value.shape, batch_sharding(self._mesh), lambda part: value[part])

    def __call__(self, l2: float, rows: Int[np.ndarray, " some"] | None = None) -> Logistic:
        """The minimum of sum of cross-entropies + l2 / 2 |kernel|^2, from zeros; the bias is free.

        Args:
            l2: 1 / C of scikit-learn's LogisticRegression.
            rows: that count; None: all of them.
        """
        weights = np.zeros(self._rows, self._kind)
        weights[slice(None) if rows is None else rows] = 1
        with self._precision():
            start = {
                "kernel": np.zeros(self._shape, self._kind),
                "bias": np.zeros(self._shape[1:], self._kind),
            }
            given = jax.device_put((start, np.asarray(l2, self._kind)), replicated(self._mesh))
            data = {**self._data, "weights": self._dealt(weights)}
            found = jax.tree.map(np.asarray, _solver(self._mesh)(*given, data))
        return Logistic(found["kernel"].astype(np.float32), found["bias"].astype(np.float32))


@functools.cache
def _solver(mesh: Mesh) -> Callable:
    """Compiled once for every shape, however often a model is probed while it trains."""
    return jax.jit(_solve, out_shardings=replicated(mesh))


def _solve(start: Tree, l2: jax.Array, data: Tree) -> Tree:
    """L-BFGS until the gradient is nothing, the loss cannot be told from the one before, or MOST_STEPS."""
    rows = data["weights"].sum()

    def loss(params: Tree) -> jax.Array:
        scores = jnp.matmul(data["features"], params["kernel"], precision="highest") + params["bias"][None]
        each = optax.losses.softmax_cross_entropy_with_integer_labels(scores, data["labels"])
        penalty = 0.5 * l2 * jnp.square(params["kernel"]).sum()
        return ((each * data["weights"]).sum() + penalty) / rows

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)
    precision = jnp.finfo(l2.dtype)

    def step(carry: tuple) -> tuple:
        params, state, _, before = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state, before, value

    def going(carry: tuple) -> jax.Array:
        _, state, before, value = carry
        slope = optax.tree.norm(optax.tree.get(state, "grad"), ord=jnp.inf)
        told = before - value > precision.eps * jnp.abs(value)
        steps = optax.tree.get(state, "count")
        return (steps < 2) | ((steps < MOST_STEPS) & (slope > 10 * precision.eps) & told)

    first = jnp.full((), jnp.inf, l2.dtype)
    return jax.lax.while_loop(going, step, (start, solver.init(start), first, first))[0]


def search(score: Callable[[float], float]) -> float:
    """The strength whose score is best: of every second power of ten, then of those between, nearer and nearer.

    Of equal scores the strongest wins. Source: CLIP (2103.00020), appendix A.3.

    Args:
        score: of a strength, on records that were not fitted.
    """
    scores = {float(power): score(10.0**power) for power in FIRST}
    best = max(scores, key=lambda power: (scores[power], power))
    width = 1.0
    while width >= FINEST:
        for power in (best - width, best + width):
            scores.setdefault(power, score(10.0**power))
        best = max(scores, key=lambda power: (scores[power], power))
        width /= 2
    return 10.0**best
