"""METEOR and SPICE by their programs: what is missing is named, and the way of talking to them, with stand-ins."""

import os
import sys
from pathlib import Path

import pytest

from vlmjax.errors import DataError, UserError
from vlmjax.evals import caption, caption_java

REFERENCES = {1: ["A dog.", "One ||| dog"], 2: ["a cat"]}
CAPTIONS = {1: "a dog", 2: "a bird"}

METEOR = """
import sys
for line in sys.stdin:
    kind, *fields = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(fields), fields[-1].replace(" ", "_"), flush=True)
    else:
        for field in fields + ["0 whole"]:
            print(len(field) / 100, flush=True)
"""
SPICE = """
import json, sys
out = sys.argv[sys.argv.index("-out") + 1]
rows = json.load(open(sys.argv[sys.argv.index("-jar") + 2]))
scores = [{"image_id": row["image_id"], "scores": {"All": {"f": len(row["refs"]) / 4}}} for row in reversed(rows)]
json.dump(scores, open(out, "w"))
"""


@pytest.fixture
def jars(tmp_path):
    for name in (*caption_java.METEOR, *caption_java.SPICE):
        path = tmp_path / "jars" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "jars"


def java(tmp_path, monkeypatch, program):
    """A `java` that runs Python instead."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "program.py").write_text(program)
    command = tmp_path / "bin" / "java"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "program.py"}" "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_what_is_missing_is_named(tmp_path, monkeypatch, jars):
    java(tmp_path, monkeypatch, "")
    monkeypatch.delenv(caption_java.VARIABLE, raising=False)
    with pytest.raises(UserError, match="METEOR: VLMJAX_CAPTION_JARS is not set"):
        caption.score(REFERENCES, CAPTIONS, ["meteor"])
    (jars / "spice/lib/stanford-corenlp-3.6.0-models.jar").unlink()
    monkeypatch.setenv(caption_java.VARIABLE, str(jars))
    with pytest.raises(UserError, match="has no spice/lib/stanford-corenlp-3.6.0-models.jar"):
        caption.score(REFERENCES, CAPTIONS, ["spice"])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no java on PATH"):
        caption.score(REFERENCES, CAPTIONS, ["meteor"])


def test_meteors_protocol(tmp_path, monkeypatch, jars):
    java(tmp_path, monkeypatch, METEOR)
    found = caption.score_each(REFERENCES, CAPTIONS, ["meteor"], jars=jars)
    assert found.each == {1: {"METEOR": len("3 a_dog") / 100}, 2: {"METEOR": len("2 a_bird") / 100}}
    assert found.whole == {"METEOR": len("0 whole") / 100}


def test_spices_files(tmp_path, monkeypatch, jars):
    java(tmp_path, monkeypatch, SPICE)
    found = caption.score_each(REFERENCES, CAPTIONS, ["spice"], jars=jars)
    assert found.each == {1: {"SPICE": 0.5}, 2: {"SPICE": 0.25}}
    assert found.whole == {"SPICE": 0.375}


@pytest.mark.parametrize("metric", ["meteor", "spice"])
def test_a_program_that_fails_is_heard(tmp_path, monkeypatch, jars, metric):
    java(tmp_path, monkeypatch, "import sys\nsys.exit('out of memory')")
    with pytest.raises(DataError, match="out of memory"):
        caption.score(REFERENCES, CAPTIONS, [metric], jars=jars)


def test_meteors_own_program():
    """With the real jar, where there is one: Denkowski and Lavie's scores of two newts."""
    try:
        caption_java.find("METEOR", caption_java.METEOR)
    except UserError as missing:
        pytest.skip(str(missing))
    assert Path(os.environ[caption_java.VARIABLE]).is_dir()
    texts = {"x": ["A newt."], "y": ["A newt."]}
    found = caption.score(texts, {"x": "A newt.", "y": "A toad."}, ["meteor"])
    assert found["METEOR"] == pytest.approx(0.32397191433991346, abs=1e-4)
