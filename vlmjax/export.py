"""`python -m vlmjax.export --workdir=runs/clip --out=hf`: a trained run as a Hugging Face folder."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from vlmjax.command_line import parse_alone
from vlmjax.errors import CheckpointError, UserError

# Flags of this command alone, so that commands can be imported side by side.
FLAGS = flags.FlagValues()
flags.DEFINE_string("workdir", None, "Folder of a run, local or gs://.", flag_values=FLAGS)
flags.DEFINE_string(
    "out", None, "Folder to write: config, weights, tokenizer, image processor.", flag_values=FLAGS
)
flags.DEFINE_integer("step", None, "Checkpoint to export; the newest one by default.", flag_values=FLAGS)
flags.DEFINE_bool(
    "adapter",
    False,
    "Only what a run with config.lora has trained, in PEFT's format, to be loaded beside its base model.",
    flag_values=FLAGS,
)


def load_workdir(workdir: str, *, step: int | None = None) -> tuple[Any, Any, Any, Any]:
    """Read a run's model from its newest good (or a given) checkpoint; averaged parameters where the run keeps them.

    Low-rank adapters are merged into the kernels beside which they were trained.

    Returns:
      (model, params, tokenizer, eval transform), as `vlmjax.hub.load` and `load_processor` give them for an HF folder;
      a classifier has no tokenizer.

    Raises:
      CheckpointError: where the folder is not a run, or has no checkpoint yet.
    """
    from vlmjax.data import text
    from vlmjax.models.lora import merged
    from vlmjax.training import build
    from vlmjax.training.state import merge

    folder, recipe, model, state = _read(workdir, step)
    words = getattr(model.config, "text", None)  # which a classifier has not
    tokenizer = words and text.load(str(folder.path("tokenizer")), words.max_length)
    params = merge(state["ema"] or state["params"], state["frozen"])
    params = merged(params, recipe.lora.alpha) if "lora" in params else params
    return model, params, tokenizer, build.eval_transform(recipe, model.config.image.image_shape)


def _read(workdir: str, step: int | None) -> tuple[Any, Any, Any, dict[str, Any]]:
    """(folder, recipe, model, groups of parameters) of a run."""
    from vlmjax.training import build
    from vlmjax.training.checkpoint import Checkpoints
    from vlmjax.training.frozen import whole
    from vlmjax.training.workdir import Workdir

    if "://" not in workdir and not Path(workdir).expanduser().is_dir():
        raise CheckpointError(f"{workdir}: no such folder")
    folder = Workdir(workdir, writer=False)
    recipe, model = build.read_run(folder)
    checkpoints = Checkpoints(folder.checkpoints, writable=False)
    return folder, recipe, model, whole(*checkpoints.read_params(step), recipe, model)


def run_form(workdir: str) -> Any:
    """How the model of a run is spoken to: a `data.form.Form`; None for a model that does not write."""
    from vlmjax.data.form import Form
    from vlmjax.training import build
    from vlmjax.training.workdir import Workdir

    recipe, _ = build.read_run(Workdir(workdir, writer=False))
    return Form.of_recipe(recipe) if recipe.stage == "generative" else None


def run_clean(workdir: str) -> str:
    """How a run read captions: data.clean of its recipe."""
    from vlmjax.training import build
    from vlmjax.training.workdir import Workdir

    return build.read_run(Workdir(workdir, writer=False))[0].data.clean


def export(workdir: str, out: str, *, step: int | None = None) -> None:
    """Write the model of a run as a folder that transformers loads unchanged."""
    from vlmjax import hub

    model, params, tokenizer, transform = load_workdir(workdir, step=step)
    processor = {"tokenizer": tokenizer, "image_processor": transform, "form": run_form(workdir)}
    hub.save(model, params, out, **processor, clean=run_clean(workdir))


def export_adapter(workdir: str, out: str, *, step: int | None = None) -> None:
    """Write what a run with low-rank adapters has trained, in PEFT's format, to be loaded beside its base model.

    Raises:
      CheckpointError: a run without adapters, or one whose base is no folder.
    """
    from flax import traverse_util

    from vlmjax import hub
    from vlmjax.training.state import merge

    _, recipe, model, state = _read(workdir, step)
    trained = state["ema"] or state["params"]
    if "lora" not in trained:
        raise CheckpointError(f"--adapter: {workdir} was trained without config.lora; leave --adapter out")
    if not recipe.init_from:
        raise CheckpointError(
            f"--adapter: {workdir} did not begin from one folder (its config.init_from is empty), so there is nothing "
            "to load an adapter beside; leave --adapter out for the whole model"
        )
    paths = traverse_util.flatten_dict({k: v for k, v in trained.items() if k != "lora"}, sep="/")
    hub.save_adapter(
        model,
        merge(trained, state["frozen"]),
        out,
        alpha=recipe.lora.alpha,
        base=recipe.init_from,
        trained=paths,
        dropout=recipe.lora.dropout,
    )


def parse(arguments: Sequence[str]) -> None:
    """Read the flags before anything heavy is imported; raises UserError for mistakes."""
    parse_alone(arguments, FLAGS, __doc__, ("workdir", "out"), "values are given as --out=hf")
    if "://" in FLAGS.out:
        raise UserError(f"--out={FLAGS.out}: name a folder on a disk, and copy it to the bucket from there")
    if os.path.isfile(FLAGS.out):
        raise UserError(f"--out={FLAGS.out} is a file: name a folder")


def main(arguments: Sequence[str]) -> None:
    """Export as the flags say; user errors end as one line."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        parse(arguments)
        out = os.path.expanduser(FLAGS.out)
        write = export_adapter if FLAGS.adapter else export
        write(FLAGS.workdir, out, step=FLAGS.step)
        print(f"wrote {out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main(sys.argv)
