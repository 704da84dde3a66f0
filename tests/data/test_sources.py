"""What a recipe's data line opens: patterns, tables, folders, mixtures, filters, and the errors."""

import json
import os
import pickle

import numpy as np
import pytest
from helpers import caption, encoded, picture, shard

from vlmjax.data.formats import folder, kinds
from vlmjax.data.record import Record
from vlmjax.data.sources import (
    Concat,
    EachCaption,
    Source,
    captions_of,
    image_sizes,
    key_of,
    open_source,
    open_sources,
    split_spec,
)
from vlmjax.data.storage import files
from vlmjax.errors import BadRecord, DataError


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    """Indexes made on first use stay inside the test."""
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_braces():
    assert files.expand_braces("x-{08..10}.tar") == ["x-08.tar", "x-09.tar", "x-10.tar"]
    assert files.expand_braces("x-{9..11}") == ["x-9", "x-10", "x-11"]
    assert files.expand_braces("{a,b}-{0..1}") == ["a-0", "a-1", "b-0", "b-1"]
    assert files.expand_braces("{2..0}") == ["2", "1", "0"]
    assert len(files.expand_braces("cc12m-{00000..01242}.tar")) == 1243
    assert split_spec("a-{0,1}.tar, b.tar,") == ["a-{0,1}.tar", "b.tar"]


def test_missing_data_says_what_is_there(tmp_path):
    shard(tmp_path / "train-0001.tar", 0, 1)
    with pytest.raises(DataError, match=r"trian-0001.*train-0001\.tar"):
        open_source(str(tmp_path / "trian-0001.tar"))
    with pytest.raises(DataError, match=r"nothing matches.*valid-\*"):
        open_source(str(tmp_path / "valid-*.tar"))
    with pytest.raises(DataError, match=r"train-0002\.tar \(and 1 more of its 3 files\)"):
        open_source(str(tmp_path / "train-{0001..0003}.tar"))
    with pytest.raises(DataError, match="there is no folder"):
        open_source(str(tmp_path / "nowhere" / "x.tar"))
    with pytest.raises(DataError, match="no data given"):
        open_source("")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.zip: not a kind of data"):
        open_source(str(tmp_path / "x.zip"))
    with pytest.raises(DataError, match="holdout"):
        open_source("scenes:holdout")


def test_several_sources_and_filters(tmp_path):
    shard(tmp_path / "a.tar", 0, 4)
    shard(tmp_path / "b.tar", 4, 4)
    both = open_source((str(tmp_path / "b.tar"), str(tmp_path / "a.tar")))
    assert isinstance(both, Source)
    assert [both[i].key for i in range(8)] == [f"{i:06d}" for i in (4, 5, 6, 7, 0, 1, 2, 3)]
    spec = f"{tmp_path}/a.tar,{tmp_path}/b.tar"
    some = open_source(spec, exclude="[135]$", keep=lambda key: key != "000002")
    assert [some[i].key for i in range(len(some))] == ["000000", "000004", "000006", "000007"]
    assert some.key(1) == "000004"
    assert len({open_source(spec).fingerprint, both.fingerprint, some.fingerprint}) == 3
    assert open_source(spec, exclude="[135]$").fingerprint == open_source(spec, exclude="[135]$").fingerprint
    with pytest.raises(DataError, match="no example"):
        open_source(spec, exclude="0")
    with pytest.raises(DataError, match="not a regular expression"):
        open_source(spec, exclude="(")
    with pytest.raises(IndexError):
        both[8]


def test_folder_of_shards(tmp_path):
    shard(tmp_path / "b.tar", 2, 2)
    shard(tmp_path / "a.tar", 0, 2)
    source = open_source(str(tmp_path))
    assert [source[i].key for i in range(4)] == [f"{i:06d}" for i in range(4)]


def _images(folder, count=3):
    (folder / "img").mkdir()
    for i in range(count):
        (folder / "img" / f"{i}.png").write_bytes(encoded(picture(i)))


