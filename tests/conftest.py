"""Test conditions for the whole tree: 8 simulated devices, strict dtypes and ranks, checked shapes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

# Read by jax when it is first imported, so they are set before anything here can import it.
_DEVICES = "--xla_force_host_platform_device_count=8"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Indexes and kernels made at first use stay out of the user's own cache; the kernel is compiled once for all runs.
os.environ.setdefault("VLMJAX_CACHE", os.path.join(tempfile.gettempdir(), f"vlmjax-tests-{os.getuid()}"))

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Every annotation in vlmjax is checked when its function is called: wrong shapes fail where they enter.
install_import_hook("vlmjax", "beartype.beartype")

REFERENCE = Path(__file__).resolve().parents[2] / "shared"


def shared_path(name: str) -> Path:
    """Path of a piece of reference data kept beside the checkout; the test is skipped where it is absent."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"reference data {name} is not beside this checkout")
    return path


@pytest.fixture(name="shared_path")
def _shared_path() -> Callable[[str], Path]:
    """The helper above, for tests that ask for it by name."""
    return shared_path
