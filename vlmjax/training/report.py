"""report.html: one file that shows how a run went, made from what lies in its folder, complete or not."""

import base64
import io
import json
import logging
import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmjax.training import attempts, report_answers, report_html

PICTURE = 96  # pixels; pictures are kept as squares of this side
_log = logging.getLogger(__name__)
Folder = str | os.PathLike[str]


def save_result(workdir: Folder, result: Any, step: int = 0) -> None:
    """Keep an EvalResult for the report: its numbers, and its details where it has any.

    A later result of the same name takes its place; answers are kept beside those of earlier steps.
    """
    path = _folder(workdir) / "results.json"
    results = {row["name"]: row for row in _read_json(path, []) if isinstance(row, dict) and "name" in row}
    results[result.name] = {"name": result.name, **result.to_json()}
    _write(path, json.dumps(list(results.values()), indent=1).encode())
    details = dict(result.details)
    if not details:
        return
    if result.benchmark == "retrieval":
        pairs = details.pop("similarity")
        save_similarity(workdir, pairs["images"], pairs["captions"], pairs["similarity"])
        save_retrieval(workdir, result.name, details)
    elif result.benchmark in ("vqa", "caption"):
        save_answers(workdir, result.name, details, step)
    else:
        save_zeroshot(workdir, result.name, details)


def save_similarity(
    workdir: Folder, images: Sequence[np.ndarray], captions: Sequence[str], similarity: np.ndarray
) -> None:
    """Keep a similarity matrix as report/similarity.npz.

    Args:
        workdir: of the run.
        images: n pictures, uint8 [height, width, 3], any sizes.
        captions: n texts.
        similarity: float [n, n], cosine of image (row) and text (column).
    """
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=_squares(images),
        captions=np.array([str(c) for c in captions], dtype=np.str_),
        similarity=np.asarray(similarity, np.float32),
    )
    _write(_folder(workdir) / "similarity.npz", buffer.getvalue())


def save_retrieval(workdir: Folder, name: str, details: Mapping[str, Any]) -> None:
    """Keep example queries as report/retrieval_<name>.json with their pictures in a .npz beside it.

    Args:
        workdir: of the run.
        name: of the evaluation.
        details: `text_to_image` and `image_to_text` as `vlmjax.evals.gallery.retrieval_details` gives them.
    """
    _save_details(_folder(workdir), f"retrieval_{name}", {"name": name, **details})


def save_zeroshot(workdir: Folder, name: str, details: Mapping[str, Any]) -> None:
    """Keep a confusion table as report/zeroshot_<name>.json with its pictures in a .npz beside it.

    Args:
        workdir: of the run.
        name: of the evaluation.
        details: as `vlmjax.evals.gallery.zeroshot_details` gives them.
    """
    _save_details(_folder(workdir), f"zeroshot_{name}", {"name": name, **details})


def save_answers(workdir: Folder, name: str, details: Mapping[str, Any], step: int) -> None:
    """Keep sample answers as report/answers_<name>.json, beside those of earlier steps, pictures in a .npz.

    Args:
        workdir: of the run.
        name: of the evaluation.
        details: `samples`, `kinds` and `blind` as `vlmjax.evals.answers` gives them.
        step: of the run.
    """
    folder, stem = _folder(workdir), _stem(f"answers_{name}")
    before = _read_json(folder / f"{stem}.json", {}).get("samples")
    samples = report_answers.joined(details["samples"], before, step)
    _save_details(folder, stem, {"name": name, **details, "samples": samples})