def test_jsonl(tmp_path):
    _images(tmp_path)
    rows = [
        {"file_name": "img/0.png", "caption": "zero", "licence": "x"},
        {"file_name": "img/1.png", "caption": ["one", "uno"]},
        {"file_name": "img/9.png", "caption": "gone"},
        {"file_name": None, "caption": "none"},
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\nnot json\n", encoding="utf-8")
    source = open_source(str(tmp_path))
    assert len(source) == 5 and source[0].image == encoded(picture(0))
    assert source[0].captions == ("zero",) and source[0].extra == {"licence": "x"}
    assert source[1].captions == ("one", "uno") and source[1].key == "img/1.png"
    for i, reason in ((2, "missing_file"), (3, "no_image"), (4, "bad_row")):
        with pytest.raises(BadRecord) as caught:
            source[i]
        assert caught.value.reason == reason


@pytest.mark.parametrize(("name", "delimiter"), [("x.csv", ","), ("x.tsv", "\t")])
def test_csv_and_tsv(tmp_path, name, delimiter):
    _images(tmp_path)
    lines = [["Filepath", "title", "n"], ["img/0.png", '"a, b"', "1"], ["img/1.png", "c", "2"]]
    text = "\n".join(delimiter.join(line) for line in lines)
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    source = open_source(str(tmp_path / name))
    assert [source[i].captions for i in range(2)] == [("a, b",), ("c",)]
    assert source[1].extra == {"n": "2"}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.jsonl"])
def test_a_table_in_another_encoding_is_refused(tmp_path, name, encoding):
    (tmp_path / name).write_bytes("image,caption\n0.png,café\n".encode(encoding))
    with pytest.raises(DataError, match=rf"{name} is not UTF-8 \(byte 0x.* at \d+\): save it as UTF-8"):
        open_source(str(tmp_path / name))


def test_a_line_separator_inside_a_caption_does_not_cut_its_row(tmp_path):
    row = json.dumps({"image": "0.png", "caption": "a\u2028b"}, ensure_ascii=False)
    (tmp_path / "x.jsonl").write_text(f"{row}\r\n", encoding="utf-8", newline="")
    (tmp_path / "0.png").write_bytes(encoded(picture(0)))
    source = open_source(str(tmp_path / "x.jsonl"))
    assert len(source) == 1 and source[0].captions == ("a b",)


def test_half_a_surrogate_pair_in_a_caption_is_replaced(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"image": "0.png", "caption": "a \ud83d b"}) + "\n")
    (tmp_path / "0.png").write_bytes(encoded(picture(0)))
    assert open_source(str(tmp_path / "x.jsonl"))[0].captions == ("a ? b",)


def test_lone_quotes_in_tsv(tmp_path):
    _images(tmp_path)
    (tmp_path / "x.tsv").write_text('image\tcaption\nimg/0.png\t5" wide\nimg/1.png\t"so\n', encoding="utf-8")
    source = open_source(str(tmp_path / "x.tsv"))
    assert [source[i].captions for i in range(len(source))] == [('5" wide',), ('"so',)]


