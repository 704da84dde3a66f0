"""A classifier's run from a recipe to scores and a folder, and the averages of its two ends (WiSE-FT)."""

import json

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.evals.tiny_model import NAMES, write_model, write_shard
from tests.training import tiny
from vlmjax import evaluate, export, hub, wiseft
from vlmjax.config import BLIP_SHARDING
from vlmjax.errors import DataError
from vlmjax.evals.benchmark import Benchmark
from vlmjax.evals.choose import Evaluators
from vlmjax.models.classifier import Classifier, ClassifierConfig
from vlmjax.models.vit import VitConfig
from vlmjax.sharding.mesh import make_mesh
from vlmjax.training import build

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "hf"
    write_model(path)
    return path


# Evaluations are no keys that tiny.recipe can put.
EVALUATED = """

_recipe = get_config


def get_config(arg=""):
    c = _recipe(arg)
    c.evals.val = tiny.config.evaluation("classify")
    return c
"""


@pytest.fixture(scope="module")
def finished(clip_folder, tmp_path_factory):
    """A run that trains a head of prompts and the projection on a frozen tower, from a shard with damaged records."""
    folder = tmp_path_factory.mktemp("run")
    names = [NAMES[i % 4] for i in range(60)]
    write_shard(folder / "x.tar", [*names, "walrus", "walrus"], damaged=[5, 6])
    (folder / "classes.txt").write_text("\n".join(NAMES))
    made = tiny.write_recipe(
        folder,
        stage="classification",
        sharding=BLIP_SHARDING,
        init_from=str(clip_folder),
        data__train=str(folder / "x.tar"),
        data__classes=str(folder / "classes.txt"),
        data__max_bad_share=0.2,
        model__pool="projected",
        model__head_from="plain",
        frozen=("vision_model/.*",),
        export=True,
    )
    evaluation = f"--config.evals.val.data={folder}/x.tar"
    with made.open("a") as file:
        file.write(EVALUATED)
    done = tiny.python("-m", "vlmjax.main", f"--config={made}", f"--workdir={folder}/run", evaluation)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, {name: value for row in tiny.rows(folder / "run") for name, value in row.items()}


def test_a_run_trains_the_head_alone_and_counts_what_it_skips(finished, clip_folder):
    folder, rows = finished[0], tiny.rows(finished[0] / "run")
    _, theirs = hub.load(clip_folder)
    model, params, tokenizer, _ = export.load_workdir(str(folder / "run"))
    assert tokenizer is None and model.config.names == tuple(NAMES)
    before, after = (traverse_util.flatten_dict(tree["vision_model"], sep="/") for tree in (theirs, params))
    assert all(np.array_equal(before[path], after[path]) for path in before)
    assert not np.array_equal(theirs["visual_projection"]["kernel"], params["visual_projection"]["kernel"])
    losses = tiny.losses(folder / "run")
    assert losses[-1] < losses[0] and "accuracy" in rows[0]
    assert {"eval/val/top1", "eval/val/top5", "eval/val/mean_per_class"} <= set(rows[-1])
    result = json.loads((folder / "run" / "report" / "results.json").read_text())[0]
    assert result["skipped_reasons"] == {"not_an_image": 2, "no_class": 2} and result["used"] == 58


def test_the_exported_folder_scores_as_the_run(finished):
    folder, results = finished
    for name in ("run", "run/hf"):
        evaluate.FLAGS.unparse_flags()
        for flag in evaluate.FLAGS:
            evaluate.FLAGS[flag].unparse()
        arguments = [f"--model={folder / name}", "--benchmark=classify", f"--data={folder / 'x.tar'}"]
        evaluate.parse(["evaluate", *arguments])
        found = evaluate.evaluate(evaluate.FLAGS)
        assert found["top1"] == results["eval/val/top1"] and found["classes"] == 4


