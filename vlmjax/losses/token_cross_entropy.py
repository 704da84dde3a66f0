"""Cross-entropy of next tokens from hidden states, without ever holding the scores of all tokens.

Scores of 8k tokens over 152k words are 5 GB in float32. Here a scan makes those of some tokens at a time, and in
training their gradients in the same pass, so that nothing is computed twice.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from vlmjax.sharding.activations import constrain, parts

# Scores of one step of the scan on a device, fp32. Fewer tokens a step would reread the head and its gradient, which
# are as large, more often than a chip multiplies them.
CHUNK_BYTES = 1 << 29


class TokenLoss(NamedTuple):
    """Sums over tokens, each times its weight; all fp32 []."""

    loss: Float[Array, ""]  # of -log p(label) + z_loss * log_z^2; alone of the three it has a gradient
    weight: Float[Array, ""]  # of ones: divide by it for a mean, over all that a step sees
    right: Float[Array, ""]  # of ones where no token scores higher than the label


def token_cross_entropy(
    hidden: Float[Array, "tokens width"],
    kernel: Float[Array, "width vocab"],
    labels: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> TokenLoss:
    """Weighted cross-entropy of `labels` under softmax(hidden @ kernel).

    Args:
      hidden: in the dtype to multiply in; scores and softmax are float32. Over a mesh, cut along tokens.
      kernel: of the head (`Decoder.head_kernel`), in any dtype, which its gradient has too.
      labels: the token that should come next. Where the weight is not 0, one outside the vocabulary gives NaN.
      weights: of each token; fp32, constants. A token of weight 0 does not count, whatever stands there.
      z_loss: coefficient of the square of log sum exp(scores), which holds scores near 0 (PaLM, arXiv:2204.02311,
        has 1e-4).
      chunk: tokens a step on each device; by default as many as CHUNK_BYTES hold.
    """
    if chunk is None:
        here = -(-kernel.shape[1] // parts("vocab"))
        chunk = max(8, CHUNK_BYTES // (4 * here) // 8 * 8)
    return _sums(z_loss, chunk, hidden, kernel, labels, weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    z_loss: float, chunk: int, hidden: Array, kernel: Array, labels: Array, weights: Array
) -> TokenLoss:
    return _scan(z_loss, chunk, hidden, kernel, labels, weights, False, False)[0]


def _forward(z_loss: float, chunk: int, hidden: Any, kernel: Any, labels: Any, weights: Any) -> tuple:
    """Loss and, ahead of time, the gradients that are asked for: a frozen head costs none."""
    values = (x.value for x in (hidden, kernel, labels, weights))
    sums, *gradients = _scan(z_loss, chunk, *values, hidden.perturbed, kernel.perturbed)
    return sums, gradients


def _backward(z_loss: float, chunk: int, gradients: list, given: TokenLoss) -> tuple:
    if isinstance(given.loss, SymbolicZero):
        return None, None, None, None
    scaled = (None if x is None else (x * given.loss.astype(x.dtype)) for x in gradients)
    return *scaled, None, None


_sums.defvjp(_forward, _backward, symbolic_zeros=True)


def _scan(
    z_loss: float,
    chunk: int,
    hidden: Array,
    kernel: Array,
    labels: Array,
    weights: Array,
    hidden_gradient: bool,
    kernel_gradient: bool,
) -> tuple[TokenLoss, Array | None, Array | None]:
    """Sums, and gradients of their loss where asked for, chunk by chunk."""
    tokens, width = hidden.shape
    # Each device walks through its own tokens, and adds up a gradient of the head of its own: summed over devices in
    # every step, that gradient would be sent as often as there are chunks.
    devices = parts("batch") if tokens % parts("batch") == 0 else 1
    counted = weights != 0
    rows = (jnp.where(counted[:, None], hidden, jnp.zeros((), hidden.dtype)), labels, weights)
    rows = tuple(_chunks(x, devices, chunk) for x in rows)
    head = constrain(kernel.astype(hidden.dtype), None, "vocab")

    def step(carried: tuple, rows: tuple) -> tuple:
        total, collected = carried
        states, wanted, weight = rows
        sums, slopes = _chunk(z_loss, states, head, wanted, weight)
        out = None
        if hidden_gradient:
            out = jnp.einsum("scv,dv->scd", slopes, head, preferred_element_type=jnp.float32)
            out = constrain(out.astype(states.dtype), "batch", None, None)
        if kernel_gradient:
            more = jnp.einsum("scd,scv->sdv", states, slopes, preferred_element_type=jnp.float32)
            collected = constrain(collected + more, "batch", None, "vocab")
        return (jax.tree.map(jnp.add, total, sums), collected), out

    nothing = TokenLoss(*(jnp.zeros((), jnp.float32) for _ in TokenLoss._fields))
    collected = None
    if kernel_gradient:
        zeros = jnp.zeros((devices, width, kernel.shape[1]), jnp.float32)
        collected = constrain(zeros, "batch", None, "vocab")
    (total, collected), out = jax.lax.scan(step, (nothing, collected), rows)
    if hidden_gradient:
        out = (
            jnp.moveaxis(out, 0, 1).reshape(devices, -1, width)[:, : tokens // devices].reshape(hidden.shape)
        )
    if kernel_gradient:
        collected = collected.sum(axis=0).astype(kernel.dtype)
    return total, out, collected


def _chunks(x: Array, devices: int, chunk: int) -> Array:
    """[tokens, ...] -> [steps, devices, tokens of a step, ...]; what fills the last step is zeros, of weight 0."""
    x = x.reshape(devices, -1, *x.shape[1:])
    chunk = min(chunk, max(1, x.shape[1]))
    steps = math.ceil(x.shape[1] / chunk)
    x = jnp.pad(x, ((0, 0), (0, steps * chunk - x.shape[1]), *((0, 0),) * (x.ndim - 2)))
    x = jnp.moveaxis(x.reshape(devices, steps, chunk, *x.shape[2:]), 1, 0)
    return constrain(x, None, "batch", *(None,) * (x.ndim - 2))


def _chunk(
    z_loss: float, states: Array, head: Array, labels: Array, weights: Array
) -> tuple[TokenLoss, Array]:
    """Sums of one step, and the gradient of its loss to the scores in the dtype of the states."""
    scores = jnp.einsum("scd,dv->scv", states, head, preferred_element_type=jnp.float32)
    scores = constrain(scores, "batch", None, "vocab")
    # A comparison instead of a lookup: each device has a part of the vocabulary, and compares in its own part.
    is_label = jnp.arange(scores.shape[-1], dtype=labels.dtype)[None, None] == labels[..., None]
    log_z = jax.nn.logsumexp(scores, axis=-1)
    known = (labels >= 0) & (labels < scores.shape[-1])
    own = jnp.where(known, jnp.where(is_label, scores, 0.0).sum(axis=-1), jnp.nan)
    counted = weights != 0
    losses = jnp.where(counted, weights * (log_z - own + z_loss * jnp.square(log_z)), 0.0)
    right = jnp.where(counted & (own >= scores.max(axis=-1)), weights, 0.0)
    slopes = jnp.exp(scores - log_z[..., None]) * (1.0 + 2.0 * z_loss * log_z)[..., None]
    slopes = (slopes - is_label.astype(jnp.float32)) * weights[..., None]
    return TokenLoss(losses.sum(), weights.sum(), right.sum()), slopes.astype(states.dtype)