def test_columns_with_other_names(tmp_path):
    _images(tmp_path)
    (tmp_path / "x.csv").write_text("pic,de,en\n0.png,null,zero\n1.png,eins,one\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"no column for an image.*it has pic, de, en.*image_column"):
        open_source(str(tmp_path / "x.csv"))
    with pytest.raises(DataError, match="no column for a caption"):
        open_source(str(tmp_path / "x.csv"), image_column="pic")
    options = {"image_column": "pic", "caption_columns": ("de", "en"), "image_root": str(tmp_path / "img")}
    source = open_source(str(tmp_path / "x.csv"), **options)
    assert source[1].captions == ("eins", "one") and source[1].image == encoded(picture(1))
    (tmp_path / "empty.csv").write_text("image,caption\n")
    with pytest.raises(DataError, match="no rows"):
        open_source(str(tmp_path / "empty.csv"))


def test_images_with_text_beside(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    (tmp_path / "a.txt").write_text(caption(0))
    (tmp_path / "sub" / "b.JPG").write_bytes(b"jpeg")
    (tmp_path / "sub" / "b.json").write_text('{"captions": ["x", "y"]}')
    source = open_source(str(tmp_path))
    assert [(source[i].key, source[i].captions) for i in range(2)] == [
        ("a", (caption(0),)),
        ("sub/b", ("x", "y")),
    ]
    (tmp_path / "void").mkdir()
    with pytest.raises(DataError, match="neither a table"):
        open_source(str(tmp_path / "void"))
    for name in ("one.jsonl", "two.csv"):
        (tmp_path / "void" / name).write_text("x")
    with pytest.raises(DataError, match=r"several tables \(one\.jsonl, two\.csv\)"):
        open_source(str(tmp_path / "void"))


def test_remote_shards(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for i in range(2):
        local = shard(tmp_path / "x.tar.gz", i * 3, 3, "w:gz")
        memory.pipe(f"/bucket/x-{i}.tar.gz", local.read_bytes())
    cache = str(tmp_path / "cache")
    for spec in ("memory://bucket/x-{0..1}.tar.gz", "memory://bucket/x-*.tar.gz"):
        source = open_source(spec, cache=cache)
        assert [source[i].key for i in range(len(source))] == [f"{i:06d}" for i in range(6)]
    with pytest.raises(DataError, match="cannot reach memory://bucket/y"):
        open_source("memory://bucket/y.tar", cache=cache)
    with pytest.raises(DataError, match="nothing matches"):
        open_source("memory://bucket/y-*.tar", cache=cache)
    with pytest.raises(DataError, match="install fsspec and its driver for nosuch"):
        open_source("nosuch://bucket/y.tar", cache=cache)


def test_scenes():
    source = open_source("scenes", seed=3, image_size=(32, 48), exclude=".")
    assert source[0].image.shape == (48, 48, 3) and len(source) > 1000


def test_reference_table(shared_path):
    source = open_source(str(shared_path("data/clip_pairs")))
    assert len(source) == 8 and source[1].captions == ("a facial photo of a tabby cat",)


def test_one_source_for_each_part(tmp_path):
    shard(tmp_path / "a.tar", 0, 4)
    shard(tmp_path / "b.tar", 4, 3)
    sources = open_sources(f"{tmp_path}/a.tar,{tmp_path}/b.tar")
    assert [len(source) for source in sources] == [4, 3] and sources[1].name == f"{tmp_path}/b.tar"
    sources = open_sources((f"{tmp_path}/a.tar", "scenes"), exclude="000003", image_size=32)
    assert len(sources[0]) == 3 and sources[1].name.startswith("scenes")
    assert len(open_sources(f"{tmp_path}/a.tar,{tmp_path}/b.tar", exclude="00000[0-3]")) == 1


def test_the_same_file_twice_is_refused(tmp_path):
    for name in "abc":
        shard(tmp_path / f"{name}.tar", 0, 2)
    (tmp_path / "link.tar").symlink_to(tmp_path / "a.tar")
    here = str(tmp_path)
    for spec in (f"{here}/a.tar,{here}/a.tar", f"{here}/{{a,b}}.tar,{here}/link.tar", f"{here}/{{a,a}}.tar"):
        with pytest.raises(DataError, match=r"a\.tar is in .*name each file once"):
            open_source(spec)
    with pytest.raises(DataError, match="'scenes' twice"):
        open_source("scenes,scenes")


def test_files_of_several_kinds_and_of_none(tmp_path):
    shard(tmp_path / "a.tar", 0, 2)
    (tmp_path / "b.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"several kinds \(parquet, tar\)"):
        open_source(f"{tmp_path}/*")
    kinds_of = {
        "x.tar.gz": "tar", "x-train.tfrecord-00000-of-00010": "TFRecord", "x.tfrecords.gz": "TFRecord",
        "x.array_record-00000-of-00001": "ArrayRecord", "x.arrayrecord": "ArrayRecord", "x.JSONL": "table",
        "gs://b/x.tar?generation=1": "tar", "x.arrow": "Arrow", "x.tar.index": None, "x": None, "tfrecord": None,
    }  # fmt: skip
    assert {name: kinds.kind_of(name) for name in kinds_of} == kinds_of


class Blocks:
    """A source that only knows its blocks and what it was asked to prepare."""

    def __init__(self, name: str, count: int, ends: list[int] | None):
        self.name = self.fingerprint = name
        self.count, self.asked = count, []
        if ends is not None:
            self.blocks = np.array(ends, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Record:
        return Record(f"{self.name}{i}", b"", ())

    def prepare(self, indices) -> None:
        self.asked += np.asarray(indices).tolist()


def test_blocks_of_several_parts_and_of_some_rows():
    a, b, c = Blocks("a", 5, [2, 5]), Blocks("b", 4, None), Blocks("c", 3, [3])
    both = Concat([a, b, c])
    assert both.blocks.tolist() == [2, 5, 9, 12] and Concat([b]).blocks is None
    both.prepare([11, 4, 6, 0])
    assert (a.asked, b.asked, c.asked) == ([4, 0], [1], [2]) and both.column("width") is None
    rows = np.array([0, 3, 4, 9, 11])
    part = folder.Subset(both, rows)
    # The oracle: the block of each row, and where it changes.
    of = [int(np.searchsorted(both.blocks, row, side="right")) for row in rows]
    ends = [i + 1 for i in range(len(of)) if i + 1 == len(of) or of[i] != of[i + 1]]
    assert part.blocks.tolist() == ends == [1, 3, 5]
    part.prepare([4])
    assert c.asked == [2, 2] and folder.Subset(both, rows[::-1]).blocks is None
    assert folder.Subset(both, rows[1:]).blocks.tolist() == [2, 4]


@pytest.mark.slow
def test_every_folder_of_the_reference_data_opens(shared_path, tmp_path):
    expected = {"webdataset": 190, "nlvr": 700, "emoji": 5085, "caltech101": 1400, "clip_pairs": 8}
    for name, count in expected.items():
        source = pickle.loads(pickle.dumps(open_source(str(shared_path("data") / name), cache=str(tmp_path))))
        bad = 0
        for i in range(0, len(source), 7):
            try:
                assert image_sizes(source, [i]).min() > 0 or not source[i].image
                assert source[i].key == key_of(source, i)
                assert source[i].captions == captions_of(source, i)
            except BadRecord as error:
                assert name == "webdataset" and error.reason == "no_image"  # msgpack alone
                bad += 1
        assert len(source) == count and bad == (15 if name == "webdataset" else 0), (name, bad)
    weird = str(shared_path("data/weird_images"))
    assert len(open_source(weird, image_column="file", caption_columns="pil_format")) == 50


def test_a_table_about_something_else_does_not_hide_the_images(tmp_path, caplog):
    """A list of licences beside images: the images are the source; a table alone, or columns named, is an error."""
    (tmp_path / "index.tsv").write_text("file\tlicence\na.png\tMIT\n")
    with pytest.raises(DataError, match="no column for a caption"):
        open_source(str(tmp_path))
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    source = open_source(str(tmp_path))
    assert len(source) == 1 and source[0].key == "a" and source[0].captions == ()
    assert "not its table" in caplog.text and "no column for a caption" in caplog.text
    with pytest.raises(DataError, match="no column for a caption"):
        open_source(str(tmp_path), caption_columns="title")


def test_fingerprint_of_a_folder_of_pairs(tmp_path):
    """Names alone do not tell data apart: an image or a caption of another length does."""
    prints = []
    for name, image, text in (("a", 0, "one"), ("b", 0, "one"), ("c", 1, "one"), ("d", 0, "three")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(encoded(picture(image, 20 + image)))
        (tmp_path / name / "x.txt").write_text(text)
        prints.append(open_source(str(tmp_path / name)).fingerprint)
    assert prints[0] == prints[1] and len(set(prints)) == 3
    (tmp_path / "a" / "x.png").write_bytes(encoded(picture(7, 50)))
    assert open_source(str(tmp_path / "a")).fingerprint != prints[0]


@pytest.mark.parametrize(
    "pattern", ["x-{0..9999999}.tar", "x-{0..999}{0..999}{0..9}.tar", "x-{0..%s}.tar" % ("9" * 5000)]
)
def test_ranges_of_too_many_names(pattern):
    with pytest.raises(DataError, match="more than 1,000,000 files"):
        open_source(pattern)


def test_pipes_are_no_data(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match="is a pipe or a device"):
        open_source(str(tmp_path / "x.tar"))
    shard(tmp_path / "y.tar", 0, 2)
    os.mkfifo(tmp_path / "y.tar.index")
    with pytest.raises(DataError, match="y.tar.index is a pipe or a device"):
        open_source(str(tmp_path / "y.tar"))
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "t.jsonl").write_text('{"image": "a.jpg", "caption": "a cat"}\n')
    with pytest.raises(BadRecord) as caught:
        open_source(str(tmp_path / "t.jsonl"))[0]
    assert caught.value.reason == "not_a_file"


def test_names_that_no_file_can_have_and_deep_nesting(tmp_path):
    deep = "[" * 5000 + '"x"' + "]" * 5000
    lines = [
        '{"image": "a.jpg", "caption": "a cat"}',
        '{"image": "a\\u0000b.jpg", "caption": "a cat"}',
        '{"image": "a.jpg", "caption": ' + "[" * 200 + '"x"' + "]" * 200 + "}",
        '{"image": "a.jpg", "caption": %s}' % ("[" * 200_000 + "]" * 200_000),
    ]
    (tmp_path / "a.jpg").write_bytes(encoded(picture(0), "JPEG"))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    source, reasons = open_source(str(tmp_path / "t.jsonl")), []
    for i in range(len(source)):
        try:
            assert source[i].captions == ("a cat",)
        except BadRecord as error:
            reasons.append(error.reason)
    assert reasons == ["no_image", "bad_json", "bad_row"]
    (tmp_path / "l.json").write_text("[" * 200_000)
    with pytest.raises(DataError, match="not a json list"):
        open_source(str(tmp_path / "l.json"))
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.jpg").write_bytes(encoded(picture(0), "JPEG"))
    (tmp_path / "pairs" / "a.json").write_text(f'{{"caption": {deep}}}')
    with pytest.raises(BadRecord, match="bad_json"):
        open_source(str(tmp_path / "pairs"))[0]


def test_a_row_whose_key_cannot_be_read_is_kept(monkeypatch, tmp_path):
    shard(tmp_path / "x.tar", 0, 3)

    def key(source, i):
        if i == 1:
            raise BadRecord("unreadable_shard", "?")
        return f"k{i}"

    monkeypatch.setattr("vlmjax.data.sources.key_of", key)
    assert len(open_source(str(tmp_path / "x.tar"), exclude="k2")) == 2


def test_one_table_in_two_folders_of_images(tmp_path):
    for name, size in ("a", 40), ("b", 60), ("c", 40):
        (tmp_path / name).mkdir()
        for i in range(40):
            (tmp_path / name / f"{i}.png").write_bytes(encoded(picture(i, size if i == 39 else 20)))
        rows = [json.dumps({"image": f"{i}.png", "caption": caption(i)}) for i in range(40)]
        (tmp_path / name / "t.jsonl").write_text("\n".join(rows))
    a, b, c = (open_source(str(tmp_path / name / "t.jsonl")).fingerprint for name in "abc")
    assert a == c != b


def test_each_caption_is_an_example():
    class Pictures:
        name, fingerprint = "pictures", "f"
        blocks = np.array([2, 4])

        def __len__(self):
            return 4

        def __getitem__(self, i):
            if i == 1:
                raise BadRecord("truncated", "p1")
            captions = [(), (), ("a",), ("b", "c", "d")][i]
            return Record(f"p{i}", b"image", captions)

    each = EachCaption(Pictures())
    assert len(each) == 6 and each.blocks.tolist() == [2, 6] and each.fingerprint != "f"
    assert [(each[i].key, each[i].captions) for i in (0, 2, 3, 4, 5)] == [
        ("p0#0", ()), ("p2#0", ("a",)), ("p3#0", ("b",)), ("p3#1", ("c",)), ("p3#2", ("d",)),
    ]  # fmt: skip
    assert each.captions_at(4) == ("c",) and each.key(4) == "p3#1" and each.part_name(4) == "pictures"
    with pytest.raises(BadRecord, match="truncated"):
        each[1]
    with pytest.raises(IndexError, match="there are 6"):
        each[6]
    again = pickle.loads(pickle.dumps(EachCaption(open_source("scenes:val:single:all"))))
    assert len(again) > len(open_source("scenes:val")) and len(again[1].captions) == 1
