"""`python -m vlmjax.main --config=configs/clip_vitl.py --workdir=runs/clip`: parse a recipe, check it, train it."""

import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging

from vlmjax import command_line
from vlmjax.errors import RecipeError, Stopped, UserError

_BEGAN = time.monotonic()
_TOGETHER = (0, 42, 77, 78)  # with these all processes of a run end at the same point

command_line.define()
flags.declare_key_flag("config")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, local or gs://. A run found there is continued."
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Write a profiler trace of a few early steps to workdir/profile."
)


def parse(arguments: Sequence[str]) -> list[str]:
    """absl's flag parsing; what is wrong with the recipe ends as one line."""
    try:
        return command_line.parse(arguments)
    except UserError as error:
        _stop(error)


def _stop(error: UserError) -> NoReturn:
    print(f"error: {error}", file=sys.stderr, flush=True)
    _exit(error.exit_code)


def _exit(code: int) -> NoReturn:
    """End the process. One of several that fails alone must not wait for the others, who wait for it."""
    if "jax" in sys.modules and code not in _TOGETHER:
        from vlmjax.sharding import peers

        if peers.several():
            peers.leave(code)
    sys.exit(code)


def main(arguments: Sequence[str]) -> None:
    """Train the recipe; user errors end as one line and a documented exit code."""
    try:
        if len(arguments) > 1:
            raise RecipeError(f"unexpected argument {arguments[1]!r}: values are given as --config.key=value")
        recipe = command_line.checked_recipe()  # before jax is imported
        if not _WORKDIR.value:
            raise RecipeError(
                "--workdir is not given: name the folder of the run, e.g. --workdir=runs/quickstart"
            )
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every detail at INFO
        from vlmjax.training.loop import train

        train(recipe, _WORKDIR.value, profile=_PROFILE.value, began=_BEGAN)
    except Stopped as error:
        print(error, file=sys.stderr, flush=True)
        _exit(error.exit_code)
    except UserError as error:
        logging.debug("stopped by", exc_info=True)
        _stop(error)
    except KeyboardInterrupt:
        print(
            "stopped by Ctrl-C: the same command continues from the newest checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )
        _exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
