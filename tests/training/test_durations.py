"""Lengths in steps: epochs are those of the source."""

import pytest
from training import tiny

from vlmjax import config
from vlmjax.errors import RecipeError
from vlmjax.training.durations import Durations


class Records(list):
    """A source of so many records."""

    name, fingerprint = "records", "0"


def resolve(records, **changes):
    return Durations(config.validate(tiny.recipe(**changes)), Records(range(records)))


def test_epochs_and_examples_in_steps():
    found = resolve(
        100,
        total=config.duration(epochs=3.0),
        optimizer__warmup=config.duration(examples=64),
        optimizer__cooldown=config.duration(epochs=0.5),
        checkpoint__every=config.duration(epochs=1.0),
        eval_every=config.duration(steps=5),
    )
    assert (found.epoch, found.total, found.warmup, found.cooldown) == (100, 19, 4, 3)
    assert found.every == {"eval": 5, "report": None, "checkpoint": 6}
    due = {event: [step for step in range(1, 20) if found.due(event, step)] for event in found.every}
    assert due == {"eval": [5, 10, 15], "report": [], "checkpoint": [6, 12, 18]}


def test_no_warmup_and_no_cooldown():
    found = resolve(100, optimizer__warmup=config.duration())
    assert found.warmup == found.cooldown == 0 and found.total == 6


def test_less_data_than_a_batch():
    with pytest.raises(RecipeError, match=r"holds 15 records, fewer than one batch \(config.batch_size=16\)"):
        resolve(15)
    assert resolve(16).epoch == 16
