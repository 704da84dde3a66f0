"""A process is ended when it shows no sign of life, and never while it does what takes long."""

import threading
import time

import pytest

from vlmjax.training.phases import Phases
from vlmjax.training.watchdog import Watchdog


@pytest.fixture
def codes():
    """Exit codes that were asked for, as they come."""

    class Codes(list):
        came = threading.Event()

        def __call__(self, code):
            self.append(code)
            self.came.set()

    return Codes()


def test_a_step_that_takes_too_long_ends_the_process_with_all_stacks(codes, capfd):
    phases = Phases()
    began = time.monotonic()
    with Watchdog(phases, 0.2, codes):
        phases.enter("step")
        assert codes.came.wait(20)
    assert codes == [76] and time.monotonic() - began >= 0.2
    error = capfd.readouterr().err
    assert "stuck in phase 'step'" in error and "config.watchdog=0.2" in error
    assert "test_watchdog.py" in error  # where the main thread is


def test_signs_of_life_and_longer_phases_keep_it_alive(codes):
    phases = Phases()
    with Watchdog(phases, 1.0, codes):
        for phase in ("step", "data") * 10:
            phases.enter(phase)
            time.sleep(0.1)
        phases.enter("evaluate")
        assert not codes.came.wait(1.5)
        phases.enter("step")
    assert not codes.came.wait(0.5) and codes == []


def test_limits_and_none():
    assert Watchdog(Phases(), 0.0).limit("step") == 0
    before = threading.active_count()
    with Watchdog(Phases(), 0.0):
        assert threading.active_count() == before
    with Watchdog(Phases(), 30.0) as dog:
        assert dog.limit("step") == dog.limit("data") == 30
        assert dog.limit("compile") == dog.limit("checkpoint") == dog.limit("restore") == 300
