"""The export command: what transformers reads is what the run holds, and mistakes are one line."""

import json
import shutil

import jax
import numpy as np
import pytest
from training import tiny

from vlmjax import config, export, hub
from vlmjax.training import build
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import init_params
from vlmjax.training.workdir import Workdir

PIXELS = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)


def write_run(folder, ema):
    """A run's folder without its training: two checkpoints of random parameters."""
    from vlmjax.data import bpe

    recipe, workdir = config.validate(tiny.recipe()), Workdir(str(folder))
    bpe.train_bpe(["a red circle"] * 9, 520, folder / "tokenizer")
    model = build.Clip(build.clip_config(recipe, build.text.load(folder / "tokenizer", 16)))
    workdir.write_json("recipe.json", recipe.to_dict())
    workdir.write_json("model.json", build.model_to_json(model))
    checkpoints = Checkpoints(workdir.checkpoints)
    shapes = jax.eval_shape(lambda: init_params(model, 0))
    rng = np.random.default_rng(0)
    for step in (1, 2):
        draw = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(x.dtype), shapes)
        params = jax.tree.map(jax.numpy.asarray, draw)
        locked = {"vision_model": params.pop("vision_model")}
        average = jax.tree.map(lambda x: x * 0.5, params) if ema else {}
        state = {"params": params, "frozen": locked, "ema": average, "opt_state": {"mu": jax.numpy.zeros(3)}}
        checkpoints.save(step, state, {"step": step}, {})
    checkpoints.close()
    return {**(average or params), **locked}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    folder.mkdir()
    return folder, write_run(folder, ema=False)


def test_the_newest_checkpoint_locked_half_included(run, tmp_path):
    folder, params = run
    export.export(str(folder), str(tmp_path / "hf"))
    _, found = hub.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, found, params)
    export.export(str(folder), str(tmp_path / "older"), step=1)
    _, older = hub.load(tmp_path / "older")
    assert (older["visual_projection"]["kernel"] != params["visual_projection"]["kernel"]).any()


def test_the_average_where_a_run_keeps_one(tmp_path):
    (tmp_path / "run").mkdir()
    params = write_run(tmp_path / "run", ema=True)
    _, found, tokenizer, transform = export.load_workdir(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert tokenizer.max_length == 16 and transform.output_size == (16, 16)


def test_a_run_of_an_earlier_version(tmp_path):
    """Keys that it did not know have their defaults, whatever they are."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", ema=False)
    path = tmp_path / "run" / "recipe.json"
    known = json.loads(path.read_text())
    del known["data"]["pad_to_square"], known["data"]["augment"]["erase"], known["spikes"]
    path.write_text(json.dumps(known))
    assert not export.load_workdir(str(tmp_path / "run"))[3].pad


def test_transformers_gives_the_same_embeddings(run, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export.export(str(run[0]), str(tmp_path / "hf"))
    model, params, tokenizer, _ = export.load_workdir(str(run[0]))
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "hf").eval()
    words = transformers.CLIPTokenizer.from_pretrained(tmp_path / "hf")(
        ["a red circle", "red"], padding="max_length", max_length=16, return_tensors="pt"
    )
    ids = tokenizer(["a red circle", "red"])
    np.testing.assert_array_equal(words["input_ids"], ids["input_ids"])
    with torch.no_grad():
        expected = theirs(pixel_values=torch.tensor(PIXELS.transpose(0, 3, 1, 2)), **words)
    out = model.apply({"params": jax.tree.map(jax.numpy.asarray, params)}, pixel_values=PIXELS, **ids)
    np.testing.assert_allclose(out.image_embeds, expected.image_embeds, atol=1e-5)
    np.testing.assert_allclose(out.text_embeds, expected.text_embeds, atol=1e-5)
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "hf")
    assert processor.image_processor.crop_size["height"] == 16


@pytest.mark.slow
def test_the_command_speaks_only_of_what_it_wrote(run, tmp_path):
    done = tiny.python("-m", "vlmjax.export", f"--workdir={run[0]}", f"--out={tmp_path}/hf")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {tmp_path}/hf\n", "")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["CLIPModel"]


def refused(*arguments, capsys):
    export.FLAGS.unparse_flags()
    for name in export.FLAGS:
        export.FLAGS[name].unparse()
    with pytest.raises(SystemExit) as stopped:
        export.main(["export", *map(str, arguments)])
    err = capsys.readouterr().err
    assert stopped.value.code == 1 and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_mistakes_are_one_line(run, tmp_path, capsys):
    out = f"--out={tmp_path}/hf"
    assert "--workdir is not given" in refused(out, capsys=capsys)
    assert "--out is not given" in refused(f"--workdir={run[0]}", capsys=capsys)
    assert "Unknown command line flag 'stp'" in refused(out, "--stp=3", capsys=capsys)
    assert "unexpected argument 'x'" in refused(f"--workdir={run[0]}", out, "x", capsys=capsys)
    assert "absent: no such folder" in refused(f"--workdir={tmp_path}/absent", out, capsys=capsys)
    assert "lacks recipe.json" in refused(f"--workdir={tmp_path}", out, capsys=capsys)
    assert "no checkpoint of step 7; there are: 1, 2" in refused(
        f"--workdir={run[0]}", out, "--step=7", capsys=capsys
    )
    assert "trained without config.lora; leave --adapter out" in refused(
        f"--workdir={run[0]}", out, "--adapter", capsys=capsys
    )
    shutil.copytree(run[0], tmp_path / "young", ignore=shutil.ignore_patterns("checkpoints"))
    assert "checkpoints" in refused(f"--workdir={tmp_path}/young", out, capsys=capsys)
    (tmp_path / "young" / "checkpoints").mkdir()
    assert "no complete checkpoint yet" in refused(f"--workdir={tmp_path}/young", out, capsys=capsys)
    assert not (tmp_path / "hf").exists()
