"""What survival costs: the guards of a step, and the time for which saving a checkpoint holds a run up.

`python benchmarks/overheads.py guards` trains a small CLIP in the loop of vlmjax, a few steps with all guards and a few
without, in turn. `python benchmarks/overheads.py saves` saves a state of 512 MiB, now in the background, now waited
for, now not at all.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlmjax import config
from vlmjax.data import pipeline
from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training import finite, loop, phases, step, stop, watchdog
from vlmjax.training.checkpoint import Checkpoints


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f}{unit} (quartiles {low:.3f} to {high:.3f})"


def small_clip(steps: int) -> config.Config:
    """A validated recipe whose step takes a fraction of a second on a CPU, where a guard is not lost in noise."""
    c = config.tiny(config.recipe())
    c.model.image.update({"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 48})
    c.model.text.update({"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512})
    c.total.steps, c.log_every, c.checkpoint.every = steps, steps, config.duration()
    c.evals, c.export, c.watchdog = config.Config(), False, 0
    return config.validate(c)


class Switch:
    """Takes the guards out of the loop and puts them back, every `block` steps, and measures both kinds of block."""

    def __init__(self, block: int):
        """With all guards at first."""
        self.block, self.on, self.count, self.began = block, True, 0, (0.0, 0.0)
        self.seconds: dict[bool, list[tuple[float, float]]] = {
            True: [],
            False: [],
        }  # of the clock, of the CPU
        self._watchdog: watchdog.Watchdog | None = None

    def guard(self, owner: Any, name: str, without: Callable) -> None:
        """Have a method do what it does only while the guards are on."""
        real = getattr(owner, name)
        setattr(owner, name, lambda *args: real(*args) if self.on else without(*args))

    def install(self) -> None:
        """Put the switch into the loop."""
        self.guard(phases.Phases, "enter", lambda *_: None)
        self.guard(Checkpoints, "check", lambda *_: None)
        self.guard(finite.StartedSteps, "started", lambda *_: None)
        self.guard(stop.StopRequest, "after", lambda *_: False)
        loop.compiled = self._compiled
        take, kept = pipeline.TrainData.__next__, []

        def same(data: Any) -> dict:
            kept.append(take(data)) if not kept else None
            return dict(kept[0])

        pipeline.TrainData.__next__ = same  # its threads would be the noise

    def _compiled(self, program: Any, state: Any, batch: Any) -> Callable:
        places = jax.tree.map(lambda x: x.sharding, program.state)

        def plain(state: Any, batch: Any) -> tuple:
            new, metrics = program.step.__wrapped__(state, batch)
            return new, {name: x for name, x in metrics.items() if not name.startswith("finite")}

        guarded = program.step.lower(state, batch).compile()
        real, step._where = step._where, lambda _, new, __: new
        bare = jax.jit(plain, donate_argnums=0, out_shardings=(places, None)).lower(state, batch).compile()
        step._where = real

        def update(state: Any, batch: Any) -> tuple:
            if self.count % self.block == 0:
                self._turn(state)
            self.count += 1
            return (guarded if self.on else bare)(state, batch)

        return update

    def _turn(self, state: Any) -> None:
        jax.block_until_ready(state)
        wall, cpu = (now - before for now, before in zip(_clocks(), self.began, strict=True))
        if self.count:
            self.seconds[self.on].append((wall / self.block, cpu / self.block))
            self.on = not self.on
        if self._watchdog:
            self._watchdog.__exit__()
        self._watchdog = watchdog.Watchdog(phases.Phases(), 300) if self.on else None
        self.began = _clocks()


def _clocks() -> tuple[float, float]:
    """Seconds of the clock, and of all CPUs in this process: what other processes do changes the former more."""
    return time.perf_counter(), time.process_time()


def guards(block: int, rounds: int) -> None:
    """Print the time of a step with and without guards, and their ratio in neighbouring blocks."""
    switch = Switch(block)
    recipe = small_clip((2 * rounds + 2) * block + 1)  # the first two blocks warm up; the last step reports
    switch.install()
    with tempfile.TemporaryDirectory() as folder:
        loop.train(recipe, folder)
    on, off = (switch.seconds[which][1:] for which in (True, False))
    if jax.process_index() != 0:
        return
    print(f"{len(on)} blocks of {block} steps each, {jax.process_count()} process(es)")
    for i, clock in enumerate(("clock", "CPU")):
        with_guards, without = [x[i] for x in on], [x[i] for x in off]
        print(f"with guards, {clock} s/step     {spread(with_guards)}")
        print(f"without guards, {clock} s/step  {spread(without)}")
        print(
            f"ratio                       {spread([a / b for a, b in zip(with_guards, without, strict=True)])}"
        )


def saves(mebibytes: int, rounds: int, steps: int) -> None:
    """Print for how long saves hold a run up, as a share of what waiting for them would."""
    place, leaves = replicated(make_mesh()), 3 * 32
    shape = (mebibytes * 2**20 // 4 // leaves // 1024, 1024)

    def first() -> dict:
        groups = {name: jax.random.split(jax.random.key(i), leaves // 3) for i, name in enumerate("pmv")}
        return {
            {"p": "params", "m": "mu", "v": "nu"}[name]: {
                str(i): jax.random.normal(k, shape) for i, k in enumerate(keys)
            }
            for name, keys in groups.items()
        }

    def update(state: dict) -> dict:
        work = jnp.ones((1024, 1024), jnp.float32)
        work = jax.lax.fori_loop(0, 8, lambda _, x: jnp.tanh(x @ x), work)
        return jax.tree.map(lambda x: x * jnp.float32(0.999) + work[0, 0] * jnp.float32(1e-6), state)

    state = jax.jit(first, out_shardings=place)()
    update = jax.jit(update, donate_argnums=0, out_shardings=place)
    held: dict[str, list[float]] = {"waited for": [], "in the background": [], "none": []}
    whole: dict[str, list[float]] = {way: [] for way in held}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep_last=1)
        for i in range(rounds + 1):
            for j, way in enumerate(held):
                state = jax.block_until_ready(update(state))
                began = time.perf_counter()
                if way != "none":
                    checkpoints.save(3 * i + j + 1, state, {"step": i}, {})
                if way == "waited for":
                    checkpoints.wait()
                saved = time.perf_counter()
                for _ in range(steps):
                    state = update(state)
                    jax.block_until_ready(jax.tree.leaves(state)[0])
                checkpoints.wait()
                if i:  # the first round compiles
                    held[way].append(saved - began)
                    whole[way].append(time.perf_counter() - began)
        checkpoints.close()
    print(
        f"{mebibytes} MiB in {leaves} arrays, {rounds} rounds of {steps} steps of {min(whole['none']) / steps:.2f} s"
    )
    for way in held:
        print(f"{way:18} held up {spread(held[way], ' s')}   with its steps {spread(whole[way], ' s')}")
    blocked = sum(held["in the background"]) / sum(held["waited for"])
    longer = {way: sum(whole[way]) - sum(whole["none"]) for way in held}
    print(f"held up, as a share of waiting: {blocked:.1%}")
    print(f"longer run, as a share of waiting: {longer['in the background'] / longer['waited for']:.1%}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("guards", "saves"))
    parser.add_argument("--block", type=int, default=4, help="steps of a block of `guards`")
    parser.add_argument("--rounds", type=int, default=0, help="pairs of blocks (40), or of saves (5)")
    parser.add_argument("--mebibytes", type=int, default=512, help="of the state of `saves`")
    parser.add_argument("--steps", type=int, default=12, help="after each save of `saves`")
    args = parser.parse_args()
    if args.what == "guards":
        guards(args.block, args.rounds or 40)
    else:
        saves(args.mebibytes, args.rounds or 5, args.steps)


if __name__ == "__main__":
    sys.exit(main())
