"""What a recipe says of its data, as objects."""

import pytest
from helpers import Memory, memory

from vlmjax import config
from vlmjax.data import recipe as recipes
from vlmjax.data.record import Record
from vlmjax.data.sources import Concat
from vlmjax.errors import BadRecord, DataError, RecipeError


def recipe(**changes):
    """The built-in tiny recipe, with keys changed: data__train="x.tar"."""
    made = config.tiny(config.recipe())
    for path, value in changes.items():
        *groups, key = path.split("__")
        node = made
        for group in groups:
            node = node[group]
        node[key] = value
    return config.validate(made)


class Words(Memory):
    """Records that have captions and no picture worth reading; None is a damaged one. `read` counts."""

    read = 0

    def __init__(self, captions):
        super().__init__(
            [
                BadRecord("truncated", str(i)) if c is None else Record(str(i), b"", c)
                for i, c in enumerate(captions)
            ]
        )

    def __getitem__(self, i):
        self.read += 1
        return super().__getitem__(i)


def test_an_imported_model_keeps_its_tokenizer():
    named = {"init_from": "openai/clip", "data__tokenizer": "bpe:514"}
    assert recipes.tokenizer_name(recipe(**named)) == "openai/clip"
    assert recipes.tokenizer_name(recipe(**named | {"data__tokenizer": ""})) == "openai/clip"
    assert recipes.tokenizer_name(recipe(**named | {"data__tokenizer": "my/words"})) == "my/words"


def test_captions_are_read_up_to_a_number(monkeypatch):
    monkeypatch.setattr(recipes, "BPE_CAPTIONS", 5)
    source = Words([("a", "b", "c"), None, (), ("d", "e", "f"), ("g", "h", "i"), ("j", "k", "l")])
    found = list(recipes.sample_captions(source))
    assert source.read <= 5 and 3 <= len(set(found)) == len(found) <= 5


def test_captions_come_from_every_part_of_the_data(monkeypatch):
    monkeypatch.setattr(recipes, "BPE_CAPTIONS", 40)
    found = list(recipes.sample_captions(Concat([Words([("one",)] * 5000), Words([("two",)] * 5000)])))
    assert len(found) == 40 and 10 < found.count("two") < 30


def test_captions_of_scenes_are_those_of_the_records():
    (source,), shares = recipes.open_train_sources(recipe())
    assert shares == (1.0,)
    assert [source.captions_at(i) for i in range(5)] == [source[i].captions for i in range(5)]


def test_a_tokenizer_is_named_or_learned(tmp_path):
    source = memory(60)
    learned = recipes.open_tokenizer("bpe:540", source, 12)
    assert 514 < learned.vocab_size <= 540 and learned.max_length == 12
    learned.save(tmp_path / "words")
    assert recipes.open_tokenizer(str(tmp_path / "words"), None, 12).encode("red") == learned.encode("red")
    with pytest.raises(DataError, match="no tokenizer folder"):
        recipes.open_tokenizer(str(tmp_path / "none"), None, 12)
    for name in ("bpe:", "bpe:many", "bpe:513"):
        with pytest.raises(DataError, match="expected 'bpe:' and a number from 514"):
            recipes.open_tokenizer(name, source, 12)


def test_what_cannot_be_opened_names_its_key(tmp_path):
    with pytest.raises(RecipeError, match="config.data.train: no such data file"):
        recipes.open_train_sources(recipe(data__train=f"{tmp_path}/x.tar"))
    with pytest.raises(RecipeError, match="config.evals.x: gone") as caught, recipes.naming("evals.x"):
        raise DataError("gone")
    assert caught.value.exit_code == 78
