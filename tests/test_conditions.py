"""The conditions set in conftest hold: without them many other tests would pass for the wrong reason."""

import jax
import jax.numpy as jnp
import pytest


def test_there_are_eight_cpu_devices():
    assert jax.default_backend() == "cpu"
    assert jax.device_count() == 8


def test_mixing_dtypes_is_an_error():
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(2, jnp.float32) + jnp.ones(2, jnp.int32)


def test_silent_broadcasting_is_an_error():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)
