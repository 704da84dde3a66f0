"""The folder of one run: its small files, on a disk or in a bucket, written by one process."""

import atexit
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec

from vlmjax.errors import UserError


class Workdir:
    """Small files of a run (metrics, recipe, tokenizer, report), written locally and copied to a bucket by `sync`.

    `root` is the address the user gave. `local` is where files are really written: the same folder when it is on a
    disk; a temporary mirror when it is remote, or when this process is not the one that writes (process 0 is).
    """

    def __init__(self, root: str, *, writer: bool = True):
        """Open or create a run's folder; `writer` is False on every process but the first."""
        self.root, self.writer = str(root), writer
        self.remote = "://" in self.root
        if writer and not self.remote:
            self.local = Path(self.root).expanduser().resolve()
            _make(self.local)
        else:
            # Kept until the process ends: a tokenizer read from here is copied from here when a model is saved.
            self.local = Path(tempfile.mkdtemp(prefix="vlmjax-"))
            atexit.register(shutil.rmtree, self.local, ignore_errors=True)
            self._fetch()
        self._sent: dict[str, float] = {}

    @property
    def checkpoints(self) -> str:
        """Address of the checkpoints, which orbax writes by itself from all processes, local or remote."""
        base = self.root if self.remote else str(Path(self.root).expanduser().resolve())
        return base.rstrip("/") + "/checkpoints"

    @property
    def programs(self) -> str:
        """Address of compiled programs, which jax keeps and reads by itself."""
        return self.checkpoints.removesuffix("checkpoints") + "compiled"

    def has_checkpoints(self) -> bool:
        """Whether a run has got as far as a checkpoint here."""
        system, base = fsspec.core.url_to_fs(self.checkpoints)
        return system.isdir(base) and bool(system.ls(base, detail=False))

    def leave(self, name: str, value: Any) -> str:
        """Write a value as json at the root itself, whichever process this is; returns its address."""
        address = self.checkpoints.removesuffix("checkpoints") + name
        with fsspec.open(address, "w") as file:
            json.dump(value, file, indent=2, default=str)
        return address

    def path(self, *parts: str) -> Path:
        """Local path of a small file or folder, with its parent created."""
        path = self.local.joinpath(*parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as json through a temporary file, so that a reader never sees half of it."""
        path = self.path(name)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(value, indent=2, default=str) + "\n")
        os.replace(temporary, path)

    def sync(self) -> None:
        """Copy every changed file to the bucket; nothing to do on a disk."""
        if not (self.remote and self.writer):
            return
        system, base = fsspec.core.url_to_fs(self.root)
        for path in self.local.rglob("*"):
            name = str(path.relative_to(self.local))
            if path.is_file() and self._sent.get(name) != path.stat().st_mtime_ns:
                self._sent[name] = path.stat().st_mtime_ns
                system.makedirs(f"{base}/{name}".rsplit("/", 1)[0], exist_ok=True)
                system.put_file(str(path), f"{base}/{name}")

    def _fetch(self) -> None:
        """Bring what a resumed run reads (recipe, tokenizer, metrics) into the mirror."""
        system, base = fsspec.core.url_to_fs(self.root)
        for name in ("recipe.json", "model.json", "metrics.jsonl", "attempts.json", "tokenizer", "report"):
            if system.isdir(f"{base}/{name}"):
                for file in system.find(f"{base}/{name}"):
                    target = self.path(name, file.split(f"/{name}/")[-1])
                    system.get_file(file, str(target))
            elif system.exists(f"{base}/{name}"):
                system.get_file(f"{base}/{name}", str(self.path(name)))


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workdir={path}: cannot be created ({error.strerror}); name a folder you may write to"
        ) from None


def jsonable(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as plain numbers for a json line; NaN and infinities become strings, which json can hold."""
    out = {}
    for name, value in metrics.items():
        if hasattr(value, "item"):
            value = value.item()
        out[name] = str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return out
