"""The train command with a fault of the test's own at chosen steps, and a pace at which signals can be sent.

PACE: seconds before each batch. NAN_AT: steps, "5" or "5,6,7" or "5-" for all from 5 on, whose loss is made NaN.
STOP_AT: the step during which the process sends itself a SIGTERM.
SLOW: "PROCESS", whose batches alone come at that pace.
STUCK: "PROCESS:STEP", a process that sleeps for ever when asked for the batch of that step.
"""

import os
import signal
import time

import jax.numpy as jnp
from absl import app

from vlmjax import main
from vlmjax.data import pipeline
from vlmjax.stages.contrastive import Contrastive

MARK = 7  # a picture of this value alone stands for a record that makes the loss NaN
PACE = float(os.environ.get("PACE", 0))
SLOW = os.environ.get("SLOW", os.environ.get("VLMJAX_PROCESS_ID", "0"))
STUCK = tuple(map(int, os.environ.get("STUCK", "-1:0").split(":")))


def poisoned(step):
    """Whether NAN_AT names the step."""
    wanted = os.environ.get("NAN_AT", "")
    if wanted.endswith("-"):
        return step >= int(wanted[:-1])
    return str(step) in wanted.split(",")


def paced(self):
    """The next batch, late and perhaps poisoned."""
    batch = take(self)
    if STUCK == (int(os.environ.get("VLMJAX_PROCESS_ID", 0)), self.step):
        time.sleep(10_000)
    if os.environ.get("STOP_AT") == str(self.step):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PACE if SLOW == os.environ.get("VLMJAX_PROCESS_ID", "0") else 0)
    if poisoned(self.step):
        batch["pixel_values"] = batch["pixel_values"] * 0 + batch["pixel_values"].dtype.type(MARK)
    return batch


def encode(self, params, batch, rng):
    """Features of the batch, NaN for marked pictures."""
    marked = (batch["pixel_values"] == MARK).all(axis=(1, 2, 3)).any()
    factor = jnp.where(marked, jnp.float32(jnp.nan), jnp.float32(1.0))
    features = real_encode(self, params, batch, rng)
    return {name: value * factor.astype(value.dtype) for name, value in features.items()}


if __name__ == "__main__":
    take, pipeline.TrainData.__next__ = pipeline.TrainData.__next__, paced
    real_encode, Contrastive.encode = Contrastive.encode, encode
    app.run(main.main, flags_parser=main.parse)
