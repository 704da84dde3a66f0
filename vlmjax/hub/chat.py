"""How a model is spoken to, written for transformers: our conversation templates as the jinja that it runs."""

import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

from vlmjax.data.conversation import MARK
from vlmjax.data.conversation_templates import CLOSE, OPEN, OWN, Template, template
from vlmjax.data.form import Form
from vlmjax.errors import HubError
from vlmjax.hub.source import locate

JINJA = "chat_template.jinja"
KEY = "vlmjax_conversation"  # our own, in tokenizer_config.json: the Form, by which the folder is spoken to here

# What a message says, as one string with <image> in it. Of typed parts an image stands on a line of its own before
# text, as in the conversations that models are trained on.
_FLAT = (
    "{% macro flat(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% elif part['type'] in ('image', 'image_url') %}"
    + MARK
    + "{% if not loop.last and loop.nextitem['type'] == 'text' %}{{ '\\n' }}{% endif %}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)
_MARKS = "{{ '" + MARK + "' * said.count('" + MARK + "') }}"


def load_form(folder: str | os.PathLike[str]) -> Form | None:
    """How the model in a folder was spoken to in its training; None for a folder that was not written here.

    Raises:
        HubError: the folder is not there, or says it in words that have no meaning.
    """
    file = locate(folder) / "tokenizer_config.json"
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8")).get(KEY)
        return None if said is None else Form.from_json(said)
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise HubError(
            f"{file}: {KEY} cannot be read ({error}); remove it or save the model again"
        ) from error


def write_form(form: Form, settings: dict[str, Any], path: Path) -> None:
    """Put a form into a tokenizer's `settings`, and its jinja into a folder; a tokenizer's own is there already."""
    settings[KEY] = dataclasses.asdict(form)
    if form.template != OWN:
        settings.pop("chat_template", None)
        (path / JINJA).write_text(jinja(form), encoding="utf-8")


def jinja(form: Form) -> str:
    """A chat template that writes what `Form.prompt` does, for `apply_chat_template` of transformers.

    Messages are {"role", "content"}, their content text with `<image>` where an image stands, or typed parts.
    """
    words = template(form.template)
    system = _literal(words.before_system) + "{{ ns.system }}" + _literal(words.after_system)
    system = "{% if ns.system %}" + system + "{% endif %}"
    first = "{% if messages and messages[0]['role'] == 'system' %}"
    first += "{% set ns.system = flat(messages[0]['content']) | trim %}{% endif %}"
    return "".join(
        (
            _FLAT,
            "{% set ns = namespace(system=" + _quoted(form.system or words.system) + ", turn=0) %}",
            first + ("" if words.system_inside else system),
            "{% for message in messages %}{% set said = flat(message['content']) | trim %}",
            "{% if message['role'] == 'user' %}",
            "{% if ns.turn %}" + _literal(words.next_user) + "{% else %}" + _literal(words.first_user),
            (system if words.system_inside else "") + "{% endif %}{% set ns.turn = ns.turn + 1 %}",
            _users(words, form.image_first),
            "{% if add_generation_prompt or not loop.last %}" + _literal(words.ask) + "{% endif %}",
            "{% elif message['role'] == 'assistant' %}",
            _literal(words.before_answer) + "{{ said }}" + _literal(words.stop),
            "{% endif %}{% endfor %}",
        )
    )


def _users(words: Template, image_first: bool) -> str:
    """The user's own words by a template."""
    if not words.user_is_text:
        return _MARKS
    if not image_first:
        return "{{ said }}"
    rest = "{% set words = said | replace('" + MARK + "', '') | trim %}"
    between = "{% if words and '" + MARK + "' in said %}{{ '\\n' }}{% endif %}"
    return _MARKS + rest + between + "{{ words }}"


def _literal(text: str) -> str:
    """Text of a template as jinja that writes it; the opening and the closing token by the tokenizer's names."""
    roles = {OPEN: "bos_token", CLOSE: "eos_token"}
    pieces = re.split(f"({re.escape(OPEN)}|{re.escape(CLOSE)})", text)
    return "".join("{{ " + roles.get(piece, _quoted(piece)) + " }}" for piece in pieces if piece)


def _quoted(text: str) -> str:
    """A string of jinja, whose escapes are Python's."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
