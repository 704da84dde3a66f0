"""The contact sheet shows the rows of training itself, says why others are empty, and keeps data out of the markup."""

import base64
import html.parser
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture, tokenizer, write_tar
from PIL import Image

from vlmjax.data import augment, inspect, mixture, pipeline
from vlmjax.data import recipe as recipes
from vlmjax.data.scenes import open_scenes
from vlmjax.data.sources import open_sources, together

# Of ml_collections, which reads recipes so.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="shard")
def _shard(tmp_path):
    """Ten records: two captions each, markup in the first, one damaged image, one without a caption."""
    members = {}
    for i in range(10):
        members[f"{i}.png"] = encoded(picture(i))[: 200 if i == 4 else None]
        if i != 7:
            second = "<script>alert('x')</script> & more" if i == 0 else caption(i + 50)
            members[f"{i}.json"] = f'{{"captions": ["{caption(i)}", "{second}"]}}'.encode()
    return write_tar(tmp_path / "x.tar", members)


class Page(html.parser.HTMLParser):
    """Pictures, texts and tags of a page."""

    def __init__(self, data: str):
        super().__init__()
        self.pictures, self.texts, self.tags = [], [], set()
        self.feed(data)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        source = dict(attrs).get("src", "")
        if source.startswith("data:image/png;base64,"):
            self.pictures.append(
                np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))
            )

    def handle_data(self, data):
        self.texts.append(data)


STEP = 7
RECIPE = """
from vlmjax import config

def get_config(arg=""):
    c = config.recipe()
    c.total = config.duration(steps=9)
    c.batch_size, c.seed = 8, 2
    c.model.image.update({"image_size": 32, "patch_size": 8})
    c.model.text.max_length = 24
    c.data.augment = config.augmentation(flip=0.5, crop_scale=(0.3, 1.0), policy="randaugment(2, 9)")
    c.data.tokenizer = "bpe:600"
    return config.choose(c, arg)
"""


@pytest.fixture(name="recipe")
def _recipe(tmp_path, shard):
    """The options of a trainer: a recipe of two sources in unequal shares, with templates and a background."""
    members = {f"t{i}.png": encoded(picture(20 + i, channels=4)) for i in range(12)}
    members |= {f"t{i}.txt": caption(20 + i).encode() for i in range(12)}
    other = write_tar(tmp_path / "y.tar", members)
    (tmp_path / "recipe.py").write_text(RECIPE)
    return [
        f"--config={tmp_path / 'recipe.py'}",
        f"--config.data.train={shard},{other}",
        "--config.data.mix=equal",
        "--config.data.weights=(0.25, 0.75)",
        "--config.data.templates=('a photo of {caption}', '{caption}, on a table')",
        "--config.data.background=(9, 200, 30)",
    ]


def test_page_holds_the_rows_of_training(recipe, tmp_path, capsys):
    out = tmp_path / "page.html"
    inspect.main([*recipe, f"--out={out}", f"--step={STEP}", "--show=6"])
    sources = open_sources(recipe[1].partition("=")[2])
    one = recipes.open_tokenizer("bpe:600", together(sources), 24)
    settings = {"flip": 0.5, "crop_scale": (0.3, 1.0), "policy": "randaugment(2, 9)"}
    data = pipeline.TrainData(
        sources,
        augment.TrainTransform(32, settings, background=(9, 200, 30)),
        one,
        batch_size=8,
        shares=mixture.shares([10, 12], "equal", (0.25, 0.75)),
        seed=2,
        start_step=STEP,
        threads=2,
        max_bad_share=1.0,
        templates=("a photo of {caption}", "{caption}, on a table"),
        background=(9, 200, 30),
    )
    batch = next(data)
    data.close()
    page = Page(out.read_text())
    valid = batch["valid"][:6]
    assert 3 <= valid.sum() < 6, "the seed should show good rows and a bad one"
    np.testing.assert_array_equal(np.array(page.pictures), batch["pixel_values"][:6][valid])
    assert {key.startswith("t") for key in batch["key"][:6][valid]} == {True, False}, "of both sources"
    words = " ".join(page.texts)
    for row in np.flatnonzero(valid):
        ids = batch["input_ids"][row][batch["attention_mask"][row] > 0]
        assert " ".join(one.tokens(ids)) in words
    assert "a photo of" in words or "on a table" in words
    assert "script" not in page.tags and f"{valid.sum()} of 6" in words
    shown = capsys.readouterr().out
    assert "pixel_values" in shown and "unusable" in shown and f"wrote {out}" in shown.replace("\n", "")


