"""What a Hugging Face class is to us: a model, its table, and its configuration in both directions."""

import difflib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub.table import Names, Row
from vlmjax.ops.activations import ACTIVATIONS

log = logging.getLogger(__name__)


class Family(NamedTuple):
    """One Hugging Face class.

    Attributes:
        architecture: name of the class in transformers.
        to_model: config.json -> linen module; raises HubError for what our model does not do.
        to_config: module -> config.json; raises HubError for what the Hugging Face class does not do.
        rows: module -> table.
        names: spellings and buffers found in files of this class.
        inputs: module -> smallest inputs that create every parameter.
        within: larger classes whose folders hold this one -> regexes of their tensors that stay behind.
        processor: the class's processor in transformers, None where there is none.
        beside: scalar parameters that training may have and the class has not, and their value where a folder has
            none (None: then there is no such parameter); config.json keeps them, as keys that transformers carries
            along unread.
        aside: module -> tensors that the class has no place for; a file of our own keeps them, see folder.EXTRA.
        copies: module -> tensors that a file may hold beside the one they must equal, as a tied head.
        constants: module -> tensors that a file holds besides, always these.
        in_memory: name of a tensor in the table -> its name in a model that transformers 5 has loaded.
    """

    architecture: str
    to_model: Callable[[Mapping[str, Any]], nn.Module]
    to_config: Callable[[Any], dict[str, Any]]
    rows: Callable[[Any], list[Row]]
    names: Names
    inputs: Callable[[Any], dict[str, Any]]
    within: Mapping[str, tuple[str, ...]]
    processor: str | None
    beside: Mapping[str, float | None] = {}
    aside: Callable[[Any], frozenset[str]] = lambda model: frozenset()
    copies: Callable[[Any], Mapping[str, str]] = lambda model: {}
    constants: Callable[[Any], Mapping[str, np.ndarray]] = lambda model: {}
    in_memory: Callable[[str], str] = lambda name: name


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the names closest to a wrong one, or all of them."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"nearest supported: {', '.join(close)}" if close else f"supported: {', '.join(sorted(known))}"


def activation(config: Mapping[str, Any], where: str) -> str:
    """Return `hidden_act` of a configuration: what the file says, never what its size suggests."""
    name = config["hidden_act"]
    if name not in ACTIVATIONS:
        raise HubError(f"{where}.hidden_act is {name!r}; {nearest(str(name), ACTIVATIONS)}")
    return name


def require(config: Mapping[str, Any], where: str, **wanted: Any) -> None:
    """Raise HubError where a switch of the configuration has another value than the one we implement."""
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise HubError(f"{where}.{key} is {config[key]!r}; only {value!r} is supported")


def only(config: Any, where: str, **wanted: Any) -> None:
    """Raise HubError where our configuration has another value than the one that a Hugging Face class can express."""
    for field, value in wanted.items():
        if getattr(config, field) != value:
            raise HubError(f"{where} has {field} {value!r} only; the model has {getattr(config, field)!r}")


def note_training_only(config: Mapping[str, Any], where: str, key: str, ours: float) -> None:
    """Say that a dropout rate will not be followed: outputs are the same, training from here differs."""
    if config[key] != ours:
        log.warning(
            "%s.%s is %s, training will use %s (outputs do not change)", where, key, config[key], ours
        )
