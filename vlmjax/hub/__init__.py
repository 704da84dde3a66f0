"""The Hugging Face format: `load` a folder or hub id (`load_model`: without weights), `save`, `load_processor`,
`save_adapter`.

`load_form`: how the model of a folder was spoken to. `load_clean`: how it read captions. `load_lavis`: a .pth file of
BLIP's own; `load_lavis_blip2`: of BLIP-2's first stage, `load_eva`: of the tower that it begins with.

Importing this room loads neither jax nor transformers; the first call does.
"""

from collections.abc import Callable
from typing import Any

__all__ = [
    "load",
    "load_clean",
    "load_eva",
    "load_form",
    "load_lavis",
    "load_lavis_blip2",
    "load_model",
    "load_processor",
    "save",
    "save_adapter",
]


def __getattr__(name: str) -> Callable[..., Any]:
    """Import a public function when it is first asked for."""
    if name in ("load", "load_model", "save"):
        from vlmjax.hub import folder

        return getattr(folder, name)
    if name == "load_lavis":
        from vlmjax.hub import lavis

        return lavis.load_lavis
    if name in ("load_eva", "load_lavis_blip2"):
        from vlmjax.hub import lavis_blip2

        return getattr(lavis_blip2, name)
    if name == "save_adapter":
        from vlmjax.hub import adapter

        return adapter.save_adapter
    if name in ("load_processor", "load_clean"):
        from vlmjax.hub import processor

        return getattr(processor, name)
    if name == "load_form":
        from vlmjax.hub import chat

        return chat.load_form
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
