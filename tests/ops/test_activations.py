"""Activations against their definitions in double precision."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from vlmjax.ops.activations import ACTIVATIONS


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tanh_form(x):
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


DEFINITIONS = {
    "gelu": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_fast": tanh_form,
    "gelu_new": tanh_form,
    "gelu_pytorch_tanh": tanh_form,
    "quick_gelu": lambda x: x * sigmoid(1.702 * x),
    "linear": lambda x: x,
    "relu": lambda x: max(x, 0.0),
    "silu": lambda x: x * sigmoid(x),
    "swish": lambda x: x * sigmoid(x),
}
POINTS = np.linspace(-6, 6, 241)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_definition(name):
    want = [DEFINITIONS[name](float(x)) for x in POINTS]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(POINTS, jnp.float32)), want, atol=2e-6)


def test_every_name_is_defined_here():
    assert set(ACTIVATIONS) == set(DEFINITIONS)


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_dtype_is_kept(name):
    assert ACTIVATIONS[name](jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16
