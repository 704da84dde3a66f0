"""What a run reports while it goes: metrics.jsonl, TensorBoard, a progress bar; images/s, data wait, MFU."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from vlmjax.training.workdir import Workdir, jsonable

# Peak dense bfloat16 FLOP/s per device as jax counts devices (makers' data sheets; a TPU v4 chip is one device).
PEAK_FLOPS = {
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None for one that is not in the table."""
    kind = device.device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else None


class Clock:
    """Rates over the steps since the last line: images/s, step time, share of it spent waiting for data."""

    def __init__(self, batch_size: int, dtype: str = "bfloat16"):
        """MFU is only given for computation in bfloat16, whose peak is known."""
        self.batch_size = batch_size
        peak = peak_flops(jax.devices()[0]) if dtype == "bfloat16" else None
        self.peak = peak * jax.device_count() if peak else None
        self.restart()

    def restart(self) -> None:
        """Begin an interval now; called after pauses that are not training (compilation, evaluation)."""
        self._start, self._wait, self._steps, self._flops = time.perf_counter(), 0.0, 0, 0.0

    def step(self, waited: float, flops: float) -> None:
        """Count one step whose batch took `waited` seconds to arrive.

        `flops` are its model FLOPs over the whole batch, forward and backward, without recomputation.
        """
        self._wait += waited
        self._steps += 1
        self._flops += flops

    @property
    def seconds(self) -> float:
        """Length of the interval so far."""
        return time.perf_counter() - self._start

    def read(self) -> dict[str, float]:
        """The rates of the interval so far; empty before its first step."""
        seconds = self.seconds
        if not self._steps or seconds <= 0:
            return {}
        rates = {
            "images_per_second": self.batch_size * self._steps / seconds,
            "step_seconds": seconds / self._steps,
            "data_wait_share": self._wait / seconds,
            "model_tflops_per_second": self._flops / seconds / 1e12,
        }
        if self.peak:
            rates["mfu"] = self._flops / seconds / self.peak
        return rates


class Trace:
    """A profiler trace of a few steps, whole on the device too, in workdir/profile for TensorBoard or Perfetto."""

    def __init__(self, workdir: Workdir, first: int, steps: int):
        """Trace `steps` steps from step `first` on; 0 for none."""
        self._folder, self._steps = str(workdir.path("profile")), range(first, first + steps)
        self._on = False

    def before(self, step: int) -> None:
        """Called before each step is started."""
        if self._steps and step == self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, metrics: Any) -> None:
        """Called once it has been; `metrics` are awaited, since starting a step is not doing it."""
        if self._on and step == self._steps[-1]:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """End the trace where the run ends first."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False


def _open_board(folder: Any, step: int) -> Any:
    """TensorBoard's events, those from `step` on dropped. The package imports torch if it can, seconds for nothing."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(folder), purge_step=step)


class MetricsLog:
    """Lines of metrics.jsonl and the same numbers in TensorBoard. Only the first process writes."""

    def __init__(self, workdir: Workdir, start_step: int):
        """Open the log; lines after `start_step` belong to work that is about to be redone and are dropped."""
        self._workdir = workdir
        path = workdir.path("metrics.jsonl")
        lines = _lines_up_to(path, start_step) if path.exists() else []
        path.write_text("".join(lines))
        self._file = path.open("a")
        self._board = _open_board(workdir.path("tensorboard"), start_step + 1) if workdir.writer else None

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Add one line; `step` counts the updates done."""
        if not metrics:
            return
        row = jsonable({"step": step, **metrics})
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._board:
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "step":
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both files."""
        self._file.close()
        if self._board:
            self._board.close()


def _lines_up_to(path: Any, step: int) -> list[str]:
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            logging.warning("%s: dropped a damaged line: %.60r", path, line)
    return kept


class ProgressBar:
    """Step, loss, images/s, share of time waiting for data, time left: a bar in a terminal, lines elsewhere."""

    def __init__(self, start: int, total: int, shown: bool = True, unit: str = "images"):
        """`shown` is False on every process but the first; a batch is of so many `unit`."""
        self._unit = unit
        self._console = Console()
        self._bar = None
        self._total, self._shown = total, shown
        if shown and self._console.is_terminal:
            columns = ("[bold]{task.completed}/{task.total}", "{task.fields[text]}", "eta")
            self._bar = Progress(
                TextColumn(columns[0]),
                BarColumn(),
                TextColumn(columns[1]),
                TextColumn(columns[2]),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total, completed=start, text="compiling")
            self._bar.start()
        self._begin: tuple[float, int] | None = None

    def step(self, step: int) -> None:
        """Move the bar to `step`."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, row: Mapping[str, float]) -> None:
        """Show the numbers of a logged step."""
        text = f"loss {row['loss']:.4f}"
        if "images_per_second" in row:
            text += f"  {row['images_per_second']:.0f} {self._unit}/s  data wait {row['data_wait_share']:.0%}"
        if "mfu" in row:
            text += f"  MFU {row['mfu']:.1%}"
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
        elif self._shown:
            print(f"step {step}/{self._total}  {text}  ETA {self._left(step)}", flush=True)

    def _left(self, step: int) -> str:
        """Time to the end at the speed since the first report, which leaves the compilation out."""
        now = time.perf_counter()
        if self._begin is None:
            self._begin = (now, step)
            return "-"
        since, first = self._begin
        return _hms((now - since) / max(step - first, 1) * (self._total - step))

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar:
            self._bar.stop()


def _hms(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