def test_the_background_and_the_text_of_a_row_are_shown(recipe, shard, tmp_path):
    out, pages = tmp_path / "page.html", []
    for background in ((9, 200, 30), (250, 0, 0)):
        inspect.main([*recipe[:-1], f"--config.data.background={background}", f"--out={out}", "--show=4"])
        pages.append(Page(out.read_text()))
    assert any((a != b).any() for a, b in zip(pages[0].pictures, pages[1].pictures, strict=True))
    inspect.main([recipe[0], str(shard), recipe[4], "--config.data.captions=all", f"--out={out}", "--show=8"])
    both = {
        f"a photo of {caption(i)} {caption(i + 50)}" for i in range(10)
    }  # a template around two captions joined
    assert both & set(Page(out.read_text()).texts)


def test_reasons_and_markup(shard, tmp_path):
    out = tmp_path / "page.html"
    keys = ["--config.model.image.image_size=32", "--config.data.captions=first"]
    inspect.main([str(shard), f"--out={out}", *keys])
    page = Page(out.read_text())
    words = " ".join(page.texts)
    assert "truncated" in words and "no_caption" in words and words.count("masked out of the loss") == 2
    assert "<script>alert('x')</script> & more" in words and "script" not in page.tags
    assert len(page.pictures) == 8


def test_mistakes_are_one_line(shard, tmp_path, capsys):
    for arguments, words in (
        (["none.tar"], "no such data file"),
        ([shard, "--config.data.augment.flop=1"], "did you mean 'flip'"),
        ([shard, "--config.data.tokenizer=bpe:9"], "a number from 514"),
        ([shard, "--config.data.captions=longest"], "captions='longest'"),
        ([shard, f"--out={tmp_path}"], "cannot be written"),
        (["--config=none.py", "--config.seed=3"], "--config=none.py: no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            inspect.main(list(map(str, arguments)))
        told = capsys.readouterr().err
        assert ended.value.code in (1, 78) and words in told and told.count("\n") == 1, told


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from vlmjax.data import inspect; inspect.make_parser(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "PIL", "transformers", "grain", "rich"} & set(eval(done.stdout))


TALK = """
from vlmjax import config

def get_config(arg=""):
    c = config.tiny(config.recipe())
    c.stage, c.data.train, c.data.packing, c.data.images_per_row = "generative", "scenes:full:questions", True, 2
    c.data.conversation.template, c.data.tokenizer = "mistral_instruct", "TOKENIZER"
    c.evals = config.Config()
    return c
"""


@pytest.mark.slow
def test_rows_of_conversations_are_shown_with_what_is_learned(tmp_path, capsys):
    tokenizer(tmp_path / "words")
    (tmp_path / "talk.py").write_text(TALK.replace("TOKENIZER", str(tmp_path / "words")))
    inspect.main([f"--config={tmp_path / 'talk.py'}", "--show=3"])
    lines, source = capsys.readouterr().out.splitlines(), open_scenes("scenes:full:questions")
    heads = [n for n, line in enumerate(lines) if line.startswith("row ")]
    assert [lines[n].split(":")[0] for n in heads] == ["row 0", "row 1", "row 2"]
    keys = [key for n in heads for key in lines[n].split(" | ")[0].split(": ")[1].split()]
    shown = [line for n, line in enumerate(lines) if n not in heads]
    assert len(shown) == len(keys) > 3
    for key, line in zip(keys, shown, strict=True):
        turns = source.turns_at(int(key.rpartition("/")[2]))
        found = [re.sub(r" ?<\|endoftext\|>", "", said).split() for said in re.findall(r"\{(.*?)\}", line)]
        assert found == [turn["value"].split() for turn in turns[1::2]]
        assert re.findall(r"\[image \d: (\d+)\]", line) == ["16"]
    with pytest.raises(SystemExit) as caught:
        inspect.main([f"--config={tmp_path / 'talk.py'}", "--show=1", f"--out={tmp_path / 'x.html'}"])
    assert caught.value.code == 78 and "--out: pages are of pairs" in capsys.readouterr().err
