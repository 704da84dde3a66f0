"""A recipe from a command line: --config=FILE:FORM and --config.key=value, with one line for every mistake in them."""

import argparse
import contextlib
import itertools
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from vlmjax.config import Config, check_overrides, validate
from vlmjax.errors import RecipeError, UserError

_HELP = "Recipe: a python file with get_config(), e.g. configs/clip_vitl.py or configs/clip_vitl.py:tiny."


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{message}; see {self.prog} --help")


def ended(run: Callable[[], Any]) -> None:
    """Run a command that can be started again: user errors end as one line and their exit code, Ctrl-C as another."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C: the same command goes on", file=sys.stderr, flush=True)
        sys.exit(130)


def define(values: flags.FlagValues = flags.FLAGS, **options: Any) -> None:
    """Make --config known. Its keys are those of the file it names: see `parse`."""
    config_flags.DEFINE_config_file("config", None, _HELP, flag_values=values, **options)


def parse(arguments: Sequence[str], values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """absl's flag parsing, with a misspelt recipe key answered in one line instead of a traceback.

    Returns what is no flag, the program's name first. Raises UserError.
    """
    with _in_one_line():
        check_overrides(arguments[1:])
        _check_file(arguments)
        return values(list(arguments))


def parse_alone(
    arguments: Sequence[str], values: flags.FlagValues, about: str, needed: Sequence[str], hint: str
) -> None:
    """Read the flags of a command that takes no recipe; `--help` ends the program here.

    Args:
      arguments: the program's name first.
      values: its flags.
      about: what `--help` begins with.
      needed: names of those that must be given.
      hint: what to do instead of an argument that is no flag.

    Raises:
      UserError: a flag that is unknown, wrong or missing, or something else.
    """
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in arguments[1:]):
        print(about + values.get_help().partition(":")[2])
        sys.exit(0)
    try:
        rest = values(list(arguments))
    except flags.Error as error:
        raise UserError(_first_line(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: {hint}")
    for name in needed:
        if not values[name].value:
            raise UserError(f"--{name} is not given: {values[name].help}")


def read(arguments: Sequence[str], default: Callable[[], Config]) -> Config:
    """The recipe of --config=... and --config.key=value alone; without --config they change the default one.

    Raises:
        RecipeError: one that cannot be.
    """
    values, whole = flags.FlagValues(), ["", *arguments]
    with _in_one_line():
        check_overrides(arguments)
        _check_file(arguments)
        if any(argument.startswith("--config=") for argument in arguments):
            define(values, sys_argv=whole)
        else:
            config_flags.DEFINE_config_dict("config", default(), flag_values=values, sys_argv=whole)
    parse(whole, values)
    return checked_recipe(values)


def _check_file(arguments: Sequence[str]) -> None:
    """Raise RecipeError where there is no recipe file: ml_collections says so late, and in many lines."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, equals, path = argument.partition("=")
        path = (path if equals else following).partition(":")[0]
        if name in ("--config", "-config") and not os.path.isfile(path):
            raise RecipeError(
                f"--config={path}: no such file; recipes are python files, e.g. configs/quickstart.py"
            )


@contextlib.contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except flags.Error as error:
        raise RecipeError(_first_line(error)) from error
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


def checked_recipe(values: flags.FlagValues = flags.FLAGS) -> Config:
    """The recipe that was parsed, validated and locked. Raises RecipeError."""
    flag = values["config"]
    if flag.value is None:
        raise RecipeError("--config is not given: name a recipe, e.g. --config=configs/quickstart.py")
    return validate(flag.value, overrides=config_flags.get_override_values(flag))
