"""TFDS without TensorFlow: a dataset of our own in COCO's form, made and read in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import caption, encoded, picture
from test_tfrecord import example, frame

from vlmjax.data.formats import tfds_coco
from vlmjax.data.sources import open_source
from vlmjax.errors import DataError

# TFDS's own protobuf reader uses what protobuf is about to drop.
pytestmark = pytest.mark.filterwarnings(r"ignore:label\(\) is deprecated:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, pickle, sys
from vlmjax.data.formats import tfds_coco
from vlmjax.data.sources import image_sizes, open_source
sys.exit(tfds_coco.main(["--coco", sys.argv[1], "--out", sys.argv[2]])) if len(sys.argv) == 3 else None
out = {}
for spec in sys.argv[3:]:
    source = pickle.loads(pickle.dumps(open_source(spec)))
    records = [source[i] for i in range(len(source))]
    out[spec] = {"kind": type(source).__name__, "keys": [r.key for r in records], "name": source.name,
        "captions": {r.key: r.captions for r in records}, "images": {r.key: r.image.hex() for r in records},
        "extra": sorted(records[0].extra), "fingerprint": source.fingerprint,
        "sizes": image_sizes(source, [0]).tolist(), "key": source.key(1)}
frameworks = [name for name in ("tensorflow", "jax", "torch") if name in sys.modules]
print("RESULT" + json.dumps([out, frameworks]))
"""


def coco(folder: Path, count: int = 5) -> Path:
    """A folder as COCO's, with one split, a picture without captions, and captions out of order."""
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    images, captions = [], []
    for i in range(count):
        (folder / "val2017" / f"{i:012d}.jpg").write_bytes(encoded(picture(i), "JPEG"))
        images.append({"id": 100 + i, "file_name": f"{i:012d}.jpg", "width": 48, "height": 40})
        captions += [
            {"id": 10 * i + c, "image_id": 100 + i, "caption": f"{caption(i)} {c}"} for c in range(i)
        ]
    data = {"info": {}, "images": images, "annotations": captions[::-1]}
    (folder / "annotations" / "captions_val2017.json").write_text(json.dumps(data))
    return folder


def program(*arguments: str) -> tuple[subprocess.CompletedProcess, list]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run, json.loads(run.stdout.rpartition("RESULT")[2]) if "RESULT" in run.stdout else []


def test_coco_builder_and_source_without_tensorflow(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    run, _ = program(coco(tmp_path / "coco"), tmp_path / "out")
    folder = str(tmp_path / "out" / "coco_pairs" / "1.0.0")
    assert run.stdout.strip().splitlines()[-1] == folder
    specs = [folder, f"tfds:{folder}", f"tfds:{folder}:val2017[:50%]", f"{folder}/*.array_record*"]
    _, (found, frameworks) = program("", "", *specs)
    assert frameworks == []
    whole = found[folder]
    assert whole["kind"] == "TfdsSource" and sorted(whole["keys"]) == ["101", "102", "103", "104"]
    for i in range(1, 5):
        assert sorted(whole["captions"][str(100 + i)]) == [f"{caption(i)} {c}" for c in range(i)]
        assert whole["images"][str(100 + i)] == encoded(picture(i), "JPEG").hex()
    assert whole["extra"] == ["image/filename", "image/id"] and whole["sizes"] == [[48, 40]]
    assert whole["key"] == whole["keys"][1]
    assert found[specs[1]]["images"] == whole["images"] and len(found[specs[2]]["keys"]) == 2
    assert found[specs[2]]["fingerprint"] != whole["fingerprint"] == found[specs[1]]["fingerprint"]
    shards = found[specs[3]]
    assert shards["kind"] == "ArrayRecordSource" and sorted(shards["images"].values()) == sorted(
        whole["images"].values()
    )


def test_errors_of_tfds(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    program(coco(tmp_path / "coco", 3), tmp_path / "out")
    folder = tmp_path / "out" / "coco_pairs" / "1.0.0"
    with pytest.raises(DataError, match=r"there is no split train; it holds val2017"):
        open_source(f"tfds:{folder}:train")
    with pytest.raises(DataError, match="TFDS cannot open it: .*nosuchdataset"):
        open_source("tfds:nosuchdataset")
    next(folder.glob("*.array_record*")).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        open_source(str(folder))


def test_dataset_kept_as_tfrecord(tmp_path, monkeypatch):
    """Existing public data: what TFDS wrote with TensorFlow is read through the index of offsets."""
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setenv("VLMJAX_CACHE", str(tmp_path / "cache"))
    program(coco(tmp_path / "coco", 3), tmp_path / "out")
    folder = tmp_path / "out" / "coco_pairs" / "1.0.0"
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    rows = [
        {"image": [encoded(picture(i), "JPEG")], "captions/text": [b"a", caption(i).encode()]} for i in (1, 2)
    ]
    path = folder / "coco_pairs-val2017.tfrecord-00000-of-00001"
    path.write_bytes(b"".join(frame(example(row)) for row in rows))
    source = open_source(f"tfds:{folder}:val2017")
    assert [source[i].captions for i in range(2)] == [("a", caption(1)), ("a", caption(2))]
    with pytest.raises(DataError, match="only whole splits"):
        open_source(f"tfds:{folder}:val2017[:50%]")


def test_captions_file(tmp_path, capsys):
    folder = coco(tmp_path / "coco", 3)
    path = folder / "annotations" / "captions_val2017.json"
    found = dict(tfds_coco.read_captions(path))
    assert sorted(found) == [101, 102] and [one["id"] for one in found[102]["captions"]] == [21, 20]
    for text, told in (
        ("{}", "not a file of COCO captions"),
        ('{"images": [], "annotations": [{"id": 1, "image_id": 2, "caption": "x"}]}', "does not list"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=told):
            list(tfds_coco.read_captions(path))
    assert tfds_coco.main(["--coco", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "has no captions_train2017.json" in capsys.readouterr().err
