"""The run of two processes that those of faults are compared with."""

import pytest
from multihost import pair
from training import tiny


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
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
