"""Batches of conversations: rows and packed rows, images in their slots, order, going on, hosts, bad records."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import transformers
from helpers import Memory, caption, encoded, memory, picture, tokenizer, write_tar

from vlmjax import config
from vlmjax.data import augment, images, pieces, plan, text
from vlmjax.data import recipe as recipes
from vlmjax.data.conversation import from_caption, from_turns, turns_in
from vlmjax.data.formats import tar_writer
from vlmjax.data.generative import QUESTIONS, Rows
from vlmjax.data.grouped import group
from vlmjax.data.mixture import Mixture, parts_of
from vlmjax.data.pipeline import TrainData
from vlmjax.data.record import Record
from vlmjax.data.sources import open_source, turns_of
from vlmjax.errors import BadRecord, DataError, RecipeError

N, IMAGE, SEED, LENGTH = 4, 999, 3, 96
PLAIN = Rows("mistral_instruct", LENGTH, N, IMAGE, images_per_row=2)
PACKED = Rows("mistral_instruct", LENGTH, N, IMAGE, images_per_row=2, packing=True, window=32)
GROUPED = Rows("mistral_instruct", LENGTH, N, IMAGE, images_per_row=2, lengths=(32, 56, LENGTH), window=64)
ALL, NAMES = [PLAIN, PACKED, GROUPED], ["plain", "packed", "grouped"]
TRANSFORM = augment.TrainTransform((16, 12), {"crop_scale": (0.5, 1.0)})


@pytest.fixture(name="words", scope="module")
def _words(tmp_path_factory):
    return tokenizer(tmp_path_factory.mktemp("tokenizer"), 12)


def talk(i: int) -> Record:
    """Conversation number i: of one to three rounds, about no image, one or two."""
    found = tuple(encoded(picture(10 * i + k, 20, 24)) for k in range(i % 3))
    said = []
    for k in range(1 + i % 3 + i % 2):
        said += [{"from": "human", "value": ("<image>\n" if k < len(found) else "") + caption(i + k)}]
        said += [{"from": "gpt", "value": caption(i + 7 * k + 1)}]
    marks = sum(turn["value"].count("<image>") for turn in said)
    said[0]["value"] = "<image>\n" * (len(found) - marks) + said[0]["value"]
    extra = {"conversations": said} | ({"images": found} if len(found) > 1 else {})
    return Record(f"k{i}", found[0] if found else b"", (), extra)


def talks(count: int = 60, bad: bool = True) -> Memory:
    """Some broken: an image cut off, a mark without an image, too long, too many images, no answer, unreadable."""
    source = Memory([talk(i) for i in range(count)])
    if bad:
        said = source.entries[1].extra["conversations"]
        many = [{"from": "human", "value": "<image>" * 3}, {"from": "gpt", "value": "red"}]
        long = [{"from": "human", "value": "red " * 200}, {"from": "gpt", "value": "red"}]
        source.entries[1] = Record("k1", encoded(picture(1), "JPEG")[:300], (), {"conversations": said})
        source.entries[4] = Record("k4", b"", (), {"conversations": said})
        source.entries[5] = Record("k5", b"", (), {"conversations": long})
        source.entries[6] = Record("k6", b"x", (), {"conversations": many, "images": (b"x",) * 3})
        source.entries[9] = Record("k9", b"", (), {"conversations": long[:1]})
        source.entries[10] = BadRecord("bad_row", "k10")
    return source


def train(source, words, form=PLAIN, **options) -> TrainData:
    options = {"batch_size": 8, "seed": SEED, "threads": 0, "chunk": 3, "max_bad_share": 0.5} | options
    return TrainData(source, TRANSFORM, words, kind=form, **options)


def take(data: TrainData, count: int) -> list[dict[str, np.ndarray]]:
    try:
        return [next(data) for _ in range(count)]
    finally:
        data.close()


def same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def conversations(batch: dict[str, np.ndarray]) -> list[tuple]:
    """The slow way back: (key, ids, weights as targets, images) of every segment of a batch."""
    out = []
    for row in range(len(batch["valid"])):
        keys = batch["key"][row].split()
        segments = [int(s) for s in dict.fromkeys(batch["segment_ids"][row].tolist()) if s]
        for segment in segments:
            places = np.flatnonzero(batch["segment_ids"][row] == segment)
            assert (np.diff(places) == 1).all()
            np.testing.assert_array_equal(batch["position_ids"][row, places], np.arange(len(places)))
            ids = batch["input_ids"][row, places]
            weights = batch["target_weights"][row, places]
            inner = batch["targets"][row, places][:-1]
            np.testing.assert_array_equal(inner, ids[1:])
            assert weights[-1] == 0  # nothing follows in its own segment
            index = batch["image_index"][row, places]
            np.testing.assert_array_equal(index >= 0, ids == IMAGE)
            slots = [int(i) // N for i in index[index >= 0][::N]]
            for k, slot in enumerate(slots):
                np.testing.assert_array_equal(index[index >= 0][k * N : (k + 1) * N], slot * N + np.arange(N))
                assert batch["image_valid"][row, slot]
            out.append((ids, weights[:-1], [batch["pixel_values"][row, slot] for slot in slots]))
        assert batch["valid"][row] == bool(segments) and len(keys) >= len(segments)
        empty = batch["segment_ids"][row] == 0
        assert (
            not batch["target_weights"][row, empty].any() and (batch["image_index"][row, empty] == -1).all()
        )
        assert not batch["pixel_values"][row, ~batch["image_valid"][row]].any()
    return out


def expected(record: Record, words, position: int) -> tuple:
    said = from_turns(record.extra["conversations"])
    options = {"image_tokens": N, "image_token_id": IMAGE, "max_length": LENGTH, "max_images": 2}
    got = pieces.encode(said, "mistral_instruct", pieces.Pieces(words), **options)
    rng = plan.example_rng(SEED, position)
    found = record.extra.get("images") or ([record.image] if record.image else [])
    pixels = [TRANSFORM(images.decode(image), rng) for image in found[: len(got.spans)]]
    return got.input_ids, got.loss_weights[1:], pixels


def equal(one: tuple, other: tuple) -> None:
    for a, b in zip(one[:2], other[:2], strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(one[2]) == len(other[2])
    for a, b in zip(one[2], other[2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_are_what_the_plan_says(words):
    source = talks(bad=False)
    for step, batch in enumerate(take(train(source, words), 3)):
        assert batch["valid"].all()
        for row, one in enumerate(conversations(batch)):
            g = step * 8 + row
            index = int(plan.permutation(SEED, g // 60, 60)[g % 60])
            assert batch["key"][row] == f"k{index}"
            equal(one, expected(source.entries[index], words, g))
    shapes = {name: (value.dtype, value.shape) for name, value in batch.items()}
    assert shapes == {
        "input_ids": (np.int32, (8, 96)), "targets": (np.int32, (8, 96)), "target_weights": (np.float32, (8, 96)),
        "position_ids": (np.int32, (8, 96)), "segment_ids": (np.int32, (8, 96)), "image_index": (np.int32, (8, 96)),
        "pixel_values": (np.uint8, (8, 2, 16, 12, 3)), "image_valid": (bool, (8, 2)),
        "valid": (bool, (8,)), "key": (object, (8,)),
    }  # fmt: skip


def test_packed_rows_hold_every_example_of_an_epoch_once(words):
    source = talks(bad=False)
    data = train(source, words, PACKED)
    order = Mixture(parts_of([source], (1.0,)), SEED)
    wanted = [(p, int(order(np.array([p]))[0])) for p in range(128)]
    waiting = {}
    for position, index in wanted:
        waiting.setdefault(f"k{index}", []).append(expected(source.entries[index], words, position))
    found, fill, seen = 0, [], Counter()
    for batch in take(data, 9):
        fill.append((batch["segment_ids"] > 0).mean())
        keys = [key for row in batch["key"] for key in row.split()]
        for key, one in zip(keys, conversations(batch), strict=True):
            match = [w for w in waiting[key] if np.array_equal(w[0], one[0]) and _same_pixels(w, one)]
            if match:
                found += 1
            seen[key] += 1
    assert found == sum(seen.values()) >= 100 and max(seen.values()) - min(seen.values()) <= 1
    assert (
        np.mean(fill) > 0.8 > np.mean([(b["segment_ids"] > 0).mean() for b in take(train(source, words), 3)])
    )


def _same_pixels(one: tuple, other: tuple) -> bool:
    return len(one[2]) == len(other[2]) and all(map(np.array_equal, one[2], other[2]))


@pytest.mark.parametrize("rows", ALL, ids=NAMES)
@pytest.mark.parametrize(("hosts", "threads"), [(1, 2), (2, 0), (2, 2), (4, 1)])
def test_hosts_threads_and_chunks_change_nothing(words, rows, hosts, threads):
    expect = take(train(talks(), words, rows, chunk=32), 5)
    assert all(any(batch[name].any() for batch in expect) for name in ("pixel_values", "target_weights"))
    for host in range(hosts):
        own = range(host * 8 // hosts, (host + 1) * 8 // hosts)
        got = take(train(talks(), words, rows, rows=own, threads=threads), 5)
        for one, whole in zip(got, expect, strict=True):
            same(one, {name: value[own.start : own.stop] for name, value in whole.items()})


@pytest.mark.parametrize("rows", ALL, ids=NAMES)
@pytest.mark.parametrize("threads", [0, 2])
def test_resume_is_exact(words, rows, threads):
    source = talks()
    expect = take(train(source, words, rows), 9)
    first = train(source, words, rows, threads=threads)
    for step in range(4):
        same(next(first), expect[step])
    state = json.loads(json.dumps(first.state))
    first.close()
    assert state["step"] == 4 and len(json.dumps(state)) < 1000
    second = train(source, words, rows, threads=threads)
    next(second)
    second.restore(state)
    assert second.state == state
    for step in range(4, 9):
        same(next(second), expect[step])
    second.close()
    late = train(source, words, rows, start_step=7)
    same(take(late, 1)[0], expect[7])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [PACKED, GROUPED], ids=NAMES[1:])
def test_processes_change_nothing(words, rows):
    expect = take(train(talks(), words, rows), 3)
    data = train(talks(), words, rows, processes=2, threads=2)
    for one, whole in zip(take(data, 3), expect, strict=True):
        same(one, whole)
    there = train(talks(), words, rows)
    take(there, 3)
    assert data.state == there.state


def test_grouped_rows_hold_every_example_of_an_epoch_once(words):
    source = talks(bad=False)
    data = train(source, words, GROUPED)
    order = Mixture(parts_of([source], (1.0,)), SEED)
    waiting = Counter(f"k{int(order(np.array([p]))[0])}" for p in range(2 * 64))
    shapes, partial = set(), 0
    while waiting:
        batch = next(data)
        (rows, length), slots = batch["input_ids"].shape, batch["pixel_values"].shape[1]
        assert rows == 8 and batch["image_valid"].shape == (8, slots)
        shapes.add((length, slots))
        partial += not batch["valid"].all()
        lengths = (batch["segment_ids"] > 0).sum(axis=1)
        shorter = [one for one in (0, 32, 56) if one < length][-1]
        assert lengths.max() > shorter or not batch["valid"].all() or slots  # what moved up is the exception
        for key, one in zip(batch["key"][batch["valid"]], conversations(batch), strict=True):
            waiting.subtract([key])
            assert bool(one[2]) <= bool(slots)
            record = source.entries[int(key[1:])]
            assert len(one[2]) == min(2, record.extra["conversations"][0]["value"].count("<image>") + (
                sum(t["value"].count("<image>") for t in record.extra["conversations"][1:])
            ))  # fmt: skip
        waiting = +waiting
    data.close()
    assert partial <= 2 and {slots for _, slots in shapes} == {0, 2} and len(shapes) >= 4, shapes


def test_groups_by_hand():
    tokens, images = np.array([5, 30, 9, 31, 8, 40, 7, 3, 33]), np.array([0, 1, 0, 0, 2, 0, 0, 0, 1])
    found = {tuple(b.examples.tolist()): b[:2] for b in group(tokens, images, (10, 40), 2).batches}
    # Two pairs of short texts, two long ones; 4 alone moves up to 1, and 8 is left.
    assert found == {(0, 2): (10, False), (6, 7): (10, False), (3, 5): (40, False), (1, 4): (40, True),
                     (8,): (40, True)}  # fmt: skip
    orders = {tuple(tuple(b.examples.tolist()) for b in group(tokens, images, (10, 40), 2, window=w).batches)
              for w in range(6)}  # fmt: skip
    assert len(orders) > 2
    alone = group(np.array([4, 5, 20]), np.array([0, 0, 0]), (10, 40), 2)
    assert [b[:2] for b in alone.batches if len(b.examples) == 1] == [(40, False)]


def test_groups_of_whatever_examples_lose_none():
    rng = np.random.default_rng(0)
    for trial in range(200):
        n, size = int(rng.integers(0, 60)), int(rng.integers(1, 9))
        tokens, images = rng.integers(1, 101, n), rng.integers(0, 3, n) * rng.integers(0, 2, n)
        made = group(tokens, images, (10, 30, 100), size, seed=trial)
        placed = np.concatenate([b.examples for b in made.batches] or [np.zeros(0, int)])
        assert sorted(placed.tolist()) == list(range(n)) and made.rows == -(-n // size)
        for batch in made.batches:
            assert tokens[batch.examples].max() <= batch.tokens
            assert batch.with_images or not images[batch.examples].any()
        assert sum(len(b.examples) < size for b in made.batches) <= 1


def test_going_on_reads_nothing_of_the_past(words):
    source = talks(bad=False)
    data = train(source, words, PACKED)
    take(data, 6)
    read = []

    class Watched(Memory):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    again = train(Watched(source.entries), words, PACKED)
    again.restore(data.state)
    take(again, 1)
    assert 0 < len(read) <= 2 * 32 + 8 * 4


def test_bad_records_are_counted_once_and_leave_their_place_empty(words):
    for rows, steps in ((PLAIN, 15), (PACKED, 8), (GROUPED, 16)):
        data = train(talks(), words, rows, max_bad_share=1.0)
        batches = take(data, steps)
        reasons = {"truncated", "image_marks", "too_long", "too_many_images", "bad_row"}
        assert set(data.skips.by_reason) >= reasons - {"truncated"}, data.skips.by_reason
        share = data.skips.skipped / data.skips.seen
        assert 0.06 < share < 0.14, (data.skips.by_reason, data.skips.seen)
        for batch in batches:
            conversations(batch)
    assert train(talks(), words).work()["batches"] == 0


def test_captions_answer_questions(words):
    source = memory(20, captions=3)
    for template in ("plain", "mistral_instruct"):
        rows = Rows(template, LENGTH * 2, N, IMAGE)
        batch = take(train(source, words, rows), 1)[0]
        assert batch["valid"].all() and batch["image_valid"].all()
        for row in range(8):
            record = source[int(batch["key"][row][1:])]
            rng = plan.example_rng(SEED, row)
            answer = record.captions[int(rng.integers(3))]
            said = from_caption(answer, QUESTIONS[int(rng.integers(len(QUESTIONS)))])
            options = {"image_tokens": N, "image_token_id": IMAGE, "max_length": 2 * LENGTH}
            got = pieces.encode(said, template, pieces.Pieces(words), **options)
            ids = batch["input_ids"][row][batch["segment_ids"][row] > 0]
            np.testing.assert_array_equal(ids, got.input_ids)
        packed_rows = Rows(template, LENGTH * 2, N, IMAGE, images_per_row=4, packing=True, window=32)
        many = take(train(source, words, packed_rows, templates="so: {caption}"), 1)[0]
        assert many["segment_ids"].max() > 1


def test_conversations_in_tars(words, tmp_path):
    """As `convert` writes them, and with messages in a json beside the image; a pair among them."""
    said = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "blue"}] * 2
    with tar_writer.Writer(str(tmp_path / "a.tar")) as out:
        for i in range(4):
            out.write(Record(f"k{i}", encoded(picture(i)), (), {"conversations": said[: 4 - 2 * (i % 2)]}))
    messages = [{"role": "user", "content": "<image>red?"}, {"role": "assistant", "content": "blue"}]
    members = {"x.png": encoded(picture(1)), "x.json": json.dumps({"messages": messages}).encode()}
    members |= {
        "y.png": encoded(picture(2)),
        "y.json": b'{"messages": [',
        "z.png": encoded(picture(3)),
        "z.txt": b"red",
    }
    write_tar(tmp_path / "b.tar", members)
    source = open_source(f"{tmp_path}/a.tar,{tmp_path}/b.tar")
    turns = [turns_of(source, i) if i != 5 else None for i in range(7)]
    assert [turns_in(source[i].extra) for i in range(5)] == turns[:5]
    assert [len(t) for t in turns if t is not None] == [4, 2, 4, 2, 2, 0]
    assert turns[4] == [{"from": "human", "value": "<image>red?"}, {"from": "gpt", "value": "blue"}]
    for form in (PLAIN, PACKED):
        data = train(source, words, form, batch_size=7 if form is PLAIN else 2, max_bad_share=1.0)
        batch = take(data, 1)[0]
        assert data.skips.by_reason["bad_json"] == 1 or form is PACKED
        learned = [words.decode(ids[1:][weights > 0]) for ids, weights, _ in conversations(batch)]
        assert set(" ".join(learned).split()) <= {"blue", "red", *"".join(QUESTIONS).lower().split()}
    # Two images are named where one is: the record that says so is not used.
    assert data.skips.by_reason["image_marks"] >= 1


def test_a_table_of_conversations_with_its_images(words, tmp_path):
    said = [{"from": "human", "value": "<image>\nred?"}, {"from": "gpt", "value": "blue"}]
    table = [{"id": str(i), "image": f"{i}.png", "conversations": said} for i in range(8)]
    table[2]["image"] = "gone.png"
    table[3].pop("image")
    table[5] = {"id": "5", "conversations": [{"from": "human", "value": "round?"}, said[1]]}
    table[6] = {
        "id": "6",
        "image": ["0.png", "1.png"],
        "conversations": [{**said[0], "value": "<image>a<image>"}, said[1]],
    }
    for i in range(8):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i)))
    (tmp_path / "llava.json").write_text(json.dumps(table))
    for form in (PLAIN, PACKED):
        source = open_source(str(tmp_path / "llava.json"))
        data = train(source, words, form, batch_size=8 if form is PLAIN else 3, max_bad_share=1.0)
        batches = take(data, 1 if form is PLAIN else 3)
        assert set(data.skips.by_reason) == {"missing_file", "image_marks"}
        used = sorted({len(pixels) for batch in batches for _, _, pixels in conversations(batch)})
        assert used == [0, 1, 2] and data.skips.seen >= 8


def test_restore_refuses_other_rows(words):
    data = train(talks(), words, PACKED)
    take(data, 2)
    other = Rows("mistral_instruct", LENGTH + 1, N, IMAGE, images_per_row=2, packing=True, window=32)
    with pytest.raises(DataError, match="packed was"):
        train(talks(), words, other).restore(data.state)
    grouped = train(talks(), words, GROUPED)
    take(grouped, 2)
    with pytest.raises(DataError, match="packed was"):
        train(talks(), words, dataclasses.replace(GROUPED, lengths=(32, LENGTH))).restore(grouped.state)
    with pytest.raises(DataError, match="which examples a step holds"):
        grouped.indices(0)
    with pytest.raises(DataError, match="packed was"):
        train(talks(), words, PLAIN).restore(data.state)
    plain = train(talks(), words, PLAIN)
    with pytest.raises(DataError, match="packed was"):
        train(talks(), words, PACKED).restore(plain.state)
    with pytest.raises(DataError, match="rows are packed"):
        data.indices(0)
    with pytest.raises(DataError, match="no pairs"):
        data.text(talk(0), 0, 0)


def test_another_mixture_begins_with_a_window(words):
    one = talks(bad=False)
    data = train(one, words, PACKED)
    take(data, 2)
    two = Memory([talk(i) for i in range(100, 140)])
    two.name, two.fingerprint = "more", "more"
    after = train([one, two], words, PACKED, shares=(0.5, 0.5))
    with pytest.raises(DataError, match="accept_new_mixture"):
        after.restore(data.state)
    after.restore(data.state, accept=True)
    assert after.step == 2 and after.mixture.start % 32 == 0 and after.mixture.start > 0
    batches = take(after, 4)
    assert any(int(key[1:]) >= 100 for batch in batches for row in batch["key"] for key in row.split())
    again = train([one, two], words, PACKED, shares=(0.5, 0.5))
    again.restore(after.state)
    same(take(again, 1)[0], take(after, 1)[0])


def test_a_template_that_the_tokenizer_cannot_write_is_refused_at_once(words):
    with pytest.raises(DataError, match="no chat template"):
        train(talks(), words, Rows("tokenizer", LENGTH, N, IMAGE))
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=words.backend, eos_token="<|endoftext|>")
    for template, fits in (
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", True),
        ("{{ x.y.z }}", False),
    ):
        hf.chat_template = template
        if fits:
            assert take(train(talks(), text._wrap(hf, 12), Rows("tokenizer", LENGTH, N, IMAGE)), 1)[0][
                "valid"
            ].any()
            continue
        with pytest.raises(DataError, match="chat template fails"):
            train(talks(), text._wrap(hf, 12), Rows("tokenizer", LENGTH, N, IMAGE))


def recipe(**changes):
    c = config.tiny(config.recipe())
    c.stage, c.batch_size, c.data.max_length = "generative", 4, 192
    c.evals = config.Config()
    c.data.conversation.template = "plain"
    c.data.update(changes)
    return config.validate(c)


@pytest.mark.slow
def test_a_recipe_gives_batches_of_conversations():
    one = recipe(packing=True, images_per_row=3)
    sources, shares = recipes.open_train_sources(one)
    special = recipes.special_tokens(one)
    words = recipes.open_tokenizer("bpe:560", memory(40), 32, special)
    assert special == ("<image>",) and words.token_id("<image>") == words.vocab_size - 1
    data = recipes.train_data(one, sources, shares, words, 32, threads=0)
    batch = next(data)
    data.close()
    assert batch["input_ids"].shape == (4, 192) and batch["pixel_values"].shape == (4, 3, 32, 32, 3)
    assert batch["image_valid"].all() and batch["segment_ids"].max() == 3
    first = batch["segment_ids"][0] == 1
    assert (batch["input_ids"][0, first] == words.token_id("<image>")).sum() == (32 // 8) ** 2
    said = words.decode(batch["targets"][0, first][batch["target_weights"][0, first] > 0])
    index = int(batch["key"][0].split()[0].rpartition("/")[2])
    assert said.split() in [words.decode(words.encode(c)).split() for c in sources[0][index].captions]
    other = recipes.train_data(one, sources, shares, words, 32, threads=0, image_tokens=5)
    assert other._examples.rows.image_tokens == 5
    with pytest.raises(DataError, match="special_tokens"):
        recipes.train_data(one, sources, shares, tokenizer_without(words), 32)


def tokenizer_without(words):
    words.token_id = lambda token: None
    return words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conversation": {"template": "v2"}}, "template='v2'.*did you mean 'v"),
        ({"max_length": 16}, "no room for words beside an image of 16 tokens"),
        ({"images_per_row": 0}, "images_per_row=0: expected at least 1"),
        ({"cache_decoded": 32}, "cache_decoded=32"),
    ],
)
def test_recipes_that_cannot_be(changes, message):
    with pytest.raises(RecipeError, match=message):
        recipe(**changes)
