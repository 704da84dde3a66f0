"""Batches of a labelled set: the same pictures as without labels, the numbers of classes, and who is left out."""

import numpy as np
import pytest
from helpers import memory, tokenizer

from vlmjax.data import augment
from vlmjax.data.labels import Classes
from vlmjax.data.pipeline import TrainData
from vlmjax.data.record import Record
from vlmjax.errors import DataError

NAMES = ("green", "red")
RECIPE = {"crop_scale": (0.4, 1.0), "flip": 0.5, "jitter": 0.3}


@pytest.fixture(name="source", scope="module")
def _source():
    """Twenty pictures with a class each; number 7 has a class that nobody knows."""
    source = memory(20)
    for i, record in enumerate(source.entries):
        source.entries[i] = Record(record.key, record.image, (NAMES[i % 2] if i != 7 else "blue",))
    return source


def take(source, words, count=4, **options):
    options = {"batch_size": 8, "seed": 3, "threads": 0, "chunk": 3, "max_bad_share": 0.5} | options
    data = TrainData(source, augment.TrainTransform((16, 12), RECIPE), words, **options)
    try:
        return [next(data) for _ in range(count)], data
    finally:
        data.close()


def test_rows_have_the_class_of_their_record(source):
    batches, data = take(source, None, kind=Classes(NAMES))
    assert {name: (value.dtype, value.shape) for name, value in batches[0].items()} == {
        "pixel_values": (np.uint8, (8, 16, 12, 3)),
        "valid": (np.bool_, (8,)),
        "key": (object, (8,)),
        "label": (np.int32, (8,)),
    }
    for step, batch in enumerate(batches):
        for row, index in enumerate(data.indices(step)):
            if index == 7:
                assert (
                    not batch["valid"][row]
                    and not batch["pixel_values"][row].any()
                    and batch["label"][row] == 0
                )
            else:
                assert batch["valid"][row] and batch["label"][row] == index % 2
    assert (
        data.skips.by_reason["no_class"] == sum(int((data.indices(step) == 7).sum()) for step in range(4)) > 0
    )


def test_pictures_are_those_of_the_same_run_with_texts(source, tmp_path):
    """A record with one caption draws nothing for it: crops and colours are the same."""
    labelled, _ = take(source, None, kind=Classes((*NAMES, "blue")))
    texts, _ = take(source, tokenizer(tmp_path, 12), captions="first")
    for one, other in zip(labelled, texts, strict=True):
        np.testing.assert_array_equal(one["pixel_values"], other["pixel_values"])
        np.testing.assert_array_equal(one["key"], other["key"])


def test_processes_make_the_same_rows(source):
    alone, _ = take(source, None, 2, kind=Classes(NAMES))
    others, _ = take(source, None, 2, kind=Classes(NAMES), threads=2, processes=1)
    for one, other in zip(alone, others, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def test_too_many_records_of_no_class_stop_the_run(source):
    with pytest.raises(DataError, match="no_class .* mend the data or raise data.max_bad_share"):
        take(source, None, 9, kind=Classes(("x", "y")), max_bad_share=0.1)


def test_there_are_no_texts_to_show(source):
    _, data = take(source, None, 1, kind=Classes(NAMES))
    with pytest.raises(DataError, match="no pairs of an image"):
        data.text(source[0], 0, 0)
