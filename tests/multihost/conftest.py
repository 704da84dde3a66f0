"""Conditions of runs of several processes, and the run that those of faults are compared with."""

import os

import pytest
from multihost import pair
from training import tiny


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """A folder of compiled programs that all runs share."""
    with pytest.MonkeyPatch.context() as patch:
        if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs")))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield


@pytest.fixture(scope="session")
def uninterrupted(programs, tmp_path_factory):
    """(folder, recipe) of a run of two processes that nothing befell, in folder/run; a checkpoint every 5 steps."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = tiny.write_recipe(
        folder,
        total__steps=pair.STEPS,
        checkpoint__every__steps=5,
        mesh__fsdp=2,
        data__threads=1,
        model__image__depth=1,
        model__text__depth=1,
    )
    pair.run(folder, recipe, folder / "run")
    return folder, recipe
