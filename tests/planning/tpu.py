"""What tests of TPU programs need: libtpu, the environment it reads, a recipe that compiles in seconds."""

import importlib.util

import pytest
from training import tiny

from vlmjax import config
from vlmjax.planning.names import parse_name, prepare_environment
from vlmjax.planning.topologies import LIBTPU

needs_libtpu = pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason=LIBTPU)


def devices(text="v5e:2x2"):
    """A device set and its name."""
    from vlmjax.planning.topologies import open_devices

    name = parse_name(text)
    prepare_environment([name])
    return name, open_devices(name)


def recipe(**changes):
    """A validated recipe of one layer per tower."""
    small = {"model__image__depth": 1, "model__text__depth": 1, **changes}
    return config.validate(tiny.recipe(**small))
