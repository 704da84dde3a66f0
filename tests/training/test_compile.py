"""The program that a plan compiles is the one that a run runs, to the last instruction."""

import json

import jax
import numpy as np
import pytest
from training import tiny

from vlmjax.training import compile


@pytest.mark.slow
def test_a_plan_has_the_memory_of_the_step_that_runs(tmp_path):
    run = tiny.python("tests/training/compile_program.py", tmp_path / "run", devices=8)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["batches"][0] == found["batches"][1]
    assert found["planned"] == found["ran"]
    assert found["ran"]["temp"] > 10_000 and found["ran"]["argument"] > 10_000
    assert "all-reduce" in found["ran"]["instructions"]
    assert (found["steps"], found["unit"]) == (2, 2 * 2 * 2)


def test_options_follow_the_devices():
    class Device:
        platform = "tpu"

    class Mesh:
        devices = np.array([[Device()]])

    options = compile.compiler_options.__wrapped__  # the shape check wants a real mesh
    assert options(Mesh()) == {"xla_max_concurrent_async_collective_permutes": "16"}
    Device.platform = "gpu"
    assert options(Mesh()) is None


def test_programs_are_kept_beside_the_run_unless_the_environment_names_a_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    try:
        for name in ("one", "two"):  # the second run of a process has its own
            compile.keep_programs(str(tmp_path / name))
            jax.jit(lambda x, name=name: x * 2 + len(name)).lower(np.ones(7, np.float32)).compile()
            assert list((tmp_path / name).glob("*-cache")), name
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
        compile.keep_programs(str(tmp_path / "three"))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "two")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
        compile.compilation_cache.reset_cache()
