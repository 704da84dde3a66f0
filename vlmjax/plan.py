"""`python -m vlmjax.plan --config=configs/clip_vitl.py --topology=v5e:16x16`: compile for a pod you do not have."""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlmjax import command_line
from vlmjax.config import Config
from vlmjax.config_checks import LOSS_FORMS
from vlmjax.errors import DoesNotFit, PlanError, RecipeError, UserError
from vlmjax.planning.names import Name, local_name, parse_names, prepare_environment

MOST_PAIRS = 2**36
# Flags of this command alone, so that commands can be imported side by side.
FLAGS = flags.FlagValues()
command_line.define(FLAGS)
flags.DEFINE_string(
    "topology",
    "",
    "Devices: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, 4xv5e:16x16 (four slices), h100:8x8 (hosts x GPUs), h200:8x8. "
    "Several, separated by commas, become a table.",
    flag_values=FLAGS,
)
flags.DEFINE_integer("devices", 0, "Instead: so many simulated devices of this machine.", flag_values=FLAGS)
flags.DEFINE_string("json", "", "Also write the plan to this file; a list for several.", flag_values=FLAGS)
flags.DEFINE_string(
    "hlo",
    "",
    "Also write the program that XLA scheduled, of a single topology, to this file.",
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "examples", None, "Size of the data, where it cannot be opened here.", 1, flag_values=FLAGS
)
flags.DEFINE_bool("search", False, "Find the largest batch that fits.", flag_values=FLAGS)
flags.DEFINE_bool("loss", False, "Plan InfoNCE with its gradients alone, of --batch.", flag_values=FLAGS)
flags.DEFINE_integer("batch", 32_768, "Pairs of --loss, over all devices.", 1, flag_values=FLAGS)
flags.DEFINE_integer("width", 1024, "Width of the features of --loss.", 1, flag_values=FLAGS)
flags.DEFINE_enum("form", "auto", LOSS_FORMS, "How --loss is computed.", flag_values=FLAGS)
flags.DEFINE_float(
    "kernel_utilisation",
    0.92,
    "Share of the peak that Pallas kernels, whose cycles XLA does not know, are taken to reach.",
    0.01,
    1.0,
    flag_values=FLAGS,
)


def plan(options: flags.FlagValues) -> None:
    """Plan what the flags describe, print it and write `--json`.

    Raises:
      UserError: see vlmjax/errors.py; DoesNotFit, after everything was told, where it fits nowhere.
    """
    names = _names(options)
    recipe = None if options.loss else command_line.checked_recipe(options)
    if options.hlo and len(names) > 1:
        raise PlanError("--hlo takes the program of one topology")
    _check_together(options)
    for flag in ("json", "hlo"):
        _check_writable(flag, options[flag].value)
    prepare_environment(names)
    from vlmjax.planning import report
    from vlmjax.planning.plan import make_plan
    from vlmjax.planning.search import search_subject
    from vlmjax.planning.topologies import check_installed

    for name in names:
        check_installed(name)
    batch = options.batch if recipe is None else recipe.batch_size
    _check_size(batch)
    makers = [_subject_maker(name, recipe, options) for name in names]
    # All of them first: mistakes are told before anything compiles.
    subjects = [maker(batch) for maker in makers]
    print("compiling; minutes for a large model", file=sys.stderr, flush=True)
    plans = []
    for name, maker, subject in zip(names, makers, subjects, strict=True):
        if options.search:
            plans.append(search_subject(name, maker, batch, options.kernel_utilisation))
        else:
            plans.append(make_plan(name, subject, options.kernel_utilisation))
        if len(names) == 1:
            print(report.page(plans[0]), flush=True)
    if len(names) > 1:
        print(report.table(report.COLUMNS, report.rows(plans)))
        for made in plans:
            for line in made.warnings():
                print(f"{made.name.text}: {line}")
    if options.hlo:
        _write(options.hlo, plans[0].compiled.text)
    if options.json:
        found = [made.to_json() for made in plans]
        _write(options.json, json.dumps(found[0] if len(found) == 1 else found, indent=2) + "\n")
    if all(made.compiled.fits is False for made in plans):
        raise DoesNotFit(f"does not fit {', '.join(name.text for name in names)}")


