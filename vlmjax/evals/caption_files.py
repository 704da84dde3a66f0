"""COCO's files of captions: what people wrote about images, and what a model did."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from vlmjax.errors import DataError


def read_references(path: str | os.PathLike) -> dict[Any, list[str]]:
    """Captions by image from `{"annotations": [{"image_id", "caption"}, ...]}`, in the order of the file.

    Raises:
        DataError: the file is missing or is something else.
    """
    found = _read(path)
    rows = found.get("annotations") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise DataError(f'{path}: expected {{"annotations": [{{"image_id": ..., "caption": ...}}, ...]}}')
    references = defaultdict(list)
    for _, image, caption in _captions(path, rows):
        references[image].append(caption)
    return dict(references)


def read_results(path: str | os.PathLike) -> dict[Any, str]:
    """The caption of each image from `[{"image_id", "caption"}, ...]`, in the order of the file.

    Raises:
        DataError: the file is missing, is something else, or has an image twice.
    """
    rows = _read(path)
    if not isinstance(rows, list):
        raise DataError(f'{path}: expected [{{"image_id": ..., "caption": ...}}, ...]')
    results: dict[Any, str] = {}
    for number, image, caption in _captions(path, rows):
        if image in results:
            raise DataError(
                f"{path}: entry {number} is a second caption of image {image!r}: expected one of each"
            )
        results[image] = caption
    return results


def _read(path: str | os.PathLike) -> Any:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise DataError(f"{path}: is not JSON: {error}") from None


def _captions(path: str | os.PathLike, rows: list) -> Iterator[tuple[int, Any, str]]:
    """(number, image, caption) of entries."""
    for number, row in enumerate(rows):
        for key, kinds in (("image_id", (int, str)), ("caption", (str,))):
            value = row.get(key) if isinstance(row, dict) else None
            if not isinstance(value, kinds) or isinstance(value, bool):
                wanted = " or ".join({int: "a number", str: "a text"}[kind] for kind in kinds)
                held = f"has {value!r}" if isinstance(row, dict) and key in row else "has none"
                raise DataError(f"{path}: entry {number}: its {key} should be {wanted}, it {held}")
        yield number, row["image_id"], row["caption"]
    if not rows:
        raise DataError(f"{path}: has no captions")
