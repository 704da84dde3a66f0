"""What InfoNCE with its gradients takes of each device, beside the two usual ways, for a pod that is not here.

`python benchmarks/loss_memory.py --topology=v5e:16x16 --width=1024 --out=loss.json` (or h100:1x8, see docs/plan.md)

- ours: `info_nce` as a recipe of that batch would have it (`loss.form = "auto"`).
- all-gather: each device gathers all features and keeps its rows of logits, both ways (open_clip's local loss).
- GSPMD: the whole matrix of logits in one expression, cut along rows by the compiler (big_vision's softmax loss).

Nothing is run: bytes are XLA's allocation, seconds its schedule's cycles (TPU) or a roofline (GPU).
"""

import argparse
import json
import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

from vlmjax.planning.names import parse_name, prepare_environment

SIZES = (32_768, 262_144, 1_048_576, 4_194_304, 16_777_216)
WAYS = ("ours", "all-gather", "GSPMD")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")


def losses(mesh):
    """The two usual ways, as functions of bfloat16 features and the scale."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from vlmjax.sharding.mesh import BATCH_AXES

    rows = PartitionSpec(BATCH_AXES)

    def logits(a, b, scale):
        return scale * jnp.matmul(a, b.T, preferred_element_type=jnp.float32)

    def all_gather(images, texts, scale):
        def on_device(images, texts, scale):
            every_image, every_text = (jax.lax.all_gather(x, BATCH_AXES, tiled=True) for x in (images, texts))
            own = jax.lax.axis_index(BATCH_AXES) * len(images) + jnp.arange(len(images))
            total = jnp.float32(0)
            for scores in (logits(images, every_text, scale), logits(texts, every_image, scale)):
                right = jnp.take_along_axis(scores, own[:, None], 1)[:, 0]
                total += (jax.nn.logsumexp(scores, 1) - right).sum()
            return jax.lax.psum(total, BATCH_AXES)

        spread = jax.shard_map(
            on_device, mesh=mesh, in_specs=(rows, rows, PartitionSpec()), out_specs=PartitionSpec()
        )
        return spread(images, texts, scale) / (2 * len(images))

    def gspmd(images, texts, scale):
        scores = jax.lax.with_sharding_constraint(logits(images, texts, scale), NamedSharding(mesh, rows))
        right = scale * jnp.sum(images.astype(jnp.float32) * texts.astype(jnp.float32), 1)
        return (jax.nn.logsumexp(scores, 1) - right + jax.nn.logsumexp(scores, 0) - right).mean() / 2

    return {"all-gather": all_gather, "GSPMD": gspmd}


def subject(way: str, batch: int, width: int, devices):
    """The program of one way, with the arguments that our own has."""
    import jax

    from vlmjax.planning.subject import loss_subject

    ours = loss_subject(batch, width, devices)
    if way == "ours":
        return ours
    step = jax.jit(jax.value_and_grad(losses(ours.mesh)[way], argnums=(0, 1, 2)))
    return ours._replace(step=step, title=f"{way}, {batch} pairs of width {width}")


def environment() -> dict:
    """What the figures were made with."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    machine = f"{os.cpu_count()} x {platform.processor() or platform.machine()}, no accelerator"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": machine,
        "packages": installed,
    }


def cell(made: dict) -> str:
    """Memory and time of one program."""
    if made["fits"] is False:
        return f"{made['needed_bytes'] / 2**30:.3g} GiB: does not fit"
    if made["predicted_step_seconds"] is None:
        return f"{made['needed_bytes'] / 2**30:.3g} GiB"
    return f"{made['needed_bytes'] / 2**30:.3g} GiB, {made['predicted_step_seconds']:.3g} s"


def main() -> None:
    """Compile every way at every size and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--topology", default="v5e:16x16")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="global batches")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    name = parse_name(args.topology)
    prepare_environment([name])
    from vlmjax.planning.plan import make_plan
    from vlmjax.planning.topologies import check_installed, open_devices

    check_installed(name)
    devices, ways, plans = open_devices(name), args.ways.split(","), []
    print(f"| pairs | {' | '.join(ways)} | 8 N^2 D at peak |\n" + "|---" * (len(ways) + 2) + "|", flush=True)
    for batch in map(int, args.sizes.split(",")):
        made = [make_plan(name, subject(way, batch, args.width, devices)).to_json() for way in ways]
        plans += [{"way": way, **plan} for way, plan in zip(ways, made, strict=True)]
        cells = " | ".join(cell(plan) for plan in made)
        print(f"| {batch:,} | {cells} | {made[0]['ideal_seconds']:.3g} s |", flush=True)
    found = {"environment": environment(), "plans": plans}
    print("\n" + json.dumps(found["environment"]))
    if args.out:
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
