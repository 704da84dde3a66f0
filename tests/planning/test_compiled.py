"""Programs compiled for TPUs that are not here: what fits, what does not, and what is known of either."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from planning import tpu

from vlmjax.planning import report
from vlmjax.planning.chips import GIB, chip_of
from vlmjax.planning.compiled import compile_subject, dumped, too_large
from vlmjax.planning.names import local_name
from vlmjax.planning.plan import make_plan
from vlmjax.planning.subject import Subject, loss_subject, train_subject
from vlmjax.sharding.mesh import batch_sharding, make_mesh

KEYS = (
    "parameters trainable_parameters argument_bytes temp_bytes peak_bytes hbm_bytes fits model_flops "
    "predicted_step_seconds predicted_mfu collectives compile_seconds ideal_seconds"
).split()


@pytest.fixture(autouse=True)
def dtypes_as_optax_mixes_them():
    """optax multiplies its int32 counters with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def subject_of(function, shape, devices):
    """A function of one float32 array spread over the devices."""
    mesh = make_mesh(devices=devices)
    array = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
    return Subject("test", jax.jit(function), (array,), mesh, shape[0], len(devices), 1, "none")


@tpu.needs_libtpu
@pytest.mark.slow
def test_a_train_step_for_four_chips():
    name, devices = tpu.devices()
    plan = make_plan(name, train_subject(tpu.recipe(), devices, "tiny"))
    compiled, found = plan.compiled, plan.to_json()
    assert compiled.fits and compiled.hbm_bytes == int(15.75 * GIB)
    state, batch = plan.subject.arguments
    held = sum(x.sharding.shard_shape(x.shape)[0] * x.dtype.itemsize for x in batch.values() if x.ndim == 1)
    assert held > 0 and compiled.argument_bytes > 4 * plan.subject.trainable * 3  # parameters and two moments
    assert compiled.argument_bytes <= compiled.peak_bytes < 0.1 * GIB
    assert plan.walk.timed > 50 and plan.walk.unknown_loops == 0 and 0 < plan.seconds < 0.1
    assert found["collectives"]["all-reduce"]["bytes"] > 4 * plan.subject.trainable / 2
    assert set(KEYS) <= set(found) and all(found[key] is not None for key in KEYS)
    assert found["predicted_mfu"] == pytest.approx(found["model_flops"] / 197e12 / plan.seconds)
    assert found["steps"] == 6 and found["device_hours"] == pytest.approx(6 * plan.seconds / 3600 * 4)
    page = report.page(plan)
    assert "fits: " in page and "of 15.75 GiB" in page and "4 x TPU v5 lite (v5e:2x2)" in page
    assert "bf16[" in compiled.text  # "auto" follows the devices planned for, not this machine


@tpu.needs_libtpu
@pytest.mark.parametrize(("text", "limit"), [("v5e:2x2", 15.75), ("v4:2x2x1", 30.75)])
def test_too_large_is_an_answer(text, limit):
    """160 GiB on four chips, 40 on each."""
    name, devices = tpu.devices(text)
    subject = subject_of(lambda x: jnp.sort(x, axis=1), (1 << 17, 40 << 13), devices)
    compiled = compile_subject(subject, chip_of(name))
    assert compiled.fits is False and compiled.text == "" and compiled.peak_bytes is None
    assert compiled.hbm_bytes == pytest.approx(limit * GIB, rel=1e-3)
    assert compiled.missing_bytes == compiled.needed_bytes - compiled.hbm_bytes > 0
    plan = make_plan(name, subject._replace(parameters=1, trainable=1))
    page = report.page(plan)
    for advice in ("does not fit: ", "micro_batches", "remat=full", "fsdp", "a program that does not fit"):
        assert advice in page
    whole = make_plan(name, subject._replace(parameters=1, trainable=1, splits=False))
    assert "micro_batches" not in report.page(whole) and "remat=full" in report.page(whole)
    found = plan.to_json()
    assert found["fits"] is False and found["predicted_step_seconds"] is None and found["days"] is None
    assert found["needed_bytes"] > found["hbm_bytes"]


def test_sizes_in_the_compilers_words():
    first = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (40.03G) exceeds available HBM (15.75G). HLO module: jit_f."
    )
    assert too_large(first) == (int(40.03 * GIB), int(15.75 * GIB))
    second = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.50M of 15.75G hbm."
    assert too_large(second) == (int(512.5 * 2**20), int(15.75 * GIB))
    assert too_large("RESOURCE_EXHAUSTED: of another kind") is None
    assert too_large(first.replace("RESOURCE_EXHAUSTED", "INTERNAL")) is None


