"""Writes two checkpoints, or restores the newest good one, by any number of processes.

`restore_program write FOLDER`, or `restore_program restore FOLDER OUT [READS_BADLY [SILENT HOW]]`: the process with
the number READS_BADLY cannot read checkpoint 2, the one with the number SILENT does not come to the vote about it,
because it sleeps, or because it is stopped by a SIGSTOP. Of FOLDER,FOLDER and OUT,OUT one is restored after the other.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from vlmjax.errors import UserError
from vlmjax.sharding import distributed, vote
from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training import reading, restoring
from vlmjax.training.checkpoint import Checkpoints


def values(step):
    """Two arrays in numpy."""
    rng = np.random.default_rng(step)
    return {"params": {"w": rng.normal(size=(32, 8)).astype(np.float32)}, "step": np.int32(step)}


def places(mesh):
    """Their shardings."""
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp")))
    return {"params": {"w": rows}, "step": replicated(mesh)}


def write(folder, mesh):
    """Checkpoints 1 and 2."""
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        state = jax.tree.map(
            lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), values(step), places(mesh)
        )
        checkpoints.save(step, state, {"step": step}, {})
    checkpoints.close()


def restore(folder, out, mesh, reads_badly=-1, silent=-1, how=""):
    """Restore, write what this process got, and save one more."""
    me, read = jax.process_index(), reading.read_state

    def read_state(folder, step, abstract, *more):
        if step == 2 and me == silent:
            os.kill(os.getpid(), signal.SIGSTOP) if how == "stopped" else time.sleep(60)
        if step == 2 and me == reads_badly:
            raise reading.DamagedCheckpoint(f"{folder}/{step}: cannot be read here")
        return read(folder, step, abstract, *more)

    restoring.read_state = read_state
    wanted = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), values(0), places(mesh)
    )
    checkpoints = Checkpoints(folder)
    state, data = checkpoints.restore_newest(wanted)
    expected = values(data["step"])["params"]["w"]
    equal = all(np.array_equal(s.data, expected[s.index]) for s in state["params"]["w"].addressable_shards)
    Path(f"{out}-{me}").write_text(json.dumps({"step": data["step"], "equal": bool(equal)}))
    checkpoints.save(9, state, data, {})
    checkpoints.close()


if __name__ == "__main__":
    distributed.initialize()
    command, folder, *rest = sys.argv[1:]
    try:
        if command == "write":
            write(folder, make_mesh())
        else:
            who = list(map(int, rest[1:3]))
            if len(who) == 2:
                vote.SECONDS = 3.0
                restoring.restore_newest.__kwdefaults__["seconds"] = 3.0
            for one, out in zip(folder.split(","), rest[0].split(","), strict=True):
                restore(one, out, make_mesh(), *who, *rest[3:])
    except UserError as error:
        print(f"error: {error}", flush=True)
        os._exit(1)  # an orderly end would wait for the other