def test_classes_of_other_data_are_named_in_the_order_of_the_head(finished, tmp_path):
    folder, _ = finished
    model, params, *processor = evaluate.load_model(str(folder / "run" / "hf"), make_mesh(), "classify")

    write_shard(tmp_path / "y.tar", ["x"] * 12, labels=[f"id{i % 4}" for i in range(12)])
    (tmp_path / "classes.txt").write_text("".join(f"id{i}\t{name}\n" for i, name in enumerate(NAMES)))
    evaluators = Evaluators(model, *processor, make_mesh())
    benchmark = Benchmark("c", "classify", str(tmp_path / "y.tar"), classes=str(tmp_path / "classes.txt"))
    assert evaluators.of(benchmark).run(params, details=False).counts["used"] == 12
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="2 classes; the head has 4"):
        evaluators.of(benchmark)


# ---- averages of what it began with and what it has come to


def command(*arguments):
    wiseft.FLAGS.unparse_flags()
    for flag in wiseft.FLAGS:
        wiseft.FLAGS[flag].unparse()
    wiseft.main(["wiseft", *map(str, arguments)])


def test_averages_lie_between_zeroshot_and_the_run(finished, clip_folder, tmp_path, capsys):
    folder, results = finished
    recipe, model, first, last = wiseft.ends(str(folder / "run"))
    clip, theirs = hub.load(clip_folder)
    tokens = hub.load_processor(clip_folder)[0](NAMES)
    texts = clip.apply({"params": theirs}, **tokens, method="encode_text")
    kernel = np.exp(theirs["logit_scale"]) * np.asarray(texts).T
    np.testing.assert_allclose(first["classifier"]["kernel"], kernel, atol=1e-5)
    np.testing.assert_array_equal(first["visual_projection"]["kernel"], theirs["visual_projection"]["kernel"])
    assert not first["classifier"]["bias"].any() and last["classifier"]["bias"].any()
    tops = f"--data={folder / 'x.tar'}"
    command(f"--workdir={folder / 'run'}", "--alphas=0,0.5,1", tops)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["alpha", "0.00", "0.50", "1.00"]
    assert float(lines[-1].split()[1].rstrip("%")) == pytest.approx(100 * results["eval/val/top1"], abs=0.06)
    command(f"--workdir={folder / 'run'}", "--alphas=0.25", f"--out={tmp_path / 'hf'}")
    _, found = hub.load(tmp_path / "hf")
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, first, last)
    for path, value in traverse_util.flatten_dict(found, sep="/").items():
        wanted = traverse_util.flatten_dict(expected, sep="/")[path]
        np.testing.assert_allclose(value, wanted, rtol=1e-6, atol=1e-7, err_msg=path)


def test_the_ends_of_the_line_are_the_weights_themselves():
    rng = np.random.default_rng(0)
    a, b = ({"x": rng.normal(size=99).astype(np.float32)} for _ in range(2))
    np.testing.assert_array_equal(wiseft.interpolated(a, b, 0.0)["x"], a["x"])
    np.testing.assert_array_equal(wiseft.interpolated(a, b, 1.0)["x"], b["x"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alphas=0,2"], "'2' is no number from 0 to 1"),
        (["--alphas=0,x"], "'x' is no number from 0 to 1"),
        (["--alphas=0,1", "--out=hf"], "give one of --alphas to write"),
        ([], "did not begin with a zero-shot classifier"),
    ],
)
def test_averages_that_cannot_be_made(flags, message, tmp_path, capsys):
    (tmp_path / "recipe.json").write_text(json.dumps(tiny.recipe(stage="classification").to_dict()))
    model = Classifier(ClassifierConfig(VitConfig(**SIZES, image_size=16, patch_size=8), ("a", "b")))
    (tmp_path / "model.json").write_text(json.dumps(build.model_to_json(model)))
    with pytest.raises(SystemExit):
        command(f"--workdir={tmp_path}", *flags)
    assert message in capsys.readouterr().err
