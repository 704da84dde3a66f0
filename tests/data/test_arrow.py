"""Hugging Face datasets on disk and parquet files, written by their own packages."""

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import caption, encoded, picture

from vlmjax.data.formats.parquet import ParquetSource
from vlmjax.data.sources import image_sizes, open_source
from vlmjax.errors import BadRecord, DataError

pa = pytest.importorskip("pyarrow")
ROOT = Path(__file__).resolve().parents[2]


def table(count: int, first: int = 0):
    rows = range(first, first + count)
    images = [{"bytes": encoded(picture(i)), "path": f"{i}.png"} for i in rows]
    return pa.table(
        {
            "id": [f"id{i}" for i in rows],
            "image": images,
            "caption": [caption(i) for i in rows],
            "n": list(rows),
        }
    )


def saved(folder: Path, *tables) -> Path:
    """A folder as `Dataset.save_to_disk` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, one in zip(names, tables, strict=True):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, one.schema) as out:
            out.write_table(one, max_chunksize=4)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "x", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def check(source, rows) -> None:
    assert len(source) == len(rows)
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        record = source[i]
        assert record.image == encoded(picture(rows[i])) and record.captions == (
            caption(rows[i]),
        ) == source.captions_at(i)
        assert record.key == source.key(i) == f"id{rows[i]}" and record.extra == {
            "id": f"id{rows[i]}",
            "n": rows[i],
        }
    with pytest.raises(IndexError):
        source[len(rows)]


def test_saved_dataset(tmp_path):
    source = open_source(str(saved(tmp_path / "d", table(7), table(6, 7))))
    check(pickle.loads(pickle.dumps(source)), list(range(13)))
    assert image_sizes(source, [12]).tolist() == [[48, 40]] and getattr(source, "blocks", None) is None
    (tmp_path / "x.arrow").write_bytes(b"")
    with pa.OSFile(str(tmp_path / "x.arrow"), "wb") as sink, pa.ipc.new_file(sink, table(1).schema) as out:
        out.write_table(table(5))
    check(open_source(str(tmp_path / "x.arrow")), list(range(5)))


def test_splits_of_a_saved_dataset(tmp_path):
    saved(tmp_path / "d" / "train", table(5))
    saved(tmp_path / "d" / "test", table(3, 5))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(open_source(str(tmp_path / "d"))) == 5 and len(open_source(str(tmp_path / "d" / "test"))) == 3
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(DataError, match=r"holds the splits a, b: name one, as .*/a"):
        open_source(str(tmp_path / "d"))


def test_dataset_by_the_package_itself(tmp_path):
    """The real writer; the reader loads neither `datasets` nor anything that comes with it."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(picture(i)), "path": None} for i in range(25)],
            "caption": [caption(i) for i in range(25)],
        },
        features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}),
    )
    made.select([3, 1, 24, 8]).save_to_disk(str(tmp_path / "d"), num_shards=2)
    source = open_source(str(tmp_path / "d"))
    assert [source[i].captions for i in range(4)] == [(caption(i),) for i in (3, 1, 24, 8)]
    assert source[2].image == encoded(picture(24)) and source[2].key == "d:2"
    code = "import sys; from vlmjax.data.sources import open_source; open_source(sys.argv[1])[0]\n"
    code += "print(sorted(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "d")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert not {"'datasets'", "'pandas'", "'torch'", "'jax'"} & set(run.stdout.strip("[]\n").split(", "))


def test_fingerprints(tmp_path):
    one = open_source(str(saved(tmp_path / "a" / "d", table(7)))).fingerprint
    same = open_source(str(saved(tmp_path / "b" / "d", table(7)))).fingerprint
    other = open_source(str(saved(tmp_path / "c" / "d", table(7, 1)))).fingerprint
    assert one == same != other


def test_damaged_arrow(tmp_path):
    folder = saved(tmp_path / "d", table(7))
    path = next(folder.glob("*.arrow"))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a whole Arrow file"):
        open_source(str(folder))
    path.unlink()
    with pytest.raises(DataError, match="00000-of-00001.arrow"):
        open_source(str(folder))
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match="not a whole dataset"):
        open_source(str(folder))
    (folder / "state.json").write_text(
        '{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}'
    )
    with pytest.raises(DataError, match="flatten_indices"):
        open_source(str(folder))


