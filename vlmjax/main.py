"""`python -m vlmjax.main --config=configs/clip_vitl.py --workdir=runs/clip`: parse a recipe, check it, train it."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from vlmjax.config import Config, check_overrides, validate
from vlmjax.errors import RecipeError, Stopped, UserError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Recipe: a python file with get_config(), e.g. configs/clip_vitl.py or configs/clip_vitl.py:tiny.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run, local or gs://. A run found there is continued."
)
_PROFILE = flags.DEFINE_bool(
    "profile", False, "Write a profiler trace of a few early steps to workdir/profile."
)


def parse(arguments: Sequence[str]) -> list[str]:
    """absl's flag parsing, with a misspelt recipe key answered in one line instead of a traceback."""
    try:
        check_overrides(arguments[1:])
        return flags.FLAGS(list(arguments))
    except flags.Error as error:
        _stop(RecipeError(_first_line(error)))
    except UserError as error:
        _stop(error)
    except OSError as error:
        _stop(RecipeError(f"the recipe cannot be read: {_first_line(error)}"))
    except Exception as error:  # whatever the python of a recipe file can raise
        _stop(
            RecipeError(
                f"the recipe cannot be read: {type(error).__name__}: {_first_line(error)}{_line_in_recipe(error)}"
            )
        )


def _first_line(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, (KeyError, AttributeError)) and error.args else error
    return " ".join(str(text).split())


def _line_in_recipe(error: BaseException) -> str:
    """Where in the recipe file an error arose, if it did arise there."""
    frames = traceback.extract_tb(error.__traceback__)
    line = next(
        (f"{f.filename}:{f.lineno}" for f in reversed(frames) if f.name in ("get_config", "<module>")), ""
    )
    return f" ({line})" if line and not line.startswith(__file__) else ""


def _stop(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def checked_recipe() -> Config:
    """The recipe of the command line, validated before jax is imported."""
    if _CONFIG.value is None:
        raise RecipeError("--config is not given: name a recipe, e.g. --config=configs/quickstart.py")
    if not _WORKDIR.value:
        raise RecipeError(
            "--workdir is not given: name the folder of the run, e.g. --workdir=runs/quickstart"
        )
    path = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
    if not os.path.isfile(path):  # ml_collections says so only when a value is read, and in a traceback
        raise RecipeError(
            f"--config={path}: no such file; recipes are python files, e.g. configs/quickstart.py"
        )
    given = config_flags.get_override_values(flags.FLAGS["config"])
    return validate(_CONFIG.value, overrides=given)


def main(arguments: Sequence[str]) -> None:
    """Train the recipe; user errors end as one line and a documented exit code."""
    try:
        if len(arguments) > 1:
            raise RecipeError(f"unexpected argument {arguments[1]!r}: values are given as --config.key=value")
        recipe = checked_recipe()
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if not flags.FLAGS["verbosity"].present:
            absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells every detail at INFO
        from vlmjax.training.loop import train

        train(recipe, _WORKDIR.value, profile=_PROFILE.value)
    except Stopped as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except UserError as error:
        logging.debug("stopped by", exc_info=True)
        _stop(error)
    except KeyboardInterrupt:
        print(
            "stopped by Ctrl-C: the same command continues from the newest checkpoint, if there is one",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
