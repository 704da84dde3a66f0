"""The drawn world: the same everywhere, true to its captions, and honest about what it holds out."""

import dataclasses
import hashlib
import itertools
import json
import re

import numpy as np
import pytest

from vlmjax.data.record import Record
from vlmjax.data.scenes import (
    Scenes,
    geometry,
    heldout_classes,
    moved,
    open_scenes,
    scene,
    seen_classes,
    sprites,
)
from vlmjax.data.scenes import vocabulary as v
from vlmjax.data.scenes.__main__ import main
from vlmjax.data.scenes.dice import Dice
from vlmjax.errors import DataError


def _many(number: int, split: str, style: str, image_size: int = 64):
    return [scene(3, i, split, style=style, image_size=image_size) for i in range(number)]


def test_content_never_changes():
    # A digest of the content of scenes: if this fails, an index means another scene: raise source.VERSION.
    content = [
        [scene(7, i, split, style=style).description(), scene(7, i, split, style=style).captions]
        for split in v.SPLITS
        for style in v.STYLES
        for i in (0, 1, 2, 10**9)
    ]
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    assert digest[:16] == "44d174469fdd980c"


def test_pixels_never_change():
    # Scenes without a printed word: letters depend on the version of FreeType.
    plain = [one for one in _many(60, "train", "full") if one.world.word is None]
    digest = hashlib.sha256(b"".join(one.image.tobytes() for one in plain)).hexdigest()
    assert digest[:16] == "ffc6b8d5e95b836e"


def test_a_scene_depends_on_each_of_its_arguments_and_on_no_other_scene():
    base = scene(1, 5, "train", style="simple").world
    again = Scenes("train", seed=1)
    for i in (9, 2, 5):
        last = again.scene(i).world
    assert last == base
    for other in (scene(2, 5, "train"), scene(1, 6, "train"), scene(1, 5, "val"), scene(1, 5, style="full")):
        assert other.world.groups != base.groups


