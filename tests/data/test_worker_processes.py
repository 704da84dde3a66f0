"""Decoding in processes: the same batches, a killed worker, a killed trainer."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, memory, picture, tokenizer

from vlmjax.data import augment, mixture
from vlmjax.data.pipeline import TrainData
from vlmjax.data.record import Record
from vlmjax.errors import DataError

RECIPE = {"crop_scale": (0.4, 1.0), "flip": 0.5, "jitter": 0.3}


@pytest.fixture(name="words", scope="module")
def _words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), 12)


def _sources() -> list:
    """Two sources with several captions; 3 % of the records of each are damaged."""
    out = []
    for number, count in enumerate((70, 40)):
        source = memory(count, captions=3)
        source.name, source.fingerprint = f"source{number}", f"print{number}"
        jpeg = encoded(picture(0, 60, 60), "JPEG")
        for i in range(0, count, 33):
            source.entries[i] = Record(f"k{i}", jpeg[: len(jpeg) // 2], ("cut",))
        out.append(source)
    return out


def _data(words, **options) -> TrainData:
    sources = _sources()
    share = mixture.shares([len(source) for source in sources], "equal", (0.3, 0.7))
    options = {"batch_size": 16, "shares": share, "seed": 3, "threads": 0, "max_bad_share": 0.5} | options
    return TrainData(sources, augment.TrainTransform((16, 12), RECIPE), words, **options)


def _at(words, steps, **options) -> list[dict[str, np.ndarray]]:
    """The batches of some steps, those of one stretch read by one loader."""
    out, data = [], None
    for before, step in zip([None, *steps], steps, strict=False):
        if data is None or before != step - 1:
            if data is not None:
                data.close()
            data = _data(words, start_step=step, **options)
        out.append(next(data))
    data.close()
    return out


# Source 0 supplies 3 of 10 rows: its 70 examples are an epoch of some 15 batches, source 1's 40 of some 4.
STEPS = (0, 3, 4, 7, 14, 15, 1000)


@pytest.mark.parametrize("hosts", [1, 2, 4, pytest.param(16, marks=pytest.mark.slow)])
def test_the_global_batch_depends_on_nothing_but_seed_and_step(words, hosts):
    expected = _at(words, STEPS)
    for host in range(hosts):
        rows = range(host * 16 // hosts, (host + 1) * 16 // hosts)
        _same_rows(_at(words, STEPS, rows=rows, threads=host % 3), expected, rows)


@pytest.mark.slow
@pytest.mark.parametrize(("hosts", "host", "processes"), [(1, 0, 1), (1, 0, 2), (4, 1, 2), (16, 11, 2)])
def test_nor_on_processes(words, hosts, host, processes):
    steps = (14, 15, 16, 17)  # an epoch of source 0 ends here, and some of source 1
    rows = range(host * 16 // hosts, (host + 1) * 16 // hosts)
    got = _at(words, steps, rows=rows, processes=processes, threads=2)
    _same_rows(got, _at(words, steps), rows)


def _same_rows(got: list[dict], expected: list[dict], rows: range) -> None:
    for batch, whole in zip(got, expected, strict=True):
        for name, value in whole.items():
            assert batch[name].dtype == value.dtype
            np.testing.assert_array_equal(batch[name], value[rows.start : rows.stop], err_msg=name)


def test_failures_of_a_process_are_counted_by_reason_and_source(words):
    data = _data(words, processes=1)
    bad = sum(int((~next(data)["valid"]).sum()) for _ in range(6))
    data.close()
    assert bad and data.skips.by_reason == {"truncated": bad}
    assert sum(data.skips.by_source.values()) == bad and set(data.skips.by_source) <= {"source0", "source1"}
    assert data.work()["seconds"] > 0 and data.work()["batches"] == 0


@pytest.mark.parametrize("processes", [0, 1])
def test_batches_that_wait_are_counted(words, processes, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = _data(words, processes=processes, threads=1)
    assert "queue" not in data.work()
    for _ in range(3):
        next(data)
    _until(lambda: data.work()["queue"] >= 2)
    most = data.work()["queue"]
    for _ in range(int(most) + 1):
        next(data)  # as many as waited at least: the count goes on from what is left
    _until(lambda: data.work()["queue"] >= 2)
    assert data.work()["queue"] <= 8
    data.close()
    assert "queue" not in data.work() and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_killed_worker_is_an_error_that_says_so(words):
    data = _data(words, processes=2)
    next(data)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    begin = time.monotonic()
    with pytest.raises(DataError, match="a data process ended by itself.*data.processes"):
        for _ in range(50):
            next(data)
    assert time.monotonic() - begin < 60
    data.close()


PROGRAM = """
import signal, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever started the tests may have made them deaf to it
from helpers import memory, tokenizer
from vlmjax.data import augment
from vlmjax.data.pipeline import TrainData

if __name__ == "__main__":
    words = tokenizer(sys.argv[1], 12)
    data = TrainData(memory(64), augment.TrainTransform((256, 256)), words, batch_size=32, processes=2, threads=2)
    next(data)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="shared memory has no folder here")
@pytest.mark.parametrize("ended", ["killed", "hung up"])
def test_a_trainer_that_ends_at_once_leaves_no_shared_memory(tmp_path, ended):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent.parent}"}
    before = _segments()
    child = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "words")],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with child:
        assert child.stdout.readline() == "ready\n"
        workers = _descendants(child.pid)
        try:
            _until(lambda: len(_segments() - before) > 4)
            # Other tests may run beside this one: what a process of ours has mapped is ours.
            mine = set().union(*map(_mapped, (child.pid, *workers))) & _segments()
        finally:
            if ended == "killed":
                child.kill()
            else:
                os.killpg(child.pid, signal.SIGHUP)
    assert workers and mine
    _until(lambda: not _segments() & mine)
    _until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def _segments() -> set[str]:
    return {name for name in os.listdir("/dev/shm") if name.startswith("psm_")}


def _mapped(pid: int) -> set[str]:
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.rpartition("/dev/shm/")[2] for line in maps if "/dev/shm/psm_" in line}


def _descendants(pid: int) -> list[int]:
    return [
        int(one) for path in Path(f"/proc/{pid}/task").glob("*/children") for one in path.read_text().split()
    ]


def _until(true, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
