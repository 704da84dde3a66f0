"""`python -m vlmjax.checkpoint verify runs/clip`: look at a run's checkpoints, compare and average them.

  list RUN                    what each checkpoint is, and those that were put aside as damaged
  verify RUN[:STEP]           read everything and compare every digest; exit code 1 where something is damaged
  diff RUN[:STEP] RUN[:STEP]  the parameters that differ, and by how much
  average RUN --out=FOLDER    the mean of checkpoints, as a folder for vlmjax.export (--steps=8,16 or --last=3)

RUN is the --workdir of a run; STEP is the newest one by default.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from vlmjax.command_line import Parser
from vlmjax.errors import UserError


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        "python -m vlmjax.checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{list,verify,diff,average}")
    commands.add_parser("list").add_argument("run")
    commands.add_parser("verify").add_argument("run")
    diff = commands.add_parser("diff")
    diff.add_argument("first")
    diff.add_argument("second")
    average = commands.add_parser("average")
    average.add_argument("run")
    average.add_argument("--out", required=True, help="Folder to write; its checkpoint holds the mean.")
    average.add_argument("--steps", default="", help="Which to average, e.g. 8,16; all of them by default.")
    average.add_argument("--last", type=int, default=0, help="Average so many of the newest instead.")
    return parser


def split(address: str) -> tuple[str, int | None]:
    """(run, step) of RUN[:STEP]; the colon of gs:// is none of these."""
    found = re.fullmatch(r"(.+):(\d+)", address)
    return (found[1], int(found[2])) if found else (address, None)


def run(options: Any) -> int:
    """Do what the command line says; returns the exit code."""
    from vlmjax.training import inspecting

    if options.command == "diff":
        sides = [split(address) for address in (options.first, options.second)]
        runs = [(inspecting.open_run(workdir), step) for workdir, step in sides]
        first, second = ((opened, inspecting.chosen(opened, step)) for opened, step in runs)
        lines = list(inspecting.difference(first, second))
        print("\n".join([*lines, f"{len(lines) or 'no'} parameters differ"]))
        return 0
    workdir, step = split(options.run)
    opened = inspecting.open_run(workdir)
    if options.command == "average":
        steps = _steps(options, opened.steps)
        for number in steps:
            inspecting.chosen(opened, number)
        number = inspecting.average(opened, steps, options.out)
        print(f"wrote {options.out}: checkpoint {number} is the mean of {', '.join(map(str, steps))}")
        return 0
    if options.command == "list":
        print("\n".join(inspecting.listing(opened)))
        return 0
    good, steps = [], opened.steps if step is None else [inspecting.chosen(opened, step)]
    for step in steps:
        fine, words = inspecting.verdict(opened, step)
        good += [step] * fine
        print(f"step {step:<10} {words}", flush=True)
    print(f"newest good checkpoint: {max(good, default='none')}")
    return 0 if len(good) == len(steps) else 1


def _steps(options: Any, there: Sequence[int]) -> list[int]:
    """The checkpoints to average."""
    if options.steps and options.last:
        raise UserError("--steps and --last exclude each other: name the checkpoints, or count them")
    if options.last < 0 or options.last > len(there):
        raise UserError(f"--last={options.last}: there are {len(there)} checkpoints")
    if not re.fullmatch(r"(\d+(,\d+)*)?", options.steps):
        raise UserError(f"--steps={options.steps}: expected numbers of checkpoints such as 8,16")
    return sorted(
        {int(step) for step in options.steps.split(",")} if options.steps else there[-options.last :]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run; user errors end as one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        code = run(make_parser().parse_args(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(code)


if __name__ == "__main__":
    main()
