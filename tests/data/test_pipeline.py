"""The pipeline: order, resume, hosts, threads, bad records, and evaluation's one pass."""

import json
import logging

import numpy as np
import pytest
from helpers import Memory, caption, encoded, memory, picture, tokenizer

from vlmjax.data import augment, images, loader, plan
from vlmjax.data.examples import caption_id
from vlmjax.data.pipeline import TrainData
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError

RECIPE = {"crop_scale": (0.4, 1.0), "flip": 0.5, "jitter": 0.3}


@pytest.fixture(name="words", scope="module")
def _words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), 12)


def _broken(count: int = 50) -> Memory:
    """Several captions each, and 3 in 25 records broken in different ways."""
    source = memory(count, captions=3)
    jpeg = encoded(picture(0, 60, 60), "JPEG")
    for i in range(0, count, 25):
        source.entries[i + 3] = Record(f"k{i + 3}", jpeg[: len(jpeg) // 2], ("cut",))
        source.entries[i + 7] = Record(f"k{i + 7}", b"<html>404</html>", ("page",))
        source.entries[i + 11] = Record(f"k{i + 11}", b"", ("nothing",))
    return source


def _train(source, words, **options) -> TrainData:
    options = {"batch_size": 8, "seed": 3, "threads": 0, "chunk": 3, "max_bad_share": 0.5} | options
    return TrainData(source, augment.TrainTransform((16, 12), RECIPE), words, **options)


def _take(data: TrainData, count: int) -> list[dict[str, np.ndarray]]:
    try:
        return [next(data) for _ in range(count)]
    finally:
        data.close()


def _same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_batches_are_what_the_plan_says(words):
    """A slow, plain retelling of the rule gives the same bytes."""
    source, n = memory(20, captions=2), 20
    transform = augment.TrainTransform((16, 12), RECIPE)
    batches = _take(_train(source, words), 6)
    for step, batch in enumerate(batches):
        for row in range(8):
            g = step * 8 + row
            index = int(plan.permutation(3, g // n, n)[g % n])
            rng = plan.example_rng(3, g)
            record = source[index]
            text = record.captions[int(rng.integers(2))]
            np.testing.assert_array_equal(
                batch["pixel_values"][row], transform(images.decode(record.image), rng)
            )
            np.testing.assert_array_equal(batch["input_ids"][row], words([text])["input_ids"][0])
            np.testing.assert_array_equal(batch["attention_mask"][row], words([text])["attention_mask"][0])
            assert batch["caption_id"][row] == caption_id(text) and batch["key"][row] == f"k{index}"
        assert batch["valid"].all()
    kinds = {name: (value.dtype, value.shape) for name, value in batches[0].items()}
    assert kinds == {
        "pixel_values": (np.uint8, (8, 16, 12, 3)), "input_ids": (np.int32, (8, 12)), "valid": (bool, (8,)),
        "attention_mask": (np.int32, (8, 12)), "caption_id": (np.uint32, (8,)), "key": (object, (8,)),
    }  # fmt: skip


def test_each_epoch_shows_every_example_once(words):
    data = _train(memory(20), words)
    keys = [key for batch in _take(data, 10) for key in batch["key"]]
    epochs = [keys[at : at + 20] for at in range(0, 80, 20)]
    assert all(sorted(epoch) == sorted(f"k{i}" for i in range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert data.step == 10


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_threads_and_chunks_change_nothing(words, hosts, threads):
    expected = _take(_train(_broken(), words, chunk=32), 8)
    for host in range(hosts):
        rows = range(host * 8 // hosts, (host + 1) * 8 // hosts)
        got = _take(_train(_broken(), words, rows=rows, threads=threads), 8)
        for one, whole in zip(got, expected, strict=True):
            _same(one, {name: value[rows.start : rows.stop] for name, value in whole.items()})


@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact(words, threads):
    source = _broken()
    expected = _take(_train(source, words), 13)
    first = _train(source, words, threads=threads)
    for step in range(5):
        _same(next(first), expected[step])
    state = json.loads(json.dumps(first.state))
    first.close()
    assert state["step"] == 5 and len(json.dumps(state)) < 1000
    second = _train(source, words, threads=threads)
    next(second)
    second.restore(state)
    for step in range(5, 13):
        _same(next(second), expected[step])
    second.close()
    _same(_take(_train(source, words, threads=threads, start_step=11), 1)[0], expected[11])
    _same(next(first), expected[5])
    first.close()


def test_starting_late_reads_nothing_of_the_past(words):
    source = memory(20)
    read = []

    class Watched(Memory):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    _take(_train(Watched(source.entries), words, start_step=10**9), 1)
    assert len(read) == 8


def test_restore_refuses_other_data(words):
    state = _train(memory(20), words).state
    for changed in ({"seed": 4}, {"batch_size": 4}):
        with pytest.raises(DataError, match=next(iter(changed))):
            _train(memory(20), words, **changed).restore(state)
    with pytest.raises(
        DataError, match=r"memory \(20 examples\) is gone, memory \(21 examples\) is new.*accept_new_mixture"
    ):
        _train(memory(21), words).restore(state)


def test_an_accepted_mixture_goes_on_where_its_sources_were(words):
    """A second source from step 5 on: the first one's epoch is finished, without a repetition."""

    def train(sources, shares):
        options = {"batch_size": 8, "shares": shares, "seed": 3, "threads": 0}
        return TrainData(sources, augment.TrainTransform((16, 12), RECIPE), words, **options)

    first, other = memory(70), memory(30)
    other.entries = [Record(f"other{i}", one.image, one.captions) for i, one in enumerate(other.entries)]
    before = train([first], (1.0,))
    keys = [key for _ in range(5) for key in next(before)["key"]]
    state = json.loads(json.dumps(before.state))
    before.close()
    after = train([first, other], (0.5, 0.5))
    with pytest.raises(DataError, match=r"memory \(30 examples\) is new.*share of memory was 1 and is 0.5"):
        after.restore(state)
    after.restore(state, accept=True)
    assert after.step == 5 and after.state["mixture"]["version"] == 2
    middle = _take(after, 2)
    resumed = train([first, other], (0.5, 0.5))
    resumed.restore(json.loads(json.dumps(after.state)))
    assert resumed.state == after.state and resumed.mixture.version == 2
    rest = [key for batch in [*middle, *_take(resumed, 10)] for key in batch["key"]]
    of_first = [key for key in keys + rest if not key.startswith("other")]
    assert sorted(of_first[:70]) == sorted(f"k{i}" for i in range(70))
    assert abs(sum(key.startswith("other") for key in rest) - 48) < 20


def test_bad_records_leave_marked_rows(words, caplog):
    data = _train(_broken(), words)
    with caplog.at_level(logging.WARNING):
        batches = _take(data, 25)  # 4 epochs of 50
    bad = {
        key for batch in batches for key, valid in zip(batch["key"], batch["valid"], strict=True) if not valid
    }
    assert bad == {f"k{i + j}" for i in (0, 25) for j in (3, 7, 11)}
    assert data.skips.by_reason == {"truncated": 8, "not_an_image": 8, "empty": 8} and data.skips.seen == 200
    empty = words([""])
    for batch in batches:
        for row in np.flatnonzero(~batch["valid"]):
            assert not batch["pixel_values"][row].any() and batch["caption_id"][row] == 0
            np.testing.assert_array_equal(batch["input_ids"][row], empty["input_ids"][0])
            assert batch["attention_mask"][row].sum() == 2
    lines = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert len(lines) == len(set(lines)) == 3 * 2 and any("k3: truncated" in line for line in lines)


def test_the_log_shows_the_first_of_a_reason_then_one_line_per_interval(caplog):
    counter = loader.SkipCounter("x.tar", 1.0)
    for start in (0, 0, 5):
        counter.add(50, [loader.Failure("truncated", f"k{start + i}", "cut", "x.tar") for i in range(5)])
    counter.add(50, [loader.Failure("empty", "e", "", "x.tar")])
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[0] for line in lines] == ["skipped k0", "skipped k1", "skipped k2", "skipped e"]
    assert "only counted" in lines[2] and "only counted" not in lines[1]
    caplog.clear()
    counter.report()
    counter.report()
    assert caplog.messages == ["skipped more: truncated 12; 16 of 200 records so far"]
    assert counter.by_reason == {"truncated": 15, "empty": 1}


def test_every_failure_is_a_counted_row(words):
    source = memory(16)
    source.entries[2] = BadRecord("bad_json", "k2", "unexpected end")
    source.entries[5] = Record("k5", source.entries[5].image, ())
    bomb = images.decode(source.entries[0].image).shape
    data = _train(source, words, max_pixels=bomb[0] * bomb[1])
    source.entries[9] = Record("k9", encoded(picture(1, 30, 30)), ("large",))

    class Faulty(Memory):
        def __getitem__(self, i):
            if i == 12:
                raise ZeroDivisionError("a mistake in a source")
            return super().__getitem__(i)

    data._examples.source = Faulty(source.entries)
    _take(data, 2)
    assert data.skips.by_reason == {"bad_json": 1, "no_caption": 1, "bomb": 1, "error_ZeroDivisionError": 1}


def test_too_many_bad_records_stop_the_run(words):
    data = _train(_broken(1000), words, max_bad_share=0.05, batch_size=100)
    with pytest.raises(
        DataError, match=r"unusable \(.*truncated \d+.*more than the 5\.0% allowed.*max_bad_share"
    ):
        _take(data, 10)
    assert data.skips.seen == 400
    _take(_train(_broken(1000), words, max_bad_share=0.1, batch_size=100), 10)
    nothing = Memory([Record(f"k{i}", b"<html>", ("x",)) for i in range(20)])
    with pytest.raises(DataError, match="8 of 8 records are unusable"):
        _take(_train(nothing, words), 1)


def test_settings_are_checked(words):
    with pytest.raises(DataError, match="memory has 5 examples, fewer than one batch of 8"):
        _train(memory(5), words)
    with pytest.raises(DataError, match="captions='last'"):
        _train(memory(8), words, captions="last")


def test_captions(words):
    source = memory(8, captions=3)
    drawn = [_take(_train(source, words), 30), _take(_train(source, words, captions="first"), 30)]
    texts = [np.concatenate([batch["caption_id"] for batch in batches]) for batches in drawn]
    every = [caption_id(c) for i in range(8) for c in source[i].captions]
    assert set(texts[0].tolist()) == set(every) and set(texts[1].tolist()) == set(every[::3])
    counts = np.array([(texts[0] == one).sum() for one in every])
    assert counts.min() >= 3, "each of 3 captions in 30 epochs about 10 times"


def test_templates_and_texts_that_are_cut(words):
    """The template's text is read by the model; equal captions stay positives whatever the sentence around them."""
    templates = ("a small {caption}", "{caption} " * 20)
    data = _train(memory(8), words, templates=templates)
    plain = _take(_train(memory(8), words), 6)
    cut = 0
    for one, other in zip(_take(data, 6), plain, strict=True):
        assert one["key"].tolist() == other["key"].tolist()
        np.testing.assert_array_equal(one["caption_id"], other["caption_id"])
        for row, key in enumerate(one["key"]):
            text = memory(8)[int(key[1:])].captions[0]
            rows = [words([template.format(caption=text)])["input_ids"][0].tolist() for template in templates]
            which = rows.index(one["input_ids"][row].tolist())
            cut += which
    assert 10 < cut < 38 and data.work()["truncated"] == cut


def test_memory_of_decoded_images_changes_nothing(words):
    """Full, partly full and empty memory give the same batches; images are scaled down in each case."""
    source = _broken()
    sizes = [0, 20 * 24 * 3 * 10, 1 << 30]
    runs = [_take(_train(source, words, cache_decoded=14, cache_bytes=size), 13) for size in sizes]
    for other in runs[1:]:
        for one, two in zip(runs[0], other, strict=True):
            _same(one, two)
    plain = _take(_train(source, words), 1)[0]
    assert (plain["pixel_values"] != runs[0][0]["pixel_values"]).any()
    data = _train(memory(20), words, cache_decoded=14, cache_bytes=1 << 30)
    reads = []
    pixels = data._examples._pixels
    pixels._decode = lambda image, decode=pixels._decode: reads.append(1) or decode(image)
    _take(data, 10)
    assert len(reads) == 20


def test_transparency_reaches_the_random_background(words):
    clear = np.zeros((20, 20, 4), np.uint8)
    source = Memory([Record(f"k{i}", encoded(clear), (caption(i),)) for i in range(8)])
    for cache in (None, 10):
        transform = augment.TrainTransform(8, {"background": 1.0})
        data = TrainData(source, transform, words, batch_size=8, threads=0, cache_decoded=cache)
        colors = {tuple(p[0, 0].tolist()) for p in _take(data, 1)[0]["pixel_values"]}
        assert len(colors) == 8
        plain = TrainData(
            source, augment.TrainTransform(8), words, batch_size=8, threads=0, background=(9, 8, 7)
        )
        assert (_take(plain, 1)[0]["pixel_values"] == [9, 8, 7]).all()


def test_the_same_image_has_the_same_number(words):
    """Whatever its key and caption, decoded each time or kept in memory."""
    images = [np.full((20, 20, 3), grey, np.uint8) for grey in (0, 50, 0, 99)]

    class Pictures:
        name, fingerprint = "pictures", "f"

        def __len__(self):
            return 4

        def __getitem__(self, i):
            return Record(f"p{i}", images[i], (f"caption {i}",))

    for cached in (None, 16):
        data = TrainData(
            Pictures(),
            augment.TrainTransform(16, {}),
            words,
            batch_size=4,
            threads=0,
            image_ids=True,
            cache_decoded=cached,
        )
        for _ in range(2):
            batch = next(data)
            ids = dict(zip(batch["key"], batch["image_id"].tolist(), strict=True))
            assert batch["image_id"].dtype == np.uint32
            assert ids["p0"] == ids["p2"] and len(set(ids.values())) == 3
        data.close()