@tpu.needs_libtpu
def test_other_failures_of_the_compiler_are_no_answer():
    name, devices = tpu.devices()

    def broken(x):
        return jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(make_mesh(), PartitionSpec()))

    with pytest.raises(ValueError):
        compile_subject(subject_of(broken, (8, 8), devices), chip_of(name))


@tpu.needs_libtpu
def test_a_synchronous_permute_is_told():
    """A ring in the order of jax's list jumps across an 8 x 8 slice of v5e at the end of each row."""
    name, devices = tpu.devices("v5e:8x8")
    mesh = jax.sharding.Mesh(devices, "x")
    around = [(i, (i + 1) % 64) for i in range(64)]

    def ring(x):
        return jax.shard_map(
            lambda y: jax.lax.ppermute(jnp.sin(y), "x", around),
            mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"),
        )(x)  # fmt: skip

    array = jax.ShapeDtypeStruct(
        (4096, 1024), jnp.float32, sharding=jax.sharding.NamedSharding(mesh, PartitionSpec("x"))
    )
    plan = make_plan(name, Subject("ring", jax.jit(ring), (array,), mesh, 64, 64, 1, "none"))
    counts = plan.to_json()["collectives"]["collective-permute"]
    assert counts == {"sync": 1, "async": 0, "bytes": 1024 * 64 * 4}
    assert plan.warnings()[0].startswith("1 collective-permute(s) are synchronous")
    assert plan.walk.exposed_seconds == pytest.approx(1024 * 64 * 4 / 45e9)
    assert plan._replace(walk=None).warnings() == []


@tpu.needs_libtpu
def test_a_kernel_states_its_flops():
    """Mosaic's own text: the cost estimate of a Pallas call is found, and one without it is told."""
    name, devices = tpu.devices("v5e:1x1")

    def double(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2.0

    def kernel(cost):
        def call(x):
            return pl.pallas_call(
                double, out_shape=jax.ShapeDtypeStruct((256, 256), jnp.float32), cost_estimate=cost
            )(x)

        return subject_of(call, (256, 256), devices)

    cost = pl.CostEstimate(flops=197 * 10**9, transcendentals=0, bytes_accessed=0)
    plan = make_plan(name, kernel(cost), utilisation=0.5)
    assert plan.walk.compute_seconds == pytest.approx(0.002, rel=0.01) and not plan.warnings()
    silent = make_plan(name, kernel(None))
    assert silent.walk.unknown_kernels == 1 and "state no FLOPs" in silent.warnings()[0]


@tpu.needs_libtpu
@pytest.mark.slow
def test_the_loss_alone():
    name, devices = tpu.devices()
    plan = make_plan(name, loss_subject(1024, 256, devices))
    found = plan.to_json()
    assert found["ideal_seconds"] == pytest.approx(8 * 1024**2 * 256 / 4 / 197e12)
    assert found["model_flops"] == 8 * 1024**2 * 256 / 4 and found["parameters"] == 0
    assert set(KEYS) <= set(found) and found["predicted_step_seconds"] > found["ideal_seconds"]
    assert found["argument_bytes"] >= 2 * 256 * 256 * 2  # bfloat16 features of both sides


def test_simulated_devices_have_memory_but_no_time():
    name = local_name(4)
    subject = subject_of(lambda x: (x @ x.T).sum(), (64, 64), jax.devices()[:4])
    plan = make_plan(name, subject)
    assert plan.compiled.fits is None and plan.compiled.peak_bytes >= plan.compiled.temp_bytes
    assert plan.seconds is plan.mfu is None and "all-" in str(plan.to_json()["collectives"])
    page = report.page(plan)
    assert "nothing to compare with" in page and "left out: no prediction for simulated devices" in page
    assert plan.to_json()["predicted_compute_seconds"] is None


def test_the_dump_of_a_program(tmp_path):
    assert dumped(tmp_path) == ""
    (tmp_path / "a.after_codegen.txt").write_text("small")
    (tmp_path / "b.after_codegen.txt").write_text("the program")
    (tmp_path / "c.before_optimizations.txt").write_text("long before it was one")
    assert dumped(tmp_path) == "the program"
