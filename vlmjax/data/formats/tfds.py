"""TFDS datasets without TensorFlow: `tfds:NAME[:SPLIT]` or a folder that TFDS wrote, images left encoded."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from vlmjax.data.formats import rows
from vlmjax.data.formats.arrayrecord import ArrayRecordSource
from vlmjax.data.formats.tfrecord import TFRecordSource
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError

PREFIX = "tfds:"
# A split is a word, perhaps sliced; what follows the last colon otherwise is a version, as in coco:1.1.0.
_SPEC = re.compile(r"^(?P<name>.+?)(?::(?P<split>[A-Za-z_]\w*(?:\[[^\]]*\])?(?:\+\w+(?:\[[^\]]*\])?)*))?$")


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError("TFDS data need tensorflow_datasets: pip install tensorflow-datasets") from error
    return tensorflow_datasets


def is_dataset(folder: str) -> bool:
    """True for the folder of one version of a dataset, as TFDS writes it."""
    return all(os.path.isfile(os.path.join(folder, name)) for name in ("dataset_info.json", "features.json"))


def open_tfds(spec: str, **options: Any) -> "TfdsSource | TFRecordSource | ArrayRecordSource":
    """`tfds:NAME[:SPLIT]`, `tfds:FOLDER[:SPLIT]` or the folder alone; the split is "train" or the only one.

    Datasets kept as TFRecord are read through an index of offsets; slices of them are not possible.

    Args:
        spec: NAME may have a configuration and a version, `coco_captions/2014:1.1.0`; it is looked for where TFDS
            keeps its data ($TFDS_DATA_DIR, else ~/tensorflow_datasets). Nothing is downloaded.
        options: image_column, caption_columns, root, name, cache.

    Raises:
        DataError: not prepared, no such split, or features without an image and captions.
    """
    match = _SPEC.match(spec.removeprefix(PREFIX))
    if match is None:
        raise DataError(f"{spec!r}: expected tfds:NAME or tfds:NAME:SPLIT")
    name, split = match["name"], match["split"]
    builder = _builder(spec, name)
    splits = sorted(builder.info.splits)
    split = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
    if not split:
        raise DataError(f"{spec}: holds {', '.join(splits) or 'no split'}; name one, as {PREFIX}{name}:SPLIT")
    if re.match(r"\w+", split)[0] not in splits:
        raise DataError(f"{spec}: there is no split {split}; it holds {', '.join(splits)}")
    if str(builder.info.file_format.value) == "tfrecord":
        if split not in splits:
            raise DataError(
                f"{spec}: kept as TFRecord, of which only whole splits can be read ({', '.join(splits)})"
            )
        paths = [str(path) for path in builder.info.splits[split].filepaths]
        return TFRecordSource(paths, **{"name": spec} | options)
    return TfdsSource(builder, split, **{"name": spec} | options)


def _builder(spec: str, name: str) -> Any:
    package = _tfds()
    try:
        if os.path.isdir(os.path.expanduser(name)):
            return package.builder_from_directory(os.path.expanduser(name))
        with _quiet():
            builder = package.builder(name, try_gcs=False)
    except Exception as error:  # TFDS has its own errors, and those of what it imports
        first = str(error).strip().split("\n")[0]
        raise DataError(f"{spec}: TFDS cannot open it: {type(error).__name__}: {first}") from error
    if not builder.info.splits:
        raise DataError(
            f"{spec}: not prepared in {builder.data_dir}; prepare it with file_format='array_record' first "
            "(see vlmjax/data/formats/tfds_coco.py)"
        )
    return builder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS logs a traceback for each dataset module that it cannot import; the error itself says enough."""
    import logging

    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


class TfdsSource:
    """One split of a dataset through `as_data_source`: `source[i] -> Record`, the image as it was encoded."""

    def __init__(
        self,
        builder: Any,
        split: str,
        *,
        image_column: str | None = None,
        caption_columns: Sequence[str] | str | None = None,
        root: str | None = None,
        name: str = "",
        cache: str | None = None,
    ):
        """Find the image and the captions among the features; captions may be nested, as COCO's are.

        Raises:
            DataError: no examples, or features without an image and captions.
        """
        package = _tfds()
        self.name = name or f"{PREFIX}{builder.info.full_name}:{split}"
        images = [n for n, kind in builder.info.features.items() if isinstance(kind, package.features.Image)]
        decoders = {feature: package.decode.SkipDecoding() for feature in images}
        try:
            self._source = builder.as_data_source(split=split, decoders=decoders)
            first = self._row(0) if len(self._source) else {}
        except Exception as error:  # files missing or damaged, in whatever words
            raise DataError(f"{self.name}: cannot be read: {type(error).__name__}: {error}") from error
        if not first:
            raise DataError(f"{self.name} has no examples")
        self._load = rows.Loader(root or str(builder.data_dir), cache)
        chosen = image_column or (images[0] if images else None)
        self._layout = rows.find_layout(
            self.name, first, image_column=chosen, caption_columns=caption_columns
        )
        facts = {n: [s.num_examples, s.num_bytes] for n, s in sorted(builder.info.splits.items())}
        told = json.dumps([builder.info.full_name, split, facts])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of examples."""
        return len(self._source)

    def _row(self, i: int) -> dict[str, Any]:
        return {name: _plain(value) for name, value in self._source[i].items()}

    def __getitem__(self, i: int) -> Record:
        """Example i. Raises BadRecord."""
        if not 0 <= i < len(self):
            raise IndexError(f"{self.name}: no example {i}, there are {len(self)}")
        key = f"{self.name}:{i}"
        try:
            row = self._row(i)
        except Exception as error:  # whatever the reader of the file format raises for damage
            raise BadRecord("unreadable_shard", key, f"{type(error).__name__}: {error}") from error
        named = row.get(self._layout.key) if self._layout.key else None
        return rows.record(
            row, str(named) if isinstance(named, (str, int)) else key, self._layout, self._load
        )

    def key(self, i: int) -> str:
        """The key of example i, which has to be read for it."""
        return self[i].key


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, text as str where it is text."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
