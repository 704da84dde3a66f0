"""Saves checkpoint after checkpoint until it is killed; says which ones are finished. `save_program FOLDER`."""

import sys

import jax.numpy as jnp
import numpy as np

from vlmjax.training.checkpoint import Checkpoints


def values(step):
    """4 MiB that do not compress."""
    return {"params": {"w": np.random.default_rng(step).normal(size=(1024, 1024)).astype(np.float32)}}


if __name__ == "__main__":
    checkpoints = Checkpoints(sys.argv[1], keep_last=1)
    for step in range((checkpoints.latest() or 0) + 1, 1000):
        checkpoints.save(
            step, {"params": {"w": jnp.asarray(values(step)["params"]["w"])}}, {"step": step}, {}
        )
        print("began", step, flush=True)
        checkpoints.wait()
        print("finished", step, flush=True)
