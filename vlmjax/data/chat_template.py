"""A tokenizer's own chat template (jinja, run by transformers): the same pieces that our templates give."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from vlmjax.data.conversation import Conversation, Message, Segment, images_first, joined, rounds, written
from vlmjax.errors import DataError

# Stand for the parts of messages while jinja runs, so that no word of theirs is taken for one of the template's. From
# Unicode's private use area: no template knows them.
_OPEN, _CLOSE = "\ue000", "\ue001"
_PLACE = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class ChatTemplate:
    """`chat(conversation) -> segments`: the template of a tokenizer as `conversation.render` gives ours.

    Jinja gives one string, in which nothing says what the model should learn. So the conversation is rendered up to
    each of the user's turns, with the prompt for an answer, and up to each answer; what is between the two is the
    answer with its stop. Every such string has to begin with the one before.
    """

    def __init__(self, apply: Callable[..., str], tokens: Sequence[str], opening: str | None = None):
        """A template that can be asked.

        Args:
            apply: `apply_chat_template` of a transformers tokenizer, or what takes the same arguments.
            tokens: contents of the tokenizer's control tokens.
            opening: of its opening token, which is left out where the template itself writes it: the tokenizer's
                own rule puts it there.
        """
        self._apply, self._tokens, self._opening = apply, tuple(tokens), opening

    def __call__(
        self, conversation: Conversation, *, system: str = "", image_first: bool = False, key: str = ""
    ) -> list[Segment]:
        """The pieces, with loss on answers and their stop.

        Args:
            conversation: turns that alternate; ending with the user, they give a prompt.
            system, image_first, key: as of `conversation.render`.

        Raises:
            BadRecord: `bad_turns`.
            DataError: the template cannot be run, drops or repeats a part, or changes earlier turns later on.
        """
        own, turns = rounds(conversation, key)
        turns = images_first(turns) if image_first else turns
        message = own or system
        parts = [Segment("text", message)] if message else []
        messages = [{"role": "system", "content": _name(0)}] if message else []
        for turn in turns:
            content = [_name(len(parts) + place) for place in range(len(turn.parts))]
            parts += [Segment(part.kind, part.text) for part in turn.parts]
            messages.append({"role": turn.role, "content": "".join(content)})
        return self._cut(messages, parts, turns)

    def _cut(self, messages: list[dict], parts: list[Segment], turns: Conversation) -> list[Segment]:
        first, done, out = len(messages) - len(turns), "", []
        for place, turn in enumerate(turns):
            prompt = turn.role == "user"
            now = self._render(messages[: first + place + 1], prompt)
            if not now.startswith(done):
                raise DataError(
                    "the tokenizer's chat template changes earlier turns when later ones come, so what each turn adds "
                    "cannot be told: choose a named one, config.data.conversation.template='v1'"
                )
            out += (
                self._answer(now[len(done) :], parts, turn)
                if not prompt
                else self._split(now[len(done) :], parts)
            )
            done = now
        self._check(done, parts)
        return self._without_opening(joined(out))

    def _render(self, messages: list[dict], prompt: bool) -> str:
        try:
            return self._apply(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # jinja's errors, and whatever a template raises by itself
            raise DataError(
                f"the tokenizer's chat template fails: {str(error)[:200]}; choose a named one, "
                "config.data.conversation.template='v1'"
            ) from error

    def _split(self, text: str, parts: list[Segment], has_loss: bool = False) -> list[Segment]:
        out: list[Segment] = []
        for place, piece in enumerate(_PLACE.split(text)):
            if place % 2:
                part = parts[int(piece)]
                out.append(part._replace(has_loss=has_loss and part.kind == "text"))
            else:
                out += written(piece, self._tokens, has_loss)
        return out

    def _answer(self, text: str, parts: list[Segment], turn: Message) -> list[Segment]:
        """Loss as far as the first control token after the answer; all of it where none comes."""
        last = text.rfind(_CLOSE) + 1
        stop = next((s for s in written(text[last:], self._tokens) if s.kind == "token"), None)
        end = text.index(stop.text, last) + len(stop.text) if stop else len(text)
        return self._split(text[:end], parts, True) + self._split(text[end:], parts)

    def _check(self, text: str, parts: list[Segment]) -> None:
        found = [int(number) for number in _PLACE.findall(text)]
        if found != list(range(len(parts))):
            raise DataError(
                f"the tokenizer's chat template writes the parts {found} of a conversation of {len(parts)}: it drops "
                "or repeats some; choose a named one, config.data.conversation.template='v1'"
            )

    def _without_opening(self, segments: list[Segment]) -> list[Segment]:
        opens = segments and segments[0].kind == "token" and segments[0].text == self._opening
        return segments[1:] if opens else segments


def _name(number: int) -> str:
    return f"{_OPEN}{number}{_CLOSE}"


def of(hf: Any, opens: bool) -> ChatTemplate | None:
    """The chat template of a transformers tokenizer, None where it has none; `opens`: it begins every text itself."""
    if not getattr(hf, "chat_template", None):
        return None
    tokens = [token.content for token in hf.added_tokens_decoder.values()]
    return ChatTemplate(hf.apply_chat_template, tokens, hf.bos_token if opens else None)