def _check_size(batch: int) -> None:
    if batch > MOST_PAIRS:
        raise PlanError(
            f"a batch of {batch}: expected at most {MOST_PAIRS}, beyond which libtpu ends the process"
        )


def _names(options: flags.FlagValues) -> list[Name]:
    names = parse_names(options.topology)
    if bool(names) == bool(options["devices"].present):
        both = "both are given: " if names else ""
        raise PlanError(f"{both}give --topology=v5e:16x16 or the like, or --devices=8 for simulated devices")
    return names or [local_name(options.devices)]


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise PlanError(f"{path}: cannot be written ({error.strerror})") from None
    print(f"wrote {path}")


def _check_together(options: flags.FlagValues) -> None:
    """Refuse flags that would be ignored, and numbers that no program has."""
    other = ("config", "examples") if options.loss else ("batch", "width", "form")
    for flag in other:
        if options[flag].present:
            meant = "a recipe, without --loss" if options.loss else "--loss, without a recipe's step"
            raise PlanError(f"--{flag} belongs to {meant}: leave one of them out")
    if options.loss and any(argument.startswith("--config.") for argument in sys.argv):
        raise PlanError("--config.key=value belongs to a recipe, without --loss: leave one of them out")
    if options.kernel_utilisation != options.kernel_utilisation:
        raise PlanError("--kernel_utilisation=nan: expected a number from 0.01 to 1")
    if options.json and os.path.realpath(options.json) == os.path.realpath(options.hlo or os.devnull):
        raise PlanError(f"--json and --hlo both name {options.json}: give each its own file")


def _check_writable(flag: str, path: str) -> None:
    """Raise PlanError for a file that cannot be written, before minutes of compiling."""
    if not path:
        return
    existed = os.path.lexists(path)
    if os.path.exists(path) and not os.path.isfile(path):
        raise PlanError(f"--{flag}={path} is no file: name one that may be written")
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise PlanError(
            f"--{flag}={path}: cannot be written ({error.strerror}); name a file you may write"
        ) from None
    if not existed:
        os.remove(path)


def _subject_maker(name: Name, recipe: Config | None, options: flags.FlagValues) -> Callable[[int], Any]:
    """The flags' subject on one set of devices, as a function of the batch size."""
    from vlmjax.planning.subject import loss_subject, train_subject
    from vlmjax.planning.topologies import open_devices

    devices = open_devices(name)

    def subject(batch: int) -> Any:
        if recipe is None:
            return loss_subject(batch, options.width, devices, options.form)
        title = f"train step of {options['config'].config_filename}"
        sized = Config({**recipe.to_dict(), "batch_size": batch})
        if sized.loss.queue:  # a queue holds whole batches
            sized.loss.queue = max(1, round(sized.loss.queue / batch)) * batch
        sized.lock()
        return train_subject(sized, devices, title, options.examples)

    return subject


def parse(arguments: Sequence[str]) -> None:
    """Read the flags before anything heavy is imported; `--help` and mistakes end the program here."""
    if any(argument in ("--help", "-help", "-h", "--helpfull") for argument in arguments[1:]):
        print(__doc__ + FLAGS.get_help().partition(":")[2])
        sys.exit(0)
    try:
        rest = command_line.parse(arguments, FLAGS)
        if len(rest) > 1:
            raise RecipeError(f"unexpected argument {rest[1]!r}: values are given as --config.key=value")
    except UserError as error:
        _stop(error)


def _stop(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def main() -> None:
    """Plan; user errors end as one line and a documented exit code."""
    try:
        plan(FLAGS)
    except UserError as error:
        logging.debug("stopped by", exc_info=True)
        _stop(error)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    parse(sys.argv)
    main()