def test_dice_follow_philox_words():
    words = np.random.Philox(key=[4, 2], counter=[0, 6, 1, 0]).random_raw(96).tolist()[::-1]
    dice = Dice(4, 2, 6, 1)
    assert dice.below(10) == words[0] * 10 // 2**64
    assert dice.between(-1.0, 3.0) == -1 + 4 * ((words[1] >> 11) / 2**53)
    assert dice.pick("abc") == "abc"[words[2] * 3 // 2**64]
    assert dice.pick_weighted("ab", (1, 3)) == "abbb"[words[3] * 4 // 2**64]
    assert sorted(dice.shuffled(range(50))) == list(range(50))
    many = [dice.below(6) for _ in range(6000)]
    assert all(900 < many.count(face) < 1100 for face in range(6))


def test_held_out_rule():
    for s, c in itertools.product(range(12), range(12)):
        pair = v.SHAPES[s], list(v.COLOURS)[c]
        assert v.is_held_out(*pair) == ((c - s) % 12 in (1, 4, 9)) == (pair in v.HELD_OUT_PAIRS)
    missing = [frozenset(c for s, c in v.HELD_OUT_PAIRS if s == shape) for shape in v.SHAPES]
    assert [len(colours) for colours in missing] == [3] * 12
    assert len(set(missing)) == 12
    assert len(heldout_classes()) == 36 and len(seen_classes()) == 108
    assert not set(heldout_classes()) & set(seen_classes())
    assert {"an orange circle", "a red star"} <= set(heldout_classes())


@pytest.mark.parametrize("style", v.STYLES)
def test_training_never_shows_or_says_a_held_out_pair(style):
    pairs = "|".join(f"{colour} ({shape}|{v.plural(shape)})" for shape, colour in v.HELD_OUT_PAIRS)
    forbidden = re.compile(rf"\b({pairs})\b")  # whole words: a checkered star is not a red star
    assert forbidden.search("two red stars, a checkered star").group() == "red stars"
    seen = set()
    for split in ("train", "val"):
        for one in _many(100, split, style):
            pairs = {(thing.shape, thing.colour) for thing in one.objects}
            assert not pairs & set(v.HELD_OUT_PAIRS)
            seen |= pairs
            said = " ".join(one.captions) + str(one.qa) + str(one.points)
            assert not forbidden.search(said)
    assert {shape for shape, _ in seen} == set(v.SHAPES)
    assert {colour for _, colour in seen} == set(v.COLOURS)


@pytest.mark.parametrize("style", v.STYLES)
def test_held_out_scenes_show_exactly_one_held_out_pair(style):
    source = Scenes("heldout", style=style, captions="class")
    labels = set()
    for i in range(150):
        record = source[i]
        groups = record.extra["scene"].world.groups
        assert [g for g in groups if v.is_held_out(g.shape, g.colour)] == [groups[0]]
        assert record.captions == (heldout_classes()[record.extra["label"]],)
        assert record.extra["class_name"] == v.article(f"{groups[0].colour} {groups[0].shape}")
        labels.add(record.extra["label"])
    assert len(labels) > 30 and labels <= set(range(36))


def test_styles():
    for one in _many(200, "train", "single"):
        assert len(one.objects) == 1 and one.world.word is None
    numbers = [len(one.objects) for one in _many(200, "train", "simple")]
    assert set(numbers) == {1, 2}
    full = _many(400, "train", "full")
    assert {len(one.world.groups) for one in full} == {1, 2, 3, 4}
    assert {group.count for one in full for group in one.world.groups} == {1, 2, 3, 4, 5, 6}
    assert 0.25 < np.mean([one.world.word is not None for one in full]) < 0.45
    assert {group.texture for one in full for group in one.world.groups} == set(v.TEXTURES)
    assert {group.size for one in full for group in one.world.groups} == set(v.SIZES)
    assert {one.world.background.pattern for one in full} == set(v.PATTERNS)
    relations = {
        geometry.relation(a, b) for one in full for a, b in itertools.permutations(one.world.groups, 2)
    }
    assert relations == {*geometry.INVERSE, None}


@pytest.fixture
def no_shadows(monkeypatch):
    monkeypatch.setattr(sprites, "SHADOW", 0.0)
    monkeypatch.setattr(sprites, "_sprites", sprites._Cache(1 << 28))
    sprites.card.cache_clear()
    yield
    sprites.card.cache_clear()


def _changed(one, **changes) -> np.ndarray:
    """Bounds (left, top, right, bottom) of the pixels that differ once the world is changed."""
    other = dataclasses.replace(one, world=dataclasses.replace(one.world, **changes))
    ys, xs = np.nonzero(np.abs(one.image.astype(int) - other.image).sum(axis=2) > 40)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("image_size", (64, 256))
def test_boxes_are_where_things_are_drawn(image_size, no_shadows):
    for one in _many(60, "val", "simple", image_size):
        groups = one.world.groups
        for number in range(len(groups)):
            drawn = _changed(one, groups=groups[:number] + groups[number + 1 :])
            np.testing.assert_allclose(drawn, one.boxes[number], atol=3)
    assert one.boxes.shape == (len(one.objects), 4) and one.boxes.dtype == np.float32


def test_printed_words_are_in_their_box(no_shadows):
    found = 0
    for one in _many(60, "val", "full", image_size=128):
        if one.world.word is None:
            assert one.word_box is None
            continue
        left, top, right, bottom = one.word_box
        drawn = _changed(one, word=None)
        assert 0 <= left <= drawn[0] + 1 and drawn[2] - 1 <= right <= 128
        assert 0 <= top <= drawn[1] + 1 and drawn[3] - 1 <= bottom <= 128
        found += 1
    assert found > 10


def test_things_are_inside_the_canvas_and_apart():
    for one in _many(150, "val", "full"):
        boxes = [
            (thing, group, geometry.thing_box(thing, group))
            for group in one.world.groups
            for thing in group.things
        ]
        for _, _, box in boxes:
            assert min(box.left, box.top) >= 0 and max(box.right, box.bottom) <= 1
        for (a, one_group, _), (b, other, _) in itertools.combinations(boxes, 2):
            if geometry.relation(one_group, other) in ("inside", "around"):
                continue
            reach = max(abs(a.x - b.x), abs(a.y - b.y))
            assert reach >= 0.98 * (a.diameter + b.diameter) / 2 - 1 / 32


def test_a_larger_image_is_the_same_scene():
    for style in ("simple", "full"):
        for i in range(30):
            small, large = (scene(0, i, style=style, image_size=size) for size in (64, 256))
            assert small.world == large.world and small.captions == large.captions and small.qa == large.qa
            np.testing.assert_allclose(small.boxes * 4, large.boxes, rtol=1e-6)
            reduced = large.image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
            assert np.abs(reduced - small.image).mean() < 4


def test_any_image_size():
    for size in (16, 37, 100, 224):
        image = scene(0, 5, style="full", image_size=size).image
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert image.flags.c_contiguous and image.std() > 5


def test_captions_name_what_is_there():
    shapes = {**{shape: shape for shape in v.SHAPES}, **{v.plural(shape): shape for shape in v.SHAPES}}
    for one in _many(150, "heldout", "full"):
        groups = one.world.groups
        assert 2 <= len(one.captions) == len(set(one.captions)) <= 5
        for group in groups:
            for phrase in (group.colour, group.shape, v.COUNTS[group.count] if group.count > 1 else ""):
                assert phrase in one.captions[0]
        if one.world.word is not None:
            assert f'"{one.world.word.text}"' in one.captions[0]
        assert one.captions[0].endswith(f"{one.world.background.tone} background")
        for caption in one.captions:
            words = caption.replace(",", "").split()
            assert {shapes[word] for word in words if word in shapes} <= {group.shape for group in groups}
            assert len(words) <= 60
    assert max(len(one.captions[0].split()) for one in _many(300, "train", "simple")) <= 25


@pytest.mark.parametrize("style", ("simple", "full"))
def test_complete_captions_tell_256_scenes_apart(style):
    for seed in (0, 1):
        source = Scenes("heldout", seed=seed, style=style)
        captions = [source.scene(i).captions[0] for i in range(256)]
        assert len(set(captions)) >= 255
    assert source[0].captions == (captions[0],)


def test_relations_hold_between_boxes():
    for one in _many(200, "val", "full"):
        for a, b in itertools.permutations(one.world.groups, 2):
            name = geometry.relation(a, b)
            box_a, box_b = geometry.group_box(a), geometry.group_box(b)
            if name == "left":
                assert box_a.right <= box_b.left + 0.03
            elif name == "below":
                assert box_a.top >= box_b.bottom - 0.03
            elif name == "inside":
                assert box_b.left < box_a.left and box_a.bottom < box_b.bottom
            assert name is None or geometry.relation(b, a) == geometry.INVERSE[name]


def _called(things, name: str):
    """The things that a name such as "star", "red star" or "red stars" means."""
    *colour, shape = name.split()
    singular = {**{v.plural(shape): shape for shape in v.SHAPES}, **{shape: shape for shape in v.SHAPES}}
    return [t for t in things if t.shape == singular[shape] and t.colour in (colour or [t.colour])]


def _check_comparison(things, question: str, answer: str) -> None:
    if match := re.fullmatch(r"Are there more (.+) than (.+)\?", question):
        one, two = (len(_called(things, name)) for name in match.groups())
        assert answer == ("yes" if one > two else "no") and one != two
    elif match := re.fullmatch(r"Which is larger, the (.+) or the (.+)\?", question):
        sides = {name: _called(things, name)[0].box for name in match.groups()}
        area = {f"the {name}": (box[2] - box[0]) * (box[3] - box[1]) for name, box in sides.items()}
        assert answer in area and area[answer] > 0.9 * max(area.values())
    elif match := re.fullmatch(r"(?:Is|Are) the (.+) to the left of the (.+)\?", question):
        one, two = (np.mean([t.centre[0] for t in _called(things, name)]) for name in match.groups())
        assert answer == ("yes" if one < two else "no")
    elif match := re.fullmatch(r"Where is the (.+)\?", question):
        x, y = _called(things, match[1])[0].centre
        assert ("left" in answer, "right" in answer) == (x < 0.37 * 64, x > 0.63 * 64)
        assert ("lower" in answer or "bottom" in answer) == (y > 0.63 * 64)


def test_answers_against_a_slow_reading_of_the_scene():
    yes = no = 0
    for one in _many(150, "val", "full"):
        things = one.objects
        answers = {question.question: question.answer for question in one.qa}
        assert answers["How many shapes are there?"] == str(len(things))
        for shape in v.SHAPES:
            alike = [thing for thing in things if thing.shape == shape]
            many = f"How many {v.plural(shape)} are there?"
            assert answers.get(many, str(len(alike))) == str(len(alike))
            for form in (f"What colour is the {shape}?", f"What colour are the {v.plural(shape)}?"):
                if form in answers:
                    assert {thing.colour for thing in alike} == {answers[form]}
            for colour in v.COLOURS:
                there = any(thing.colour == colour for thing in alike)
                asked = f"Is there {v.article(f'{colour} {shape}')}?"
                if asked in answers:
                    assert answers[asked] == ("yes" if there else "no")
                    yes, no = yes + there, no + (not there)
        word = one.world.word
        assert answers.get("What word is written in the picture?") == (word.text if word else None)
        for question, answer in answers.items():
            _check_comparison(things, question, answer)
    assert yes == no == 150
    kinds = {question.kind for one in _many(100, "val", "full") for question in one.qa}
    assert kinds == {
        *("colour", "shape", "texture", "size", "direction", "count"),
        *("exists", "where", "relation", "compare", "word", "background"),
    }


def test_points_are_centres():
    for one in _many(100, "val", "full", image_size=128):
        centres = {thing.centre for thing in one.objects}
        assert {point for request in one.points for point in request.points} == centres
        for request in one.points:
            assert request.query.startswith("point to the ")
            assert all(0 < x < 128 and 0 < y < 128 for x, y in request.points)


def test_moved_is_a_little_film():
    moving = 0
    for one in _many(100, "val", "full"):
        assert np.array_equal(moved(one, 0.0).image, one.image)
        end = moved(one, 1.0)
        for before, after in zip(one.objects, end.objects, strict=True):
            across, down = after.centre[0] - before.centre[0], after.centre[1] - before.centre[1]
            direction = (np.sign(across), np.sign(down))
            assert direction == v.STEPS.get(before.motion, (0, 0))
            assert 0 <= min(after.box) and max(after.box) <= 64
            moving += direction != (0, 0)
    assert moving > 100


def test_every_set_of_colours_has_a_background():
    for colours in itertools.combinations(v.COLOURS, 4):
        assert frozenset.intersection(*(v.CONTRASTING_TONES[colour] for colour in colours))


def test_source_gives_records():
    source = Scenes("train", seed=4, image_size=32)
    assert len(source) == 1_000_000
    record = source[12]
    assert isinstance(record, Record) and record.key == "scenes/train/simple/4/12"
    assert record.captions == scene(4, 12).captions
    assert np.array_equal(record.image, scene(4, 12, image_size=32).image)
    assert seen_classes()[record.extra["label"]] == record.extra["class_name"]
    assert source.fingerprint != Scenes("train", seed=5, image_size=32).fingerprint
    for bad in (-1, 1_000_000):
        with pytest.raises(IndexError):
            source[bad]
    assert len(list(Scenes("val", length=3))) == 3


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_conversations_ask_what_the_scene_answers(split):
    source = open_scenes(f"scenes:{split}:full:questions", seed=4, image_size=32)
    rounds, firsts, kinds = set(), set(), set()
    for i in range(120):
        record, one = source[i], source.scene(i)
        turns = record.extra["conversations"]
        assert turns == source.turns_at(i) == source[i].extra["conversations"] and record.captions == ()
        assert source.captions_at(i) == () and [t["from"] for t in turns] == ["human", "gpt"] * (
            len(turns) // 2
        )
        words = [turn["value"] for turn in turns]
        assert words[0].count("<image>") == 1 and not any("<image>" in w for w in words[1:])
        firsts.add(words[0].startswith("<image>\n"))
        words[0] = words[0].removeprefix("<image>\n").removesuffix("\n<image>")
        known = {question: (answer, kind) for kind, question, answer in one.qa}
        for question, answer in zip(words[::2], words[1::2], strict=True):
            assert known[question][0] == answer
            kinds.add(known[question][1])
        rounds.add(len(turns) // 2)
        if split == "train":
            assert not _held_out_words(" ".join(words))
    assert rounds == {1, 2, 3, 4} and firsts == {True, False} and len(kinds) >= 11
    assert Scenes("train").turns_at(0) == [] and "conversations" not in Scenes("train")[0].extra


def _held_out_words(text: str) -> list[str]:
    """Held-out pairs that a text names side by side."""
    return [
        name for name in (c.split(" ", 1)[1] for c in heldout_classes()) if re.search(rf"\b{name}s?\b", text)
    ]


def test_specs():
    opened = open_scenes("scenes:full:heldout:class", seed=2, image_size=48)
    assert (opened.split, opened.style, opened.captions) == ("heldout", "full", "class")
    assert (opened.seed, opened.image_size, len(opened)) == (2, 48, 1024)
    assert open_scenes("scenes").name == "scenes:train:simple:all"
    assert open_scenes("scenes:heldout").captions == "complete"


@pytest.mark.parametrize(
    ("make", "message"),
    (
        (lambda: open_scenes("scenes:heldot"), "did you mean 'heldout'"),
        (lambda: open_scenes("scenes:train:val"), "both 'train' and 'val'"),
        (lambda: Scenes("test"), "unknown split 'test'"),
        (lambda: Scenes(style="fulll"), "did you mean 'full'"),
        (lambda: Scenes(image_size=8), "at least 16"),
        (lambda: Scenes(length=0), "length is 0"),
        (lambda: scene(0, -1), "negative"),
    ),
)
def test_mistakes_are_named(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_command_shows_a_scene(tmp_path, capsys):
    main(["--show", str(tmp_path / "one.png"), "--index", "3", "--image_size", "96"])
    known = json.loads(capsys.readouterr().out)
    assert known["captions"] == list(scene(0, 3, style="full").captions)
    assert len(known["objects"]) == len(scene(0, 3, style="full").objects)
    assert (tmp_path / "one.png").stat().st_size > 1000


@pytest.mark.slow
def test_command_draws_the_sheet(tmp_path):
    from PIL import Image

    main(["--sheet", str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 1000 and sheet.height > 2000


def test_a_thing_is_worked_out_once(monkeypatch):
    made = []
    make = sprites._make
    monkeypatch.setattr(sprites, "_make", lambda *key: made.append(key) or make(*key))
    monkeypatch.setattr(sprites, "_sprites", sprites._Cache(1 << 28))
    images = [scene(0, i).image for i in range(50)]
    assert len(made) == len(set(made)) > 40
    assert all(np.array_equal(scene(0, i).image, image) for i, image in enumerate(images))
    assert len(made) == len(set(made))
    monkeypatch.setattr(sprites, "_sprites", sprites._Cache(20_000))
    assert all(np.array_equal(scene(0, i).image, image) for i, image in enumerate(images))
    assert sprites._sprites._held < 40_000
