"""Test conditions for the whole tree: 8 simulated devices, strict dtypes and ranks, checked shapes, quick compiling."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

# Read by jax when it is first imported, so they are set before anything here can import it. Most of the time is
# compilation: the emitters of fusions are slow at it, and LLVM need not optimise what runs a few times.
_PLAIN = "--xla_cpu_use_fusion_emitters=false"
for _flag in ("--xla_force_host_platform_device_count=8", _PLAIN):
    if _flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Indexes and kernels made at first use stay out of the user's own cache; the kernel is compiled once for all runs.
os.environ.setdefault("VLMJAX_CACHE", os.path.join(tempfile.gettempdir(), f"vlmjax-tests-{os.getuid()}"))
# What was compiled once in a run of the tests is not compiled again, nor by the processes that tests start. Each
# worker has a folder of its own: jax writes there in place, where another worker could read half a program.
_PROGRAMS = os.environ.get("JAX_COMPILATION_CACHE_DIR")
if not _PROGRAMS:
    _PROGRAMS = tempfile.mkdtemp(prefix="vlmjax-programs-")
    atexit.register(shutil.rmtree, _PROGRAMS, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_PROGRAMS, os.environ.get("PYTEST_XDIST_WORKER", ""))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# jaxlib reads its flags now and never again; libtpu, which reads them later, dies of one that it does not know.
jax.devices()
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(_PLAIN, "").strip()
# Every annotation in vlmjax is checked when its function is called: wrong shapes fail where they enter.
install_import_hook("vlmjax", "beartype.beartype")

QUICK = 10  # seconds of CPU that a test not marked slow may take
_spent = sum(os.times()[:4])

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left alone with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """What was imported until now is no test's own."""
    global _spent
    _spent = sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Note the seconds of CPU, those of the processes it has waited for included, that each phase of a test took."""
    global _spent
    report = yield
    before, _spent = _spent, sum(os.times()[:4])
    report.cpu = _spent - before
    return report


def pytest_terminal_summary(terminalreporter):
    """Name the tests that should be marked slow, and are not."""
    spent = {}
    for report in (r for rows in terminalreporter.stats.values() for r in rows if hasattr(r, "cpu")):
        if "slow" not in report.keywords:
            spent[report.nodeid] = spent.get(report.nodeid, 0) + report.cpu
    for test, seconds in sorted(spent.items(), key=lambda pair: -pair[1]):
        if seconds > QUICK:
            terminalreporter.write_line(f"not marked slow, and takes {seconds:.0f} s of CPU: {test}")
