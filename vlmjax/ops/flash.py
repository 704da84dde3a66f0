"""Causal attention by kernels that never hold the scores: cuDNN's on GPUs, splash attention on TPUs; and which to take.

Both keep to what `attention` says of causal, window and segment_ids, up to rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vlmjax.sharding.activations import on_each_device, parts

IMPLEMENTATIONS = ("xla", "cudnn", "splash")
TILE = 128  # splash takes whole tiles of so many tokens
BLOCK = 512  # and works on so many at a time, where they divide the row
# Below, the scores of a row are small, and XLA's own attention is as fast.
SPLASH_TOKENS = 1024


def choose_attention(
    mesh: Mesh | None, *, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any
) -> str:
    """What computes causal attention without a cache on the devices of a mesh: one of IMPLEMENTATIONS.

    Args:
      mesh: its devices decide, which need not be this machine's; None is one device, and xla.
      tokens: of a row.
      heads: of queries; over a mesh with `tensor` a kernel takes heads that it divides, of queries and keys.
      kv_heads: of keys and values.
      head_dim: width of a head.
      dtype: of queries, keys and values; cuDNN has none for float32.
    """
    if mesh is None:
        return "xla"
    sizes = {"tokens": tokens, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "dtype": dtype}
    return _kernel_for(mesh.devices.flat[0], mesh.shape.get("tensor", 1), **sizes)


def _kernel_for(
    device: Any, tensor: int, *, tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: Any
) -> str:
    if device.platform == "tpu":
        shared = heads % tensor == kv_heads % tensor == 0
        return "splash" if head_dim % 16 == 0 and tokens >= SPLASH_TOKENS and shared else "xla"
    if device.platform in ("gpu", "cuda"):
        half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
        ampere = float(getattr(device, "compute_capability", 8.0)) >= 8.0
        sizes = head_dim % 8 == 0 and head_dim <= 128 and tokens % 2 == 0
        return "cudnn" if half and ampere and sizes else "xla"
    return "xla"


def cudnn(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "batch tokens"] | None = None,
    scale: float | None = None,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Causal attention by cuDNN. With segments it is told a mask [batch, 1, tokens, tokens], in the dtype of `q`."""
    mask = None
    if segment_ids is not None:
        # Padding may see padding: a row that sees nothing would be undefined.
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    out = jax.nn.dot_product_attention(
        *(q, k, v),
        mask=mask,
        scale=scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return _without_padding(out, segment_ids)


def splash(
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch tokens kv_heads head_dim"],
    v: Float[Array, "batch tokens kv_heads head_dim"],
    *,
    window: int | None = None,
    segment_ids: Int[Array, "batch tokens"] | None = None,
    scale: float | None = None,
    interpret: bool = False,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Causal attention by jax's splash kernel, which skips tiles that are later or outside the window.

    Rows of any length: they are filled to whole tiles. Over the mesh in context each device computes its own examples
    and heads. `interpret` runs the kernel's program without a TPU, for tests.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = segment_ids
    tokens = q.shape[1]
    missing = -tokens % TILE
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    rows = [(q.astype(jnp.float32) * scale).astype(q.dtype), k, v]
    rows = [jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) for x in rows]
    segment_ids = jnp.pad(segment_ids.astype(jnp.int32), ((0, 0), (0, missing)))

    def kernel(q: Array, k: Array, v: Array, segments: Array) -> Array:
        run = _splash_kernel(q.shape[1], q.shape[2], window, interpret)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.vmap(lambda q, k, v, s: run(q, k, v, kernels.SegmentIds(s, s)))(
            q, k, v, segments
        ).swapaxes(1, 2)

    heads = "heads" if k.shape[2] % parts("heads") == 0 else None
    names = (("batch", None, heads, None),) * 3 + (("batch", None),)
    out = on_each_device(kernel, names, *rows, segment_ids)[:, :tokens]
    return _without_padding(out, given)


def _splash_kernel(tokens: int, heads: int, window: int | None, interpret: bool) -> Any:
    shape = (tokens, tokens)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in (BLOCK, BLOCK // 2, TILE) if tokens % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernels.BlockSizes(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block))
    return kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _without_padding(out: Array, segment_ids: Array | None) -> Array:
    """Zeros, and no gradient, where a token is padding."""
    if segment_ids is None:
        return out
    return jnp.where((segment_ids != 0)[:, :, None, None], out, jnp.zeros((), out.dtype))
