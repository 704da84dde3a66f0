"""Text from a model: `generate` (greedy, sampling, beams), `stream` token by token, `rank` given answers.

Importing this room does not load jax; the first call does.
"""

from collections.abc import Callable
from typing import Any

__all__ = ["generate", "rank", "stream"]


def __getattr__(name: str) -> Callable[..., Any]:
    """Import a public function when it is first asked for."""
    if name == "generate":
        from vlmjax.decode import generation

        return generation.generate
    if name == "stream":
        from vlmjax.decode import streaming

        return streaming.stream
    if name == "rank":
        from vlmjax.decode import ranking

        return ranking.rank
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
