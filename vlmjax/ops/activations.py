"""Activations by the name a Hugging Face config gives them in `hidden_act`."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Gaussian error linear unit, x * Phi(x) in its exact form (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU; differs from the exact form by up to 5e-4."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """GELU as x * sigmoid(1.702 x), used by OpenAI's CLIP (openai/CLIP, clip/model.py: QuickGELU)."""
    return x * jax.nn.sigmoid(1.702 * x)


def linear(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """No activation."""
    return x


ACTIVATIONS: dict[str, Activation] = {
    "gelu": gelu,
    "gelu_fast": gelu_tanh,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "linear": linear,
    "quick_gelu": quick_gelu,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}
