"""The contact sheet shows the rows of training itself, says why others are empty, and keeps data out of the markup."""

import base64
import html.parser
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture, tokenizer, write_tar
from PIL import Image

from vlmjax.data import augment, inspect, pipeline
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError

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


def test_page_holds_the_rows_of_training(shard, tmp_path, capsys):
    one = tokenizer(tmp_path / "tokenizer", 6)
    out = tmp_path / "page.html"
    arguments = [
        str(shard),
        f"--out={out}",
        "--step=3",
        "--seed=2",
        "--batch-size=8",
        "--show=6",
        "--image-size=32",
    ]
    inspect.main(
        [*arguments, f"--tokenizer={tmp_path / 'tokenizer'}", "--max-length=6", "--augment=flip=0.5",
         "--augment=crop_scale=(0.3, 1.0)", "--augment=policy=randaugment(2, 9)"]
    )  # fmt: skip
    transform = augment.TrainTransform(
        32, {"flip": 0.5, "crop_scale": (0.3, 1.0), "policy": "randaugment(2, 9)"}
    )
    data = pipeline.TrainData(
        open_source(str(shard)),
        transform,
        one,
        batch_size=8,
        seed=2,
        start_step=3,
        threads=2,
        max_bad_share=1.0,
    )
    batch = next(data)
    data.close()
    page = Page(out.read_text())
    valid = batch["valid"][:6]
    assert 3 <= valid.sum() < 6, "the seed should show good rows and a bad one"
    np.testing.assert_array_equal(np.array(page.pictures), batch["pixel_values"][:6][valid])
    words = " ".join(page.texts)
    for row in np.flatnonzero(valid):
        ids = batch["input_ids"][row][batch["attention_mask"][row] > 0]
        assert " ".join(one.tokens(ids)) in words
    assert "script" not in page.tags and f"{valid.sum()} of 6" in words
    shown = capsys.readouterr().out
    assert "pixel_values" in shown and "unusable" in shown and f"wrote {out}" in shown.replace("\n", "")


def test_reasons_and_markup(shard, tmp_path):
    out = tmp_path / "page.html"
    inspect.main([str(shard), f"--out={out}", "--image-size=16", "--tokenizer=bpe:600", "--captions=first"])
    page = Page(out.read_text())
    words = " ".join(page.texts)
    assert "truncated" in words and "no_caption" in words and words.count("masked out of the loss") == 2
    assert "<script>alert('x')</script> & more" in words and "script" not in page.tags
    assert len(page.pictures) == 8


def test_settings_of_augmentation():
    given = ["flip=0.5", "crop_scale=(0.3, 1)", "policy=blip(2, 5)", "jitter=0.4"]
    wanted = {"flip": 0.5, "crop_scale": (0.3, 1), "policy": "blip(2, 5)", "jitter": 0.4}
    assert inspect.augmentation(given) == wanted
    with pytest.raises(DataError, match="--augment=flip is not name=value"):
        inspect.augmentation(["flip"])


def test_mistakes_are_one_line(shard, tmp_path):
    for arguments, words in (
        (["none.tar"], "no such data file"),
        ([shard, "--augment=flop=1"], "did you mean 'flip'"),
        ([shard, "--tokenizer=bpe:9"], "a number from 514 up"),
        ([shard, "--captions=longest"], "captions='longest'"),
        ([shard, f"--out={tmp_path}"], "cannot be written"),
    ):
        command = [sys.executable, "-m", "vlmjax.data.inspect", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in (1, 78) and words in done.stderr and done.stderr.count("\n") == 1, (
            done.stderr
        )


def test_help_is_quick_and_imports_nothing_heavy():
    code = "import sys; from vlmjax.data import inspect; inspect.make_parser(); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"jax", "numpy", "PIL", "transformers", "grain", "rich"} & set(eval(done.stdout))
