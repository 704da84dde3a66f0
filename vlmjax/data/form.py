"""How a model is spoken to: what its training wrote around the turns, so that its answers are asked for likewise."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmjax.data import pieces
from vlmjax.data.conversation import Conversation, from_caption
from vlmjax.data.conversation_templates import OWN, Template
from vlmjax.data.pieces import Pieces

# An answer that no template writes, to see what follows it.
_ANSWER = "answer"


@dataclasses.dataclass(frozen=True)
class Form:
    """What `config.data.conversation` says, which every later prompt has to repeat.

    Attributes:
        template: of `conversation_templates`, by its name or itself, or "tokenizer" for the tokenizer's own.
        system: in place of the template's system message.
        image_first: each message's images before its text.
    """

    template: str | Template = OWN
    system: str = ""
    image_first: bool = False

    @classmethod
    def of_recipe(cls, recipe: Any) -> "Form":
        """The form of a recipe of stage "generative"."""
        said = recipe.data.conversation
        return cls(said.template, said.system, said.image_first)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Form":
        """Inverse of `dataclasses.asdict`, of a form whose template is a name."""
        return cls(str(value["template"]), str(value["system"]), bool(value["image_first"]))

    def prompt(
        self, said: Conversation, tokenizer: Pieces, *, image_tokens: int, image_token_id: int
    ) -> np.ndarray:
        """The ids of a conversation that ends with the user, see `pieces.encode_prompt`: int32 [n]."""
        return pieces.encode_prompt(
            said,
            self.template,
            tokenizer,
            image_tokens=image_tokens,
            image_token_id=image_token_id,
            system=self.system,
            image_first=self.image_first,
        )


def ends_of(template: str | Template, tokenizer: Pieces) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """What ends an answer: tokens any of which does, and texts at the first of which it is cut.

    Args:
        template: a name or a Template, as `pieces.rendered` takes it.
        tokenizer: of the model.
    """
    said = pieces.rendered(from_caption(_ANSWER, "question", 0), template, tokenizer)
    learned = [segment for segment in tokenizer.readable(said) if segment.has_loss]
    control = next((tokenizer.token(one) for one in learned if one.kind != "text"), None)
    stop = "".join(one.text for one in learned if one.kind == "text").rpartition(_ANSWER)[2]
    tokens = [tokenizer.eos_token_id, control]
    if stop.strip(" ") and control is None:
        ids = tokenizer.encode(stop, "inside")
        tokens += ids if len(ids) == 1 else []
    texts = (stop.strip() or stop,) if stop.strip(" ") else ()
    return tuple(dict.fromkeys(one for one in tokens if one is not None)), texts


def cut(answer: str, stops: Sequence[str]) -> str:
    """An answer up to the first text that ends it."""
    places = [place for place in (answer.find(stop) for stop in stops) if place >= 0]
    return answer[: min(places, default=len(answer))].strip()
