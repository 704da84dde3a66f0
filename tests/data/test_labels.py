"""Classes files, prompt templates, and how a record finds its class."""

import pytest
from helpers import Memory

from vlmjax.data.labels import ClassFinder, ClassName, classes_of, label_of, read_classes
from vlmjax.data.record import Record
from vlmjax.data.scenes import open_scenes
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.templates import TEMPLATES, fill, load_templates


def named(*names: str) -> list[ClassName]:
    return [ClassName(name.replace(" ", "_"), name) for name in names]


def test_both_forms_of_a_classes_file(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcar_side\tcar side\n\nant\nLeopards\tleopards\n", encoding="utf-8")
    assert read_classes(str(path)) == [
        ClassName("car_side", "car side"),
        ClassName("ant", "ant"),
        ClassName("Leopards", "leopards"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one\n", "two or more"),
        ("a\tx\na\ty\n", ":2: label 'a' was already given in line 1"),
        ("a\t\nb\n", ":1: .*empty"),
    ],
)
def test_a_classes_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(str(path))


def test_a_classes_file_that_is_not_there():
    with pytest.raises(DataError, match="nowhere.txt"):
        read_classes("nowhere.txt")


@pytest.mark.parametrize(
    ("extra", "label"),
    [
        ({"cls": b"54\n"}, "54"),
        ({"label": 3}, "3"),
        ({"json": b'{"width": 4, "label": "cat"}'}, "cat"),
        ({"json": b"{broken"}, None),
        ({"json": {"cls": 2}}, "2"),
        ({"label": True, "cls": b" "}, None),
        ({}, None),
    ],
)
def test_where_a_label_is_looked_for(extra, label):
    assert label_of(extra) == label


CLASSES = named("crocodile", "crocodile head", "ant", "elephant", "bass", "yin yang")


@pytest.mark.parametrize(
    ("label", "captions", "name"),
    [
        ("crocodile_head", [], "crocodile head"),
        ("Yin-Yang", [], "yin yang"),
        ("2", [], "ant"),
        ("2", ["a photo of an ant."], "ant"),
        ("2", ["something else altogether"], "ant"),
        ("n0123", ["bass"], "bass"),
        (None, ["a photo of a crocodile."], "crocodile"),
        (None, ["a photo of a crocodile head."], "crocodile head"),
        (None, ["An elephant, drinking"], "elephant"),
        (None, ["merchant", "a yin_yang sign"], "yin yang"),
    ],
)
def test_a_record_finds_its_class(label, captions, name):
    assert CLASSES[ClassFinder(CLASSES).find("k", label, captions)].name == name


@pytest.mark.parametrize(
    ("label", "captions", "message"),
    [
        (None, [], "name none of the 6 classes"),
        ("9", [], "record 'k': label '9'.* name none"),
        (None, ["an ant on an elephant"], "fit 2 classes \\('ant', 'elephant'\\)"),
        (None, ["merchant"], "name none"),
        ("3", ["a photo of an ant."], "is line 3 .*'elephant', but its caption says 'a photo of an ant.'"),
    ],
)
def test_a_record_whose_class_cannot_be_told_is_refused(label, captions, message):
    with pytest.raises(DataError, match=message):
        ClassFinder(CLASSES).find("k", label, captions)


def test_numbers_in_the_classes_file_are_labels_not_lines():
    classes = [ClassName("2", "cat"), ClassName("1", "dog")]
    assert ClassFinder(classes).find("k", "1", []) == 1
    assert ClassFinder(classes).find("k", None, ["2 dogs and 1 cat"]) == 0
    with pytest.raises(DataError, match="name none of the 2 classes"):
        ClassFinder(classes).find("k", "0", [])


def test_two_classes_of_one_name_need_labels():
    finder = ClassFinder([ClassName("657", "missile"), ClassName("744", "missile")])
    assert finder.find("k", "744", ["missile"]) == 1
    with pytest.raises(DataError, match="fit 2 classes"):
        finder.find("k", None, ["missile"])


def test_captions_made_with_the_templates_are_recognised():
    finder = ClassFinder(named("ant", "ant hill"), ["the {} of an ant hill"])
    assert finder.find("k", None, ["The ant of an ant hill"]) == 0


def test_every_caption_of_the_photographs_gives_its_class(shared_path):
    classes = read_classes(str(shared_path("data/caltech101/classes.txt")))
    finder = ClassFinder(classes)
    for index, c in enumerate(classes):
        article = "an" if c.name[0] in "aeiou" else "a"
        assert finder.find("k", None, [f"a photo of {article} {c.name}."]) == index
        assert finder.find("k", str(index), [f"a photo of {article} {c.name}."]) == index


def test_templates_by_name_file_text_and_list(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("# mine\na sketch of a {}.\n\n{} here\n")
    assert load_templates("plain") == ("{}",)
    assert load_templates("photo") == TEMPLATES["photo"]
    assert load_templates(str(path)) == ("a sketch of a {}.", "{} here")
    assert load_templates("one {}") == ("one {}",)
    assert load_templates(["{} a", "{} b"]) == ("{} a", "{} b")
    assert all(template.count("{}") == 1 for group in TEMPLATES.values() for template in group)


@pytest.mark.parametrize(
    ("spec", "message"), [("fotos", "plain, photo, drawing"), (["{} {}"], "exactly once"), ([], "no temp")]
)
def test_templates_that_cannot_be_used(spec, message):
    with pytest.raises(DataError, match=message):
        load_templates(spec)


def test_braces_in_a_name_stay():
    assert fill("a {}.", "{x} {}") == "a {x} {}."


def records(*told):
    """(captions, label) pairs as a source."""
    extras = [{} if label is None else {"cls": label} for _, label in told]
    return Memory([Record(f"k{i}", b"", tuple(c), extras[i]) for i, (c, _) in enumerate(told)])


def test_without_a_file_the_classes_are_what_records_call_theirs():
    """Its only caption, else its label; what has neither is left for training to count."""
    source = records(
        (["dog"], "1"), (["cat"], None), (["dog"], None), ([], b"7"), (["a", "b"], "x"), ([], None)
    )
    classes = classes_of("", source)
    assert classes.names == ("7", "cat", "dog", "x") and classes.labels == ()
    assert [classes.of(record) for record in source.entries[:5]] == [2, 1, 2, 0, 3]
    for record, why in (
        (source[5], "0 captions and no label"),
        (Record("k", b"", ("emu",)), "'emu' is none of the 4"),
    ):
        with pytest.raises(BadRecord, match=why) as refused:
            classes.of(record)
        assert refused.value.reason == "no_class"
    with pytest.raises(DataError, match="memory: its records name 1 class"):
        classes_of("", records((["dog"], None), (["dog"], None)))


def test_with_a_file_records_are_looked_up_in_it(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("n1\tcat\nn2\tdog\n")
    classes = classes_of(str(path), records((["x"], None)))
    assert classes.names == ("cat", "dog") and classes.labels == ("n1", "n2")
    found = records((["a photo of a dog."], None), ([], "n1"), (["bird"], None), (["cat and dog"], None))
    assert [classes.of(record) for record in found.entries[:2]] == [1, 0]
    # A number that is no label of the file would be a line of it; a caption that is a class's name says more.
    assert classes.of(Record("k", b"", ("dog",), {"label": 0})) == 1
    for record in found.entries[2:]:
        with pytest.raises(BadRecord, match="no_class"):
            classes.of(record)


def test_the_shapes_of_scenes_are_classes_in_every_split():
    found = [classes_of("", open_scenes(f"scenes:{split}:single:shape")) for split in ("val", "heldout")]
    assert found[0].names == found[1].names and len(found[0].names) == 12 and "a star" in found[0].names
