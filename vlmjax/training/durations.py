"""The lengths of a run in optimizer steps: its end, warm-up, and when evaluation and checkpoints are due."""

from collections.abc import Sized
from typing import Any

from vlmjax.config import steps_of
from vlmjax.errors import RecipeError


class Durations:
    """A recipe's durations resolved against its source: epochs need to know how many records there are."""

    def __init__(self, recipe: Any, source: Sized):
        """Resolve every duration of `recipe`; of `source` only its length is asked.

        Raises:
          RecipeError: a batch larger than the data.
        """
        self.epoch = len(source)
        if self.epoch < recipe.batch_size:
            raise RecipeError(
                f"config.data.train={recipe.data.train!r} holds {self.epoch} records, fewer than one batch "
                f"(config.batch_size={recipe.batch_size}): lower the batch size or add data"
            )

        def steps(value):
            return steps_of(value, recipe.batch_size, self.epoch)

        self.total = steps(recipe.total)
        self.warmup = steps(recipe.optimizer.warmup) or 0
        self.cooldown = steps(recipe.optimizer.cooldown) or 0
        self.every = {
            "eval": steps(recipe.eval_every),
            "report": steps(recipe.report_every),
            "checkpoint": steps(recipe.checkpoint.every),
        }

    def due(self, event: str, step: int) -> bool:
        """Whether `eval`, `report` or `checkpoint` happens after `step` updates, the end of the run not counted."""
        every = self.every[event]
        return bool(every) and step % every == 0
