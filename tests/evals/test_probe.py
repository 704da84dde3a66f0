"""The probe end to end on a shard: labels, bad records, classes and strength, against the same steps written out."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evals.tiny_model import NAMES, pixels, write_model, write_shard
from tests.models.tiny_models import make_params
from vlmjax import evaluate, hub
from vlmjax.data.images import EvalTransform
from vlmjax.errors import DataError
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.classes import score_classes
from vlmjax.evals.embed import Embedder, tower_state
from vlmjax.evals.logistic import Fitter, search
from vlmjax.evals.probe import ProbeEvaluator
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import BlipRetriever
from vlmjax.models.blip_config import BlipConfig, blip_vit
from vlmjax.models.clip import ClipVision
from vlmjax.sharding.mesh import make_mesh

ALL, TRAIN = 120, 80
KEEP = "^(008|009|01)"  # the others than the first 80


def truth(i: int) -> int:
    """The channel that is strongest in picture i."""
    return int(pixels(i).mean(axis=(0, 1)).argmax())


BAD = (3, next(i for i in range(90, ALL) if truth(i) > 0))
USED = [i for i in range(TRAIN) if i not in BAD]
HELD = [i for i in range(TRAIN, ALL) if i not in BAD]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model's folder, and a shard whose captions and labels are its classes."""
    folder = tmp_path_factory.mktemp("probe")
    write_model(folder / "model")
    captions = [NAMES[truth(i)] for i in range(ALL)]
    write_shard(folder / "x.tar", captions, damaged=BAD, labels=[truth(i) for i in range(ALL)])
    return folder


@pytest.fixture(scope="module")
def model(given):
    return evaluate.load_model(str(given / "model"), make_mesh(), "probe")


def probe(given, model, **options):
    options = {
        "train": str(given / "x.tar"),
        "train_examples": TRAIN,
        "keep": KEEP,
        "batch_size": 16,
    } | options
    benchmark = Benchmark("p", "probe", str(given / "x.tar"), **options)
    return ProbeEvaluator(benchmark, model[0], model[2], model[3], make_mesh())


@pytest.fixture(scope="module")
def expected(given):
    """Features of one picture at a time, by the tower cut out of the folder, and what a fit of them scores."""
    tower, params = hub.load(given / "model", architecture="CLIPVisionModel")
    _, transform = hub.load_processor(given / "model")
    state = jax.jit(lambda x: tower.apply({"params": params}, x).pooler_output)
    features = np.stack(
        [np.asarray(state(transform.normalize(transform(pixels(i)))[None]))[0] for i in range(ALL)]
    )
    labels = np.array([truth(i) for i in range(ALL)])
    fit = Fitter(features[USED], labels[USED], 3, make_mesh())

    def right(l2):
        return float((fit(l2).scores(features[HELD]).argmax(axis=1) == labels[HELD]).mean())

    return features, labels, fit, right


def test_the_probe_equals_its_steps_written_out(given, model, expected):
    result = probe(given, model, l2=0.5).run(model[1])
    assert result.metrics["top1"] == pytest.approx(expected[-1](0.5))
    assert result.metrics["top1"] > 0.6 and result.chance["top1"] == pytest.approx(1 / 3)
    assert result.metrics["top5"] == result.chance["top5"] == 1.0
    counts = {"records": 40, "used": 39, "skipped": 1, "classes": 3, "l2": 0.5}
    assert result.counts == counts | {"train_used": 79, "train_skipped": 1}
    assert result.skipped_reasons == {"not_an_image": 1}
    assert result.details["kind"] == "Linear probe" and result.details["counts"].sum() == 39


