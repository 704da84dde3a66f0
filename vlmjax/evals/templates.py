"""Prompt templates: small built-in sets, files of one's own, and how a class name is put into one."""

import os
from collections.abc import Sequence

from vlmjax.errors import DataError

TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": (
        "a photo of a {}.",
        "a picture that shows a {}.",
        "a {} seen from close by.",
        "a {} in the distance.",
        "one {} and nothing else.",
        "a dim, grainy shot of a {}.",
        "several views of the {}.",
    ),
    "drawing": (
        "a drawing of a {}.",
        "a simple picture of a {}.",
        "a {} in bright colours.",
    ),
}


def load_templates(spec: str | Sequence[str]) -> tuple[str, ...]:
    """The templates that `spec` stands for.

    Args:
        spec: name of a built-in set (`plain`, `photo`, `drawing`), a file with one template per line (empty
            lines and lines starting with `#` are left out), one template, or a sequence of templates. Each
            holds `{}` exactly once, where the class name goes.

    Raises:
        DataError: no such set or file, no template in it, or a template without exactly one `{}`.
    """
    if not isinstance(spec, str):
        templates, where = tuple(spec), "templates"
    elif spec in TEMPLATES:
        return TEMPLATES[spec]
    elif os.path.isfile(spec):
        with open(spec, encoding="utf-8-sig") as file:
            lines = (line.strip() for line in file)
            templates, where = tuple(line for line in lines if line and not line.startswith("#")), spec
    elif "{}" in spec:
        templates, where = (spec,), "templates"
    else:
        raise DataError(
            f"templates={spec!r}: expected one of {', '.join(TEMPLATES)}, a file, or a text with '{{}}'"
        )
    if not templates:
        raise DataError(f"{where}: holds no template; write one per line, such as 'a photo of a {{}}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise DataError(
                f"{where}: template {template!r} must hold '{{}}' exactly once, where the class name goes"
            )
    return templates


def fill(template: str, name: str) -> str:
    """The template with the class name in place of its `{}` (braces inside the name stay as they are)."""
    return template.replace("{}", name)
