"""COCO captions as a TFDS dataset, made from COCO's own files and read again without TensorFlow.

`python -m vlmjax.data.formats.tfds_coco --coco=DIR --out=DIR` expects `annotations/captions_SPLIT.json` and the
folders of images `SPLIT/` in --coco; a recipe then reads `data.train = "tfds:OUT/coco_pairs/1.0.0:train2017"`. A
builder for other data needs the same three methods.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vlmjax.data.formats import tfds
from vlmjax.errors import DataError

SPLITS = ("train2017", "val2017")


def read_captions(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(image id, {"file_name", "captions": [{"id", "text"}]}) of each image with captions, in the order of the ids.

    Raises:
        DataError: not a file of COCO captions.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in data["images"]}
        captions: dict[int, list[dict[str, Any]]] = {}
        for one in data["annotations"]:
            captions.setdefault(one["image_id"], []).append({"id": one["id"], "text": one["caption"]})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a file of COCO captions: {error!r}") from error
    for number in sorted(captions):
        if number not in names:
            raise DataError(f"{path}: captions of image {number}, which it does not list")
        yield number, {"file_name": names[number], "captions": captions[number]}


@functools.cache
def builder_class() -> type:
    """The builder; made when asked for, so that nothing else needs the package.

    Raises:
        DataError: tensorflow_datasets is not installed.
    """
    package = tfds._tfds()
    import numpy as np

    features = package.features

    class CocoPairs(package.core.GeneratorBasedBuilder):
        """Images with their captions, from a folder laid out as COCO's."""

        VERSION = package.core.Version("1.0.0")
        name = "coco_pairs"
        # Where TFDS would look for checksums and a readme; it needs importlib_resources for that without asking for it.
        code_path = None
        pkg_dir_path = pathlib.Path(__file__).parent

        def __init__(self, *, coco: pathlib.Path, splits: Sequence[str], **options: Any):
            self._coco, self._splits = coco, splits
            super().__init__(**options)

        def _info(self) -> Any:
            kinds = {
                "image": features.Image(encoding_format="jpeg"),
                "image/filename": features.Text(),
                "image/id": features.Scalar(dtype=np.int64),
                "captions": features.Sequence({"id": np.int64, "text": features.Text()}),
            }
            return package.core.DatasetInfo(builder=self, features=features.FeaturesDict(kinds))

        def _split_generators(self, download: Any) -> dict[str, Any]:
            return {split: self._generate_examples(split) for split in self._splits}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
            for number, one in read_captions(self._coco / "annotations" / f"captions_{split}.json"):
                image = self._coco / split / one["file_name"]
                if not image.is_file():
                    raise DataError(f"{image} is missing")
                row = {"image": str(image), "image/filename": one["file_name"], "image/id": number}
                yield number, row | {"captions": one["captions"]}

    return CocoPairs


def prepare(coco: str, out: str, splits: Sequence[str] = ()) -> str:
    """Write the dataset as ArrayRecord; returns its folder. `splits` empty: those that `coco` holds.

    Raises:
        DataError: no captions there, images missing, or tensorflow_datasets is not installed.
    """
    root = pathlib.Path(coco)
    found = [
        split for split in splits or SPLITS if (root / "annotations" / f"captions_{split}.json").is_file()
    ]
    missing = sorted(set(splits) - set(found))
    if missing or not found:
        raise DataError(f"{root}/annotations has no captions_{(missing or SPLITS)[0]}.json")
    builder = builder_class()(coco=root, splits=found, data_dir=out, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m vlmjax.data.formats.tfds_coco", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--coco", required=True, help="folder with annotations/captions_*.json and the images"
    )
    parser.add_argument("--out", required=True, help="data folder of TFDS, where the dataset is put")
    parser.add_argument(
        "--splits", nargs="*", default=[], help=f"default: {' '.join(SPLITS)} where they are there"
    )
    arguments = parser.parse_args(argv)
    try:
        print(prepare(arguments.coco, arguments.out, arguments.splits))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
