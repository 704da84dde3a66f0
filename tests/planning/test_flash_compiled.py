"""Splash attention compiled for a TPU that is not here: kernels in both passes, no scores, nothing sent."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from planning.tpu import devices, needs_libtpu

from vlmjax.ops.attention import attention
from vlmjax.ops.flash import choose_attention
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import BATCH_AXES, make_mesh

pytestmark = needs_libtpu


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "heads", "kv_heads", "window"), [(128, 8, 2, None), (64, 14, 2, 700), (80, 4, 4, None)]
)
def test_splash_is_taken_and_compiles(head_dim, heads, kv_heads, window):
    mesh, tokens = make_mesh(1, 2, 2, devices=devices()[1]), 2000
    sizes = {
        "tokens": tokens,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "dtype": jnp.bfloat16,
    }
    implementation = choose_attention(mesh, **sizes)
    assert implementation == "splash"

    def loss(q, k, v, segments):
        form = {"causal": True, "window": window, "implementation": implementation}
        return attention(q, k, v, segment_ids=segments, **form).astype(jnp.float32).sum()

    def given(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES, *spec))
        )

    rows = [
        given((4, tokens, n, head_dim), jnp.bfloat16, None, "tensor") for n in (heads, kv_heads, kv_heads)
    ]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        step = jax.jit(on_mesh(mesh)(jax.grad(loss, argnums=(0, 1, 2))))
        compiled = step.lower(*rows, given((4, tokens), jnp.int32)).compile()
    text = compiled.as_text()
    assert text.count("tpu_custom_call") >= 3
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    # The scores of a device's examples and heads alone would be 64 to 224 MB.
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20
