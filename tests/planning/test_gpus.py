"""Programs compiled for GPUs that are not here; these tests need jax's CUDA plugin, not a GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from planning import tpu

from vlmjax.planning import report
from vlmjax.planning.chips import GPU_SHARE, chip_of, gpu_share
from vlmjax.planning.names import parse_name
from vlmjax.planning.plan import ROOFLINE, make_plan
from vlmjax.planning.subject import Subject, train_subject
from vlmjax.planning.topologies import CUDA
from vlmjax.sharding.mesh import batch_sharding, make_mesh

needs_cuda = pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason=CUDA)


def test_the_share_of_memory_that_jax_takes(monkeypatch):
    monkeypatch.delenv(GPU_SHARE, raising=False)
    name = parse_name("h100:1x8")
    assert gpu_share() == 0.75 and chip_of(name).memory == int(0.75 * 84_942_979_072)
    monkeypatch.setenv(GPU_SHARE, ".9")
    assert chip_of(name).memory == int(0.9 * 84_942_979_072) < chip_of(parse_name("h200:1x8")).memory
    monkeypatch.setenv(GPU_SHARE, "most")
    assert gpu_share() == 0.75


@needs_cuda
@pytest.mark.slow
@pytest.mark.parametrize("text", ["h100:2x4", "h200:1x8"])
def test_a_train_step(text):
    name, devices = tpu.devices(text)
    with jax.numpy_dtype_promotion("standard"):
        plan = make_plan(name, train_subject(tpu.recipe(), devices, "tiny"))
    assert plan.compiled.fits and plan.method == ROOFLINE and plan.walk.timed > 50
    assert 0 < plan.ideal_seconds < plan.seconds < 0.01 and plan.chip.name.lower().endswith(name.kind)
    assert "bf16[" in plan.compiled.text and "__cublas" in plan.compiled.text
    assert "of a GPU's memory jax takes 75%" in report.page(plan)


@needs_cuda
def test_too_much_memory_is_found_although_xla_compiles_it():
    name, devices = tpu.devices("h100:1x2")
    mesh = make_mesh(devices=devices)
    array = jax.ShapeDtypeStruct((1 << 16, 1 << 19), jnp.float32, sharding=batch_sharding(mesh))
    plan = make_plan(name, Subject("big", jax.jit(jnp.sin), (array,), mesh, 1 << 16, 2, 1, "none", 1, 1))
    assert plan.compiled.fits is False and plan.compiled.peak_bytes == 2 << 36
    page = report.page(plan)
    assert "does not fit: 128.00 GiB per device needed, 59.33 there, 68.67 GiB too much" in page
    assert "micro_batches" in page