@pytest.mark.slow
def test_the_strength_is_chosen_on_a_fifth_of_the_training_records(given, model, expected):
    features, labels, fit, right = expected
    held, kept = np.split(np.random.default_rng(0).permutation(len(USED)), [len(USED) // 5])

    def score(l2):
        found = fit(l2, kept).scores(features[USED][held]).argmax(axis=1)
        return float((found == labels[USED][held]).mean())

    result = probe(given, model).run(model[1], details=False)
    assert result.counts["l2"] == pytest.approx(search(score))
    assert result.metrics["top1"] == pytest.approx(right(result.counts["l2"]))


def test_classes_of_a_file_and_records_of_none(given, model, expected, tmp_path):
    """The first of the three classes is not in the file: its pictures take no part."""
    (tmp_path / "classes.txt").write_text(f"1\t{NAMES[1]}\n2\t{NAMES[2]}\n")
    result = probe(given, model, l2=1.0, classes=str(tmp_path / "classes.txt")).run(model[1], details=False)
    features, labels, *_ = expected
    used, held = ([i for i in rows if labels[i] > 0] for rows in (USED, HELD))
    found = Fitter(features[used], labels[used] - 1, 2, make_mesh())(1.0)
    right = found.scores(features[held]).argmax(axis=1) == labels[held] - 1
    assert result.metrics["top1"] == pytest.approx(right.mean())
    assert result.skipped_reasons == {"no_class": 39 - len(held), "not_an_image": 1}
    assert result.counts["used"] == len(held) and result.counts["train_used"] == len(used)


@pytest.mark.slow
def test_no_common_class_is_an_error_that_counts(given, model, tmp_path):
    write_shard(tmp_path / "y.tar", ["walrus"] * 5)
    benchmark = Benchmark("p", "probe", str(tmp_path / "y.tar"), train=str(given / "x.tar"), l2=1.0)
    ready = ProbeEvaluator(benchmark, model[0], None, model[3], make_mesh())
    with pytest.raises(DataError, match="none of 5 records could be used .*'no_class': 5"):
        ready.run(model[1])
    benchmark = Benchmark("p", "probe", str(given / "x.tar"), train=str(tmp_path / "y.tar"), l2=1.0)
    with pytest.raises(DataError, match="all its records are of the class 'walrus'"):
        ProbeEvaluator(benchmark, model[0], None, model[3], make_mesh()).run(model[1])


def test_the_state_of_towers_of_other_kinds():
    """BLIP's normalised class token, alone and within the model."""
    vit = dataclasses.replace(blip_vit(), width=16, depth=2, heads=2, mlp_dim=24, image_size=16, patch_size=8)
    config = BlipConfig(vit, BertConfig(16, 1, 2, 24, vocab_size=60, type_vocab_size=None), 8, 57, 58, 59)
    images = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    transform = EvalTransform((16, 16), None)
    tower = ClipVision(vit)
    params = make_params(tower, transform.normalize(images))
    states = tower.apply({"params": params}, transform.normalize(images)).last_hidden_state
    for one in (tower, BlipRetriever(config)):
        embedder = Embedder(
            one, None, transform, make_mesh(devices=jax.devices()[:1]), image_features=tower_state
        )
        np.testing.assert_allclose(embedder._images(params, images), states[:, 0], rtol=1e-6, atol=1e-6)


def test_the_mean_over_classes_counts_each_class_that_is_there_once():
    scores = np.eye(4, dtype=np.float32)[[0, 0, 0, 1, 1]]
    found = score_classes(scores, np.array([0, 0, 0, 1, 2]))
    assert found["metrics"] == pytest.approx({"top1": 0.8, "top5": 1.0, "mean_per_class": 2 / 3})
    assert found["chance"] == pytest.approx({"top1": 0.25, "top5": 1.0, "mean_per_class": 0.25})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--benchmark=probe"], "give the records to fit, --train=SHARDS"),
        (["--benchmark=zeroshot", "--train=y.tar"], "leave --train out"),
        (["--benchmark=probe", "--train=y.tar", "--l2=-1"], "l2"),
    ],
)
def test_mistakes_on_the_command_line(flags, message, capsys):
    evaluate.FLAGS.unparse_flags()
    for name in evaluate.FLAGS:
        evaluate.FLAGS[name].unparse()
    with pytest.raises(SystemExit):
        evaluate.parse(["evaluate", "--model=m", "--data=x.tar", *flags])
    assert message in capsys.readouterr().err
