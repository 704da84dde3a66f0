"""Trains a tiny recipe and plans it: prints what XLA says of the step that ran, and of the step that was planned."""

import json
import re
import sys

import jax

from tests.training import tiny
from vlmjax import config
from vlmjax.planning.subject import train_subject
from vlmjax.training import compile, loop

SOURCES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
SIZES = ("argument", "output", "alias", "temp")


def described(lowered):
    """Memory and instructions of a program, without what says where in the source they come from."""
    compiled = lowered.compile()
    stats = compiled.memory_analysis()
    text = re.sub(r", metadata=\{[^}]*\}", "", compiled.as_text())
    text = "\n\n".join(part for part in text.split("\n\n") if not part.startswith(SOURCES))
    sizes = {name: getattr(stats, f"{name}_size_in_bytes") for name in SIZES}
    return {**sizes, "peak": stats.peak_memory_in_bytes, "instructions": text}


def main():
    recipe = config.validate(
        tiny.recipe(
            total__steps=2,
            micro_batches=2,
            mesh__fsdp=2,
            mesh__tensor=2,
            ema__decay=0.9,
            compilation_cache=False,
        )
    )
    compiled, ran = compile.compiled, []

    def spying(program, state, batch):
        shapes = {name: [list(x.shape), str(x.dtype)] for name, x in batch.items()}
        ran.append((program.step.lower(state, batch), shapes))
        return compiled(program, state, batch)

    loop.compiled = spying
    loop.train(recipe, sys.argv[1])
    subject = train_subject(recipe, jax.devices(), "tiny")
    batch = {name: [list(x.shape), str(x.dtype)] for name, x in subject.arguments[1].items()}
    found = {"ran": described(ran[0][0]), "planned": described(subject.step.lower(*subject.arguments))}
    print(json.dumps({**found, "batches": [ran[0][1], batch], "steps": subject.steps, "unit": subject.unit}))


if __name__ == "__main__":
    main()
