"""BLIP's benchmarks: captions by beams as `generate` writes them, and texts read as they were cleaned in training."""

import json

import numpy as np
import pytest

from tests.capfilt.models import blip
from tests.capfilt.test_capfilt import picture
from vlmjax import decode, evaluate, hub
from vlmjax.capfilt.models import Scorer
from vlmjax.data.formats import tar_writer
from vlmjax.data.images import decode as read_image
from vlmjax.data.record import Record
from vlmjax.errors import DataError, HubError
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.choose import Evaluators
from vlmjax.evals.writing import until
from vlmjax.sharding.mesh import make_mesh

CAPTIONS = ("A Red; star!", "two (green) hearts", "A blue circle, on grey.", "a picture of a ring")
CLEAN = ("a red star", "two green hearts", "a blue circle, on grey", "a picture of a ring")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return blip(tmp_path_factory.mktemp("blip"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "x.tar"
    with tar_writer.Writer(str(path)) as out:
        for at, text in enumerate(CAPTIONS):
            out.write(Record(f"k{at}", picture(at), (text,), {}))
    return str(path)


@pytest.fixture(scope="module")
def parts(folder):
    model, params = hub.load(folder)
    return params, Evaluators(model, *hub.load_processor(folder), make_mesh()), model


def test_captions_by_beams_are_those_of_generate(parts, folder, data):
    params, evaluators, model = parts
    options = {"num_beams": 3, "min_new_tokens": 4, "max_new_tokens": 7}
    tokenizer, transform = hub.load_processor(folder)
    ids = np.array([tokenizer.encode("a picture of ")] * len(CAPTIONS), np.int32)
    pixels = np.stack([transform(read_image(picture(at))) for at in range(len(CAPTIONS))])
    end, pad = model.config.sep_token_id, model.config.text.pad_token_id

    def texts(**options):
        tokens = decode.generate(
            model, params, pixel_values=transform.normalize(pixels), input_ids=ids, eos_token_id=end, pad_token_id=pad,
            **options,
        )  # fmt: skip
        return [tokenizer.decode(until(np.asarray(row), (end,))).strip() for row in tokens]

    asked = []
    for chosen in (options, {"max_new_tokens": 7}):
        evaluator = evaluators.of(Benchmark("x", "caption", data, prompt="a picture of ", **chosen))
        writer = evaluator.writer
        evaluator.writer = lambda *given, writer=writer, **named: (
            asked.append(named) or writer(*given, **named)
        )
        samples = evaluator.run(params).details["samples"]
        assert sorted(one["answer"] for one in samples) == sorted(texts(**chosen))
    # A random model's best answer is the same by whatever search.
    assert options.items() <= asked[0].items() and (asked[1]["num_beams"], asked[1]["min_new_tokens"]) == (
        1,
        0,
    )


def test_texts_are_read_as_they_were_cleaned(parts, data):
    params, evaluators, _ = parts
    for clean, wanted in (("blip", CLEAN), ("", CAPTIONS)):
        matching = evaluators.of(Benchmark("x", "matching", data, clean=clean))
        assert tuple(matching.captions) == wanted
        note = {"written": CLEAN[0], "captions": [CAPTIONS[0]]}
        assert evaluators.of(Benchmark("x", "caption", data, clean=clean))._right(note) is (clean == "blip")
        retrieval = evaluators.of(Benchmark("x", "retrieval", data, clean=clean))
        same = retrieval._texts(params, CAPTIONS) == retrieval._texts(params, CLEAN)
        assert same.all(axis=1).tolist() == [clean == "blip"] * 3 + [True]
    with pytest.raises(DataError, match="clean='lower' is neither"):
        Benchmark("x", "matching", data, clean="lower")


def test_a_folder_says_how_its_captions_were_cleaned(parts, folder, tmp_path):
    params, _, model = parts
    tokenizer, transform = hub.load_processor(folder)
    hub.save(model, params, tmp_path, tokenizer=tokenizer, image_processor=transform, clean="blip")
    assert evaluate.read_clean(str(tmp_path)) == "blip" and evaluate.read_clean(str(folder)) == ""
    pixels = transform(read_image(picture(0)))[None]
    scores = {
        name: Scorer(str(name), matching=True, batch_size=2)(pixels, [[CAPTIONS[0], CLEAN[0]]])[0]
        for name in (folder, tmp_path)
    }
    assert scores[tmp_path][0] == scores[tmp_path][1] == scores[folder][1] != scores[folder][0]
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vlmjax_clean": "lower"}))
    with pytest.raises(HubError, match="vlmjax_clean: clean='lower' is neither"):
        hub.load_clean(tmp_path)
