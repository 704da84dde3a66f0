"""Texts in the one form in which they are compared: lower case, without punctuation."""

import string

_DELETE = str.maketrans("", "", string.punctuation)
_DELETE_BUT_COMMA = str.maketrans("", "", string.punctuation.replace(",", ""))


def canonicalize_plain(text: str) -> str:
    """Lower case, underscores and runs of white space to one blank, ASCII punctuation deleted (not `“”–`).

    The form SigLIP's text towers were trained on. Source: big_vision's `canonicalize_text`.
    """
    return _squeeze(text.replace("_", " ").translate(_DELETE))


def canonicalize_class(text: str) -> str:
    """`canonicalize_plain` of a class name, keeping the commas that separate its aliases."""
    return _squeeze(text.replace("_", " ").translate(_DELETE_BUT_COMMA))


def canonicalize_template(text: str) -> str:
    """`canonicalize_plain` of a prompt template, keeping its `{}`."""
    return _squeeze("{}".join(part.replace("_", " ").translate(_DELETE) for part in text.split("{}")))


def _squeeze(text: str) -> str:
    return " ".join(text.lower().split())
