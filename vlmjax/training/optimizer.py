"""Optimizers and learning-rate schedules as a recipe names them, on optax."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import traverse_util

from vlmjax.errors import RecipeError
from vlmjax.sharding.rules import match_rules
from vlmjax.training.state import merge

Rules = Sequence[tuple[str, float]]
_BLOCKS = "vision_model/encoder/layers/"  # stacked


def make_schedule(config: Any, total: int, warmup: int, cooldown: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates done so far.

    Args:
      config: `recipe.optimizer` (schedule, learning_rate).
      total: updates in the whole run.
      warmup: updates over which the rate rises linearly from 0 to the peak.
      cooldown: last updates over which it falls linearly to 0 (rsqrt and constant).
    """
    if warmup + cooldown > total:
        raise RecipeError(
            f"config.optimizer: warm-up ({warmup} steps) and cool-down ({cooldown}) are longer than the run ({total}); "
            "shorten them, e.g. --config.optimizer.warmup.steps=0, or set a longer config.total"
        )
    peak, decay = config.learning_rate, max(total - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, decay)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, decay)
    elif config.schedule == "rsqrt":
        scale = max(warmup, 1)

        def after(count):
            return peak * jnp.sqrt(scale / (scale + jnp.asarray(count, jnp.float32)))
    else:
        after = optax.constant_schedule(peak)
    schedule = optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])
    if not cooldown or config.schedule in ("cosine", "linear"):
        return schedule
    return lambda count: schedule(count) * jnp.clip((total - count) / cooldown, 0.0, 1.0)


def make_optimizer(
    config: Any, schedule: optax.Schedule, params: Any, frozen: Any = None
) -> optax.GradientTransformation:
    """The gradient transformation of a recipe: clip, precondition, decay, scale by the (per-parameter) rate.

    Args:
      config: `recipe.optimizer`.
      schedule: from `make_schedule`.
      params: trainable parameters (arrays or shapes); the regex multipliers are resolved against their paths.
      frozen: the others; a multiplier that matches these alone is no mistake.

    Weight decay is decoupled: parameters shrink by rate * weight_decay * multiplier per step (AdamW, 1711.05101).
    """
    rates = _factors(config, "learning_rate_multipliers", params, frozen or {})
    rates = jax.tree.map(lambda rate, layer: rate * layer, rates, layer_factors(params, config.layer_decay))
    decays = _factors(config, "weight_decay_multipliers", params, frozen or {})
    decays = jax.tree.map(lambda factor: factor * config.weight_decay, decays)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        _precondition(config),
        optax.stateless(lambda updates, p: jax.tree.map(lambda u, x, d: u + d * x, updates, p, decays)),
        optax.stateless(lambda updates, _: jax.tree.map(lambda u, r: r * u, updates, rates)),
        optax.scale_by_learning_rate(schedule),
    )


def layer_factors(params: Any, decay: float) -> Any:
    """What each parameter's rate is multiplied by, so that layers near the pixels move less.

    Of the image tower's block l of L decay^(L - l), counted from 0, of what is below the blocks decay^(L + 1); of what
    is above, and of all other parameters, 1 (BEiT, 2106.08254, appendix H). Stacked blocks have an array [L, 1, ...].
    """

    def factor(path: str, leaf: Any, depth: int) -> Any:
        if path.startswith(("vision_model/embeddings/", "vision_model/pre_layernorm/")):
            return decay ** (depth + 1)
        if not path.startswith(_BLOCKS):
            return 1.0
        each = np.float32(decay) ** np.arange(depth, 0, -1, dtype=np.float32)
        return each.reshape(-1, *(1,) * (leaf.ndim - 1))

    flat = traverse_util.flatten_dict(params, sep="/")
    depth = next((leaf.shape[0] for path, leaf in flat.items() if path.startswith(_BLOCKS)), 0)
    if decay == 1.0 or not depth:
        return jax.tree.map(lambda _: 1.0, params)
    return traverse_util.unflatten_dict({p: factor(p, leaf, depth) for p, leaf in flat.items()}, sep="/")


def _factors(config: Any, name: str, params: Any, frozen: Any) -> Any:
    """The factor of each trainable parameter, by rules that speak of the whole model."""
    whole = match_rules(config[name], merge(params, frozen), what=f"config.optimizer.{name}", default=1.0)
    by_path = traverse_util.flatten_dict(whole)
    paths = traverse_util.flatten_dict(params)
    return traverse_util.unflatten_dict({path: by_path[path] for path in paths})


def _precondition(config: Any) -> optax.GradientTransformation:
    if config.name == "adamw":
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "lion":
        return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    if config.name == "muon":
        return _muon(config)
    # Adafactor as ViT-G was trained with it (arXiv 2106.04560, section 3.4): factored second moment, no scaling by the
    # parameter's own size, momentum in bfloat16. The second moment's decay is 1 - step^-0.8; b2 and eps are not used.
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=32, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
        optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16),
    )


def _muon(config: Any) -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embeddings, projections, gains and biases; Nesterov momentum for all.

    Updates of a matrix are orthogonalised momentum (momentum b1), scaled to the size that Adam's have: 0.2
    sqrt(larger side) (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one rate and one decay serve both.
    """
    muon = optax.contrib.muon(
        learning_rate=1.0,
        beta=config.b1,
        adam_b1=config.b1,
        adam_b2=config.b2,
        eps=config.eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(_matrix_axes, params),
    )
    return optax.chain(muon, optax.scale(-1.0))  # optax's already turns downhill; our chain does that last


def _matrix_axes(path: tuple, param: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """Axes of a stack of matrices [depth, in, out]; None for what Adam updates."""
    if path[-1].key != "kernel" or param.ndim != 3:
        return None
    return optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
