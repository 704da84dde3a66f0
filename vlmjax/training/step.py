"""One update: gradients of the trainable half, a finite check that gates it, optimizer, moving average."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import BATCH_AXES
from vlmjax.training.state import TrainState, merge

Tree = Any


def value_and_grad(stage: Any, state: TrainState, batch: Mapping, rng: Any) -> tuple:
    """((loss, (metrics, features)), gradient of the trainable parameters) of a global batch in one forward pass."""
    keys = _keys(stage, state, batch)

    def loss(trainable):
        whole = merge(trainable, state.frozen)
        features = {**stage.encode(whole, batch, rng), **keys}
        value, metrics = stage.head(whole, features, batch, state.extra, jax.random.fold_in(rng, 1))
        return value, (metrics, features)

    return jax.value_and_grad(loss, has_aux=True)(state.params)


def accumulated_value_and_grad(
    stage: Any, state: TrainState, batch: Mapping, rng: Any, micro_batches: int, mesh: Mesh
) -> tuple:
    """As `value_and_grad` for a stage that decomposes, whose parts are gone through one after the other."""
    total = stage.total_weight(batch)
    parts = jax.tree.map(lambda x: _to_micro(x, micro_batches, mesh), batch)
    parts = (parts, jax.random.split(rng, micro_batches))

    def one(part, rng):
        (loss, (metrics, _)), grads = value_and_grad(stage, state, {**part, "total_weight": total}, rng)
        return loss, metrics, grads

    def add(sums, args):
        return jax.tree.map(jnp.add, sums, one(*args)), None

    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (loss, metrics, grads), _ = jax.lax.scan(add, zeros, parts)
    return (loss, (metrics, {})), grads


def cached_value_and_grad(
    stage: Any, state: TrainState, batch: Mapping, rng: Any, micro_batches: int, mesh: Mesh
) -> tuple:
    """As `value_and_grad`, in `micro_batches` passes whose negatives are still those of the whole batch.

    Gradient caching (arXiv 2101.06983): features of all micro-batches first, without keeping activations; the loss and
    its gradient with respect to the features once; then each micro-batch forward again, pulling its part back.
    """
    params, frozen = state.params, state.frozen
    parts = jax.tree.map(lambda x: _to_micro(x, micro_batches, mesh), batch)
    rngs = jax.random.split(rng, micro_batches)

    def encode(trainable, part, rng):
        return stage.encode(merge(trainable, frozen), part, rng)

    def both(args):
        part, rng = args
        return encode(params, part, rng), _keys(stage, state, part)

    stacked = jax.lax.map(both, (parts, rngs))
    features, keys = jax.tree.map(lambda x: _from_micro(x, mesh), stacked)

    def head(trainable, features):
        whole = merge(trainable, frozen)
        return stage.head(whole, {**features, **keys}, batch, state.extra)

    (loss, metrics), (grads, feature_grads) = jax.value_and_grad(head, argnums=(0, 1), has_aux=True)(
        params, features
    )
    feature_grads = jax.tree.map(lambda x: _to_micro(x, micro_batches, mesh), feature_grads)

    def pull(total, args):
        part, rng, cotangent = args
        _, vjp = jax.vjp(lambda p: encode(p, part, rng), params)
        return jax.tree.map(jnp.add, total, vjp(cotangent)[0]), None

    grads, _ = jax.lax.scan(pull, grads, (parts, rngs, feature_grads))
    return (loss, (metrics, {**features, **keys})), grads


def _keys(stage: Any, state: TrainState, batch: Mapping) -> dict:
    """Features of a batch by the stage's momentum encoder, if it has one."""
    if "momentum" not in state.extra:
        return {}
    return stage.keys(merge(state.extra["momentum"], state.frozen), batch)


def _to_micro(x: jax.Array, n: int, mesh: Mesh) -> jax.Array:
    """[batch, ...] -> [n, batch / n, ...], each micro-batch taking the same share of every device's own rows."""
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    # No size is left to be worked out: rows without a place for images have arrays of no elements.
    rows = x.shape[0] // n
    x = x.reshape(shards, n, rows // shards, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 0).reshape(n, rows, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))


def _from_micro(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Inverse of `_to_micro`: rows back in the order of the batch."""
    shards = mesh.shape[BATCH_AXES[0]] * mesh.shape[BATCH_AXES[1]]
    x = x.reshape(x.shape[0], shards, -1, *x.shape[2:])
    x = jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[3:])
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def make_train_step(
    stage: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    seed: int,
    micro_batches: int = 1,
    ema_decay: float = 0.0,
) -> Callable[[TrainState, Mapping], tuple[TrainState, dict]]:
    """The function (state, batch) -> (state, metrics) that is compiled once per run.

    A step whose loss or gradient is not finite updates nothing and reports `finite` False, with one flag per top-level
    group of parameters under `finite_groups`. Only time goes on: the step and the schedule of the learning rate.
    """

    @on_mesh(mesh)
    def train_step(state: TrainState, batch: Mapping) -> tuple[TrainState, dict]:
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        if micro_batches == 1:
            (loss, (metrics, features)), grads = value_and_grad(stage, state, batch, rng)
        else:
            in_parts = accumulated_value_and_grad if stage.decomposes else cached_value_and_grad
            (loss, (metrics, features)), grads = in_parts(stage, state, batch, rng, micro_batches, mesh)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = stage.project(optax.apply_updates(state.params, updates))
        ema = _average(state.ema, params, ema_decay, state.step) if ema_decay else {}
        new = TrainState(
            step=state.step + 1,
            params=params,
            frozen=state.frozen,
            opt_state=opt_state,
            ema=ema,
            extra=stage.carry_on(state.extra, params, features, batch),
        )
        new = _where(finite, new, state)
        groups = {name: jnp.isfinite(optax.tree.norm(group)) for name, group in grads.items()}
        metrics = {
            **metrics,
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "finite": finite,
            "finite_groups": groups,
        }
        return new, metrics

    return train_step


def _where(finite: jax.Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` if finite, else `old` with the time of `new`. Never by multiplication: 0 * NaN is NaN."""

    def choose(a, b):
        return a if isinstance(a, optax.ScaleByScheduleState) else jnp.where(finite, a, b)

    chosen = jax.tree.map(choose, new, old, is_leaf=lambda x: isinstance(x, optax.ScaleByScheduleState))
    return chosen.replace(step=new.step)


def _average(ema: Tree, params: Tree, decay: float, step: jax.Array) -> Tree:
    """Move the average towards the parameters; faster at the start, so that the random weights are soon forgotten."""
    count = step.astype(jnp.float32)
    share = 1 - jnp.minimum(jnp.float32(decay), (1 + count) / (10 + count))
    return jax.tree.map(lambda old, new: old + share * (new - old), ema, params)
