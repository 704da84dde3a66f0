"""`python -m vlmjax.export --workdir=runs/clip --out=hf`: a trained run as a Hugging Face folder."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from vlmjax.errors import CheckpointError, UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run, local or gs://.")
_OUT = flags.DEFINE_string("out", None, "Folder to write: config, weights, tokenizer, image processor.")
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to export; the newest one by default.")


def load_workdir(workdir: str, *, step: int | None = None) -> tuple[Any, Any, Any, Any]:
    """Read a run's model from its newest (or a given) checkpoint; averaged parameters where the run keeps them.

    Returns:
      (model, params, tokenizer, eval transform), as `vlmjax.hub.load` and `load_processor` give them for an HF folder.

    Raises:
      CheckpointError: where the folder is not a run, or has no checkpoint yet.
    """
    from vlmjax.config import Config
    from vlmjax.data import text
    from vlmjax.training import build
    from vlmjax.training.checkpoint import Checkpoints
    from vlmjax.training.state import merge
    from vlmjax.training.workdir import Workdir

    if "://" not in workdir and not Path(workdir).is_dir():
        raise CheckpointError(f"{workdir}: no such folder")
    folder = Workdir(workdir, writer=False)
    for name in ("recipe.json", "model.json"):
        if not folder.path(name).exists():
            raise CheckpointError(f"{workdir}: not the folder of a run (it lacks {name})")
    recipe = Config(build.read_json(folder.path("recipe.json")))
    model = build.model_from_json(build.read_json(folder.path("model.json")))
    tokenizer = text.load(str(folder.path("tokenizer")), model.config.text.max_length)
    checkpoints = Checkpoints(folder.checkpoints, writable=False)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise CheckpointError(f"{workdir}: no complete checkpoint yet")
    state = checkpoints.read(step)
    checkpoints.close()
    params = merge(state["ema"] or state["params"], state["frozen"])
    return model, params, tokenizer, build.eval_transform(recipe, model.config.image.image_shape)


def export(workdir: str, out: str, *, step: int | None = None) -> None:
    """Write the model of a run as a folder that transformers loads unchanged."""
    from vlmjax import hub

    model, params, tokenizer, transform = load_workdir(workdir, step=step)
    hub.save(model, params, out, tokenizer=tokenizer, image_processor=transform)


def main(arguments: Sequence[str]) -> None:
    """Export as the flags say; user errors end as one line."""
    try:
        if len(arguments) > 1:
            raise UserError(f"unexpected argument {arguments[1]!r}")
        for flag in (_WORKDIR, _OUT):
            if not flag.value:
                raise UserError(f"--{flag.name} is not given: {flag.help}")
        export(_WORKDIR.value, _OUT.value, step=_STEP.value)
        print(f"wrote {_OUT.value}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    app.run(main)