def write_parquet(path: Path, one, rows: int) -> None:
    from pyarrow import parquet

    path.parent.mkdir(exist_ok=True, parents=True)
    parquet.write_table(one, path, row_group_size=rows)


def test_parquet(tmp_path):
    write_parquet(tmp_path / "x-0.parquet", table(7), 3)
    write_parquet(tmp_path / "x-1.parquet", table(6, 7), 4)
    source = open_source(f"{tmp_path}/x-*.parquet")
    assert source.blocks.tolist() == [3, 6, 7, 11, 13] and source.blocks.dtype == np.int64
    check(pickle.loads(pickle.dumps(source)), list(range(13)))
    part = open_source(f"{tmp_path}/x-*.parquet", exclude="id[345]$")
    assert part.blocks.tolist() == [3, 4, 8, 10] and part[3].key == "id6"


def test_parquet_keeps_few_groups_and_reads_each_once(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", table(12), 3)
    source = ParquetSource([str(tmp_path / "x.parquet")])
    source._kept.clear()
    seen, real = [], source._read
    monkeypatch.setattr(source, "_read", lambda block, columns: seen.append(block) or real(block, columns))
    threads = [threading.Thread(target=lambda: [source[i] for i in range(12)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(seen) == [0, 1, 2, 3]
    small = ParquetSource([str(tmp_path / "x.parquet")], cache_bytes=1)
    assert small[0].key == "id0" and small[11].key == "id11" and len(small._kept) == 1


def test_parquet_folder_of_the_hub(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", table(3), 3)
    assert len(open_source(str(tmp_path))) == 6
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", table(3), 3)
    with pytest.raises(DataError, match=r"splits test, train: name one, as .*data/train-\*\.parquet"):
        open_source(str(tmp_path))
    assert len(open_source(f"{tmp_path}/data/test-*.parquet")) == 3


def test_columns_of_other_forms(tmp_path):
    """Plain bytes, paths, lists of images, lists of captions, conversations."""
    (tmp_path / "0.png").write_bytes(encoded(picture(0)))
    forms = {
        "bytes": {"jpg": [encoded(picture(0))], "txt": ["a"]},
        "path": {"image": ["0.png"], "caption": ["a"]},
        "lists": {"images": [[{"bytes": encoded(picture(0)), "path": None}] * 2], "captions": [["a", "b"]]},
        "llava": {"image": [{"bytes": encoded(picture(0)), "path": None}],
                  "conversations": [[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "a"}]]},
    }  # fmt: skip
    for name, columns in forms.items():
        write_parquet(tmp_path / f"{name}.parquet", pa.table(columns), 1)
        record = open_source(str(tmp_path / f"{name}.parquet"))[0]
        assert record.image == encoded(picture(0)) and record.captions == (
            ("a", "b") if name == "lists" else ("a",)
        ), name
        assert ("images" in record.extra) == (name == "lists") and ("conversations" in record.extra) == (
            name == "llava"
        )
    with pytest.raises(DataError, match="no column for a caption"):
        write_parquet(tmp_path / "none.parquet", pa.table({"image": ["0.png"]}), 1)
        open_source(str(tmp_path / "none.parquet"))


def test_damaged_parquet(tmp_path):
    write_parquet(tmp_path / "x.parquet", table(40), 5)
    data = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="not a whole parquet file"):
        open_source(str(tmp_path / "cut.parquet"))
    source = open_source(str(tmp_path / "x.parquet"))
    hole = bytearray(data)
    hole[len(data) // 2 : len(data) // 2 + 9000] = os.urandom(9000)
    (tmp_path / "x.parquet").write_bytes(hole)
    bad = set()
    for i in range(40):
        try:
            source[i]
        except BadRecord as error:
            bad.add(error.reason)
    assert bad == {"unreadable_shard"} or not bad
    (tmp_path / "x.parquet").unlink()
    with pytest.raises(BadRecord) as caught:
        pickle.loads(pickle.dumps(source))[39]
    assert caught.value.reason == "unreadable_shard"
    write_parquet(tmp_path / "void.parquet", table(1).slice(0, 0), 5)
    with pytest.raises(DataError, match="has no rows"):
        open_source(str(tmp_path / "void.parquet"))


def test_parquet_groups_are_read_once_by_threads_in_step(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", table(60), 3)
    source = ParquetSource([str(tmp_path / "x.parquet")])
    source._kept.clear()
    seen, real, bar, inside = [], source._read, threading.Barrier(8), source._keep

    def read(*part):
        seen.append(part[0])
        return real(*part)

    monkeypatch.setattr(source, "_read", read)
    monkeypatch.setattr(source, "_keep", lambda *told: time.sleep(0.005) or inside(*told))

    def go() -> None:
        for block in range(20):
            bar.wait(30)
            source._batch(block, None)

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(seen) == list(range(20)) and source._gates == {}


def test_parquet_reads_only_the_columns_wanted(tmp_path, monkeypatch):
    write_parquet(tmp_path / "x.parquet", table(12), 3)
    source = ParquetSource([str(tmp_path / "x.parquet")])
    source._kept.clear()
    seen, real = [], source._read
    monkeypatch.setattr(source, "_read", lambda *part: seen.append(part) or real(*part))
    assert [source.key(i) for i in range(12)] == [f"id{i}" for i in range(12)]
    assert seen == [(block, ("id",)) for block in range(4)]
    assert {one.column_names[0] for one in source._kept.values()} == {"id"}
    assert source.captions_at(4) == (caption(4),) and source[4].image == encoded(picture(4))
    del seen[:]
    assert source.key(3) == "id3" and source.captions_at(5) == (caption(5),) and seen == []


def _stream(path: Path, one, rows: int) -> bytes:
    with pa.OSFile(str(path), "wb") as out, pa.ipc.new_stream(out, one.schema) as writer:
        for batch in one.to_batches(rows):
            writer.write_batch(batch)
    return path.read_bytes()


def _reasons(source) -> list[str]:
    out = []
    for i in range(len(source)):
        try:
            out.append(source[i].captions[0])
        except BadRecord as error:
            out.append(error.reason)
    return out


@pytest.mark.parametrize("offset", [2**31 - 1, -5])
def test_damaged_offsets_do_not_end_the_process(tmp_path, offset):
    one = pa.table({"image": [encoded(picture(i)) for i in range(6)], "caption": list("abcdef")})
    data = bytearray(_stream(tmp_path / "x.arrow", one, 3))
    sizes = [len(image) for image in one["image"].to_pylist()[:3]]
    at = data.find(np.cumsum([0, *sizes]).astype("<i4").tobytes())
    data[at + 8 : at + 12] = np.int32(offset).tobytes()
    (tmp_path / "x.arrow").write_bytes(data)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_arrow import _reasons; from vlmjax.data.sources import open_source\n"
        "print(_reasons(open_source(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.arrow"), str(ROOT), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['a', 'bad_row', 'bad_row', 'd', 'e', 'f']"


def test_a_stream_cut_between_batches_is_told(tmp_path, caplog):
    one = table(6)
    whole = _stream(tmp_path / "x.arrow", one, 2)
    part = _stream(tmp_path / "y.arrow", one.slice(0, 4), 2)
    assert len(open_source(str(tmp_path / "x.arrow"))) == 6 and not caplog.records
    (tmp_path / "y.arrow").write_bytes(whole[: len(part) - 8])
    assert len(open_source(str(tmp_path / "y.arrow"))) == 4
    assert "y.arrow is cut off" in caplog.text


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_text_that_is_not_utf8(tmp_path, kind):
    offsets, letters = np.array([0, 3, 6, 9], "<i4").tobytes(), b"\xff\xfe\xfdabcdef"
    bad = pa.StringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(letters))
    one = pa.table({"image": [encoded(picture(i)) for i in range(3)], "caption": bad})
    path = tmp_path / f"x.{kind}"
    if kind == "arrow":
        _stream(path, one, 3)
    else:
        write_parquet(path, one, 3)
    source = open_source(str(path), exclude="zzz")
    assert _reasons(source) == ["bad_text", "abc", "def"]
    one = one.slice(0, 1)
    if kind == "arrow":
        _stream(path, one, 3)
    else:
        write_parquet(path, one, 3)
    with pytest.raises(DataError, match="first rows cannot be read"):
        open_source(str(path))