def write_report(workdir: Folder) -> Path:
    """Write workdir/report.html from whatever the folder holds; returns its path.

    Missing and damaged files are left out (with a line in the log): a report of half a run is still a report.
    """
    root = Path(workdir)
    folder = root / "report"
    page = report_html.page(
        title=root.resolve().name,
        rows=read_metrics(root / "metrics.jsonl"),
        results=[row for row in _read_json(folder / "results.json", []) if _is_result(row)],
        similarity=_read_similarity(folder / "similarity.npz"),
        retrieval=[_read_details(path) for path in sorted(folder.glob("retrieval_*.json"))],
        answers=[_read_details(path) for path in sorted(folder.glob("answers_*.json"))],
        zeroshot=[_read_details(path) for path in sorted(folder.glob("zeroshot_*.json"))],
        recipe=_read_json(root / "recipe.json", {}),
        environment=_read_json(root / "environment.json", {}),
        attempts=attempts.read(root / "attempts.json"),
        hosts=_read_json(root / "hosts.json", {}),
    )
    path = root / "report.html"
    _write(path, page.encode("utf-8", "replace"))
    return path


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl by step; "nan" and "inf" become numbers, damaged lines are left out."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            _log.warning("%s: left out a damaged line: %.60r", path, line)
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({name: _number(value) for name, value in row.items()})
    return sorted(rows, key=lambda row: row["step"])


def _number(value: Any) -> Any:
    if isinstance(value, str) and value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return float(value)
    return math.nan if value is None else value


def _is_result(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and {"name", "benchmark", "chance"} <= set(row)
        and isinstance(row["chance"], dict)
    )


def _folder(workdir: Folder) -> Path:
    path = Path(workdir) / "report"
    path.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, data: bytes) -> None:
    """Through a temporary file, so that a reader never meets half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _read_json(path: Path, default: Any) -> Any:
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _log.warning("%s: left out of the report: %s", path, error)
        return default
    return value if isinstance(value, type(default)) else default


def _squares(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures as one uint8 array [n, side, side, 3]."""
    out = np.zeros((len(images), PICTURE, PICTURE, 3), np.uint8)
    for place, image in zip(out, images, strict=True):
        # Small drawings keep their hard pixels, photographs are smoothed.
        kind = Image.Resampling.NEAREST if max(image.shape[:2]) * 2 <= PICTURE else Image.Resampling.LANCZOS
        place[:] = np.asarray(Image.fromarray(np.asarray(image)).resize((PICTURE, PICTURE), kind))
    return out


def _stem(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _save_details(folder: Path, stem: str, details: Mapping[str, Any]) -> None:
    stem = _stem(stem)
    pictures: list[np.ndarray] = []
    value = _without_pictures(details, pictures)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pictures=_squares(pictures))
    _write(folder / f"{stem}.npz", buffer.getvalue())
    _write(folder / f"{stem}.json", json.dumps(value).encode())


def _without_pictures(value: Any, pictures: list[np.ndarray]) -> Any:
    """The value with every uint8 picture replaced by {"picture": place in `pictures`}."""
    if isinstance(value, Mapping):
        return {str(key): _without_pictures(part, pictures) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_pictures(part, pictures) for part in value]
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim == 3:
        pictures.append(value)
        return {"picture": len(pictures) - 1}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _with_pictures(value: Any, urls: Sequence[str]) -> Any:
    if isinstance(value, dict):
        return (
            urls[value["picture"]]
            if set(value) == {"picture"}
            else {k: _with_pictures(v, urls) for k, v in value.items()}
        )
    return [_with_pictures(part, urls) for part in value] if isinstance(value, list) else value


def _arrays(path: Path) -> Any:
    """An open .npz. From memory: numpy leaves the file of a damaged one open."""
    return np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)


def _read_details(path: Path) -> dict[str, Any]:
    value = _read_json(path, {})
    try:
        with _arrays(path.with_suffix(".npz")) as file:
            return _with_pictures(value, [data_url(picture) for picture in file["pictures"]])
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: left out of the report: %s", path, error)
        return {}


def _read_similarity(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with _arrays(path) as file:
            return {
                "images": [data_url(picture) for picture in file["images"]],
                "captions": [str(c) for c in file["captions"]],
                "similarity": np.asarray(file["similarity"], np.float64),
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        _log.warning("%s: left out of the report: %s", path, error)
        return {}


def data_url(pixels: np.ndarray, *, lossless: bool = False) -> str:
    """A uint8 [height, width, 3] picture as a data: address, JPEG or (lossless) PNG."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.asarray(pixels, np.uint8))
    if lossless:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=86, subsampling=0, optimize=True)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
