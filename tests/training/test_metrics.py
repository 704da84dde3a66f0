"""What a run says about itself: rates, lines of metrics.jsonl, the progress line."""

import json
import logging
import re
from types import SimpleNamespace

import pytest

from vlmjax.training import metrics
from vlmjax.training.metrics import Clock, MetricsLog, ProgressBar, Trace
from vlmjax.training.workdir import Workdir


@pytest.fixture
def time(monkeypatch):
    """A clock that the test sets."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now.seconds)
    return now


def test_rates_over_an_interval(time):
    clock = Clock(batch_size=32)
    assert clock.read() == {}
    time.seconds += 50  # compilation
    clock.restart()
    for waited in (0.5, 0.25, 0.25):
        time.seconds += 2.0
        clock.step(waited, 5e12)
    time.seconds += 2.0
    found = clock.read()
    assert found == pytest.approx(
        {
            "images_per_second": 12.0,
            "step_seconds": 8 / 3,
            "data_wait_share": 0.125,
            "model_tflops_per_second": 5 * 3 / 8,
        }
    )
    clock.restart()
    assert clock.read() == {}


def test_mfu_where_the_chip_is_known(time, monkeypatch):
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e12)
    clock = Clock(batch_size=1)
    clock.step(0.0, 4e12)  # on 8 devices of 1 TFLOP/s
    time.seconds += 2.0
    assert clock.read()["mfu"] == pytest.approx(0.25)
    clock = Clock(batch_size=1, dtype="float32")  # the table has the peaks of bfloat16 alone
    clock.step(0.0, 4e12)
    time.seconds += 2.0
    assert "mfu" not in clock.read()


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v4", 275e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("cpu", None),
        ("NVIDIA GeForce RTX 3090", None),
    ],
)
def test_peaks(kind, peak):
    assert metrics.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_lines_and_what_a_continued_run_does_with_them(tmp_path, caplog):
    log = MetricsLog(Workdir(str(tmp_path)), 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.write(3, {"eval/x/top1": 0.5})
    log.write(3, {})
    log.write(4, {"loss": float("nan")})
    log.close()
    assert lines(tmp_path) == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": 3.0},
        {"step": 3, "eval/x/top1": 0.5},
        {"step": 4, "loss": "nan"},
    ]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    with caplog.at_level(logging.WARNING):
        log = MetricsLog(Workdir(str(tmp_path)), 3)
    log.write(4, {"loss": 4.0})
    log.close()
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3, 3, 4] and lines(tmp_path)[-1]["loss"] == 4.0
    assert "dropped a damaged line" in caplog.text
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_every_line_is_on_disk_at_once(tmp_path):
    log = MetricsLog(Workdir(str(tmp_path)), 0)
    log.write(1, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1
    log.close()


def test_the_progress_line(time, capsys):
    bar = ProgressBar(0, 100)
    row = {"loss": 2.5, "images_per_second": 1234.4, "data_wait_share": 0.07, "mfu": 0.415}
    bar.report(10, row)
    time.seconds += 30.0
    bar.step(20)
    bar.report(20, row)
    bar.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 10/100  loss 2.5000  1234 images/s  data wait 7%  MFU 41.5%  ETA -"
    assert second.endswith("ETA 4:00")  # 80 steps at 3 s
    ProgressBar(0, 100, shown=False).report(10, row)
    assert capsys.readouterr().out == ""


def test_hours():
    assert [metrics._hms(s) for s in (5.9, 65.0, 3605.0, 360000.0)] == [
        "0:05",
        "1:05",
        "1:00:05",
        "100:00:00",
    ]


def test_a_trace_is_of_the_steps_asked_for(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(metrics.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(metrics.jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def steps(first, count, last):
        calls.clear()
        trace = Trace(Workdir(str(tmp_path)), first, count)
        for step in range(1, last + 1):
            trace.before(step)
            calls.append(step)
            trace.after(step, {})
        trace.close()
        return list(calls)

    assert steps(2, 2, 5) == [1, "start", 2, 3, "stop", 4, 5]
    assert steps(2, 5, 3) == [1, "start", 2, 3, "stop"]
    assert steps(2, 0, 3) == [1, 2, 3]


def test_the_bar_of_a_terminal_names_what_it_shows(monkeypatch):
    import io

    from rich.console import Console

    out = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda: Console(file=out, force_terminal=True, width=120))
    bar = ProgressBar(0, 10)
    bar.report(5, {"loss": 1.5, "images_per_second": 10.0, "data_wait_share": 0.5})
    bar.close()
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue())
    assert "5/10" in text and "loss 1.5000  10 images/s  data wait 50%" in text and "eta" in text
