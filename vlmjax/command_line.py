"""The recipe of a command line: --config=FILE and --config.key=value, read and checked before jax is imported."""

import os
import traceback
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from vlmjax.config import Config, check_overrides, validate
from vlmjax.errors import RecipeError, UserError


def define_config(values: flags.FlagValues) -> None:
    """Define --config."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Recipe: a python file with get_config(), e.g. configs/clip_vitl.py or configs/clip_vitl.py:tiny.",
        flag_values=values,
    )


def parse(arguments: Sequence[str], values: flags.FlagValues) -> list[str]:
    """absl's flag parsing, with a misspelt recipe key answered in one line instead of a traceback.

    Raises:
      UserError: whatever is wrong with a flag or with the recipe's file.
    """
    try:
        check_overrides(arguments[1:])
        return values(list(arguments))
    except flags.Error as error:
        raise RecipeError(_first_line(error)) from error
    except UserError:
        raise
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {_first_line(error)}") from error
    except Exception as error:  # whatever the python of a recipe file can raise
        raise RecipeError(
            f"the recipe cannot be read: {type(error).__name__}: {_first_line(error)}{_line_in_recipe(error)}"
        ) from error


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


def check_config_given(values: flags.FlagValues) -> None:
    """Raise RecipeError where --config is not given."""
    if values["config"].value is None:
        raise RecipeError("--config is not given: name a recipe, e.g. --config=configs/quickstart.py")


def checked_recipe(values: flags.FlagValues) -> Config:
    """The recipe of a parsed command line, validated.

    Raises:
      RecipeError: see vlmjax.config.validate.
    """
    check_config_given(values)
    path = config_flags.get_config_filename(values["config"]).partition(":")[0]
    if not os.path.isfile(path):  # ml_collections says so only when a value is read, and in a traceback
        raise RecipeError(
            f"--config={path}: no such file; recipes are python files, e.g. configs/quickstart.py"
        )
    return validate(values["config"].value, overrides=config_flags.get_override_values(values["config"]))
