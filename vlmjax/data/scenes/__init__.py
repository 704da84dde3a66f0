"""The built-in drawn world: endless seeded pictures of coloured shapes with captions, boxes and questions.

`python -m vlmjax.data.scenes --sheet=scenes.png` draws a contact sheet; docs/scenes.md explains the world.
"""

from vlmjax.data.scenes.source import (
    Object,
    Point,
    Scene,
    Scenes,
    heldout_classes,
    moved,
    open_scenes,
    scene,
    seen_classes,
)

__all__ = [
    "Object",
    "Point",
    "Scene",
    "Scenes",
    "heldout_classes",
    "moved",
    "open_scenes",
    "scene",
    "seen_classes",
]
