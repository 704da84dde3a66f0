"""The evaluate command: its numbers against transformers, its file, and one clear line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evals.tiny_model import NAMES, pixels, write_model, write_shard
from vlmjax import evaluate

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    write_model(folder)
    return folder


def run(*arguments) -> None:
    """The command inside this process, as if freshly started."""
    evaluate.FLAGS.unparse_flags()
    for name in evaluate.FLAGS:
        evaluate.FLAGS[name].unparse()
    evaluate.parse(["evaluate", *arguments])
    evaluate.main()


def reference(folder, images, texts):
    """Normalised embeddings by transformers from the same folder."""
    torch = pytest.importorskip("torch")
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

    hf = CLIPModel.from_pretrained(folder).eval()
    values = CLIPImageProcessorPil.from_pretrained(folder)(images=images, return_tensors="pt")
    tokens = CLIPTokenizerFast.from_pretrained(folder)(
        texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        out = hf(pixel_values=values["pixel_values"], **tokens)
    return out.image_embeds.numpy(), out.text_embeds.numpy()


@pytest.mark.slow
def test_retrieval_equals_transformers(model, tmp_path):
    captions = [f"{NAMES[i % 4]} number {i // 2}" for i in range(27)]
    write_shard(tmp_path / "x.tar", captions, damaged=[3])
    out = tmp_path / "deep" / "results.json"
    run(
        f"--model={model}",
        "--benchmark=retrieval",
        f"--data={tmp_path}/x.tar",
        f"--out={out}",
        "--batch_size=8",
    )
    got = json.loads(out.read_text())
    used = [i for i in range(27) if i != 3]
    images, texts = reference(model, [Image.fromarray(pixels(i)) for i in used], [captions[i] for i in used])
    scores = images @ texts.T
    for k in (1, 5, 10):
        i2t = np.mean([at in np.argsort(-row)[:k] for at, row in enumerate(scores)])
        t2i = np.mean([at in np.argsort(-row)[:k] for at, row in enumerate(scores.T)])
        assert got[f"image_to_text_r{k}"] == pytest.approx(i2t)
        assert got[f"text_to_image_r{k}"] == pytest.approx(t2i)
    assert (got["records"], got["used"], got["skipped"]) == (27, 26, 1)
    assert got["skipped_reasons"] == {"not_an_image": 1}
    assert got["model"] == str(model) and got["chance"]["text_to_image_r1"] == pytest.approx(1 / 26)


def zeroshot(model, tmp_path, *arguments):
    out = tmp_path / "results.json"
    run(f"--model={model}", "--benchmark=zeroshot", f"--data={tmp_path}/x.tar", f"--out={out}", *arguments)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_zeroshot_by_caption_by_label_and_with_templates(model, tmp_path):
    truth = [i % 4 for i in range(22)]
    captions = [f"a photo of a {NAMES[t]}." for t in truth]
    write_shard(tmp_path / "x.tar", captions, labels=truth)
    classes = tmp_path / "classes.txt"
    classes.write_text("".join(f"{name.replace(' ', '_')}\t{name}\n" for name in NAMES))
    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}.\nthe {}\n")
    images = [Image.fromarray(pixels(i)) for i in range(22)]

    def expected(prompts, count):
        x, w = reference(model, images, prompts)
        w = w.reshape(4, count, -1).mean(1)
        return np.mean((x @ (w / np.linalg.norm(w, axis=1, keepdims=True)).T).argmax(1) == truth)

    got = zeroshot(model, tmp_path)
    assert got["top1"] == pytest.approx(expected([f"a photo of a {n}." for n in NAMES], 1))
    assert (got["classes"], got["templates"], got["top5"]) == (4, 1, 1.0)
    by_label = zeroshot(model, tmp_path, f"--classes={classes}", f"--templates={templates}")
    assert by_label["top1"] == pytest.approx(
        expected([t for n in NAMES for t in (f"a photo of a {n}.", f"the {n}")], 2)
    )
    write_shard(tmp_path / "x.tar", captions)
    assert zeroshot(model, tmp_path, f"--classes={classes}", f"--templates={templates}") == by_label
    write_shard(tmp_path / "x.tar", [NAMES[t] for t in truth])
    assert zeroshot(model, tmp_path, f"--classes={classes}")["templates"] > 1


def test_a_report_of_what_was_found(model, tmp_path):
    write_shard(tmp_path / "x.tar", [f"{NAMES[i % 4]} {i}" for i in range(12)])
    run(f"--model={model}", "--benchmark=retrieval", f"--data={tmp_path}/x.tar", f"--report={tmp_path}/seen")
    page = (tmp_path / "seen" / "report.html").read_text()
    assert "text → image R@1" in page and page.count("data:image/jpeg") > 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--benchmark=retrieval", "--data=x"], "--model is not given"),
        (["--model=m", "--benchmark=captions", "--data=x"], "--benchmark=captions"),
        (["--model=m", "--benchmark=zeroshot", "--data=x", "--class=y"], "Unknown command line flag 'class'"),
        (["--model=m", "--benchmark=zeroshot", "--data=a", "b.tar"], "unexpected argument 'b.tar'"),
        (["--model=m", "--benchmark=zeroshot", "--data=a", "--batch_size=0"], "batch_size"),
    ],
)
def test_mistakes_on_the_command_line_end_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 1
    assert message in capsys.readouterr().err


def test_mistakes_in_data_and_model_are_one_line(model, tmp_path, capsys):
    write_shard(tmp_path / "x.tar", ["cat", "a dog", "walrus"])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    (tmp_path / "empty").mkdir()
    data, kind = f"--data={tmp_path}/x.tar", "--benchmark=zeroshot"
    for arguments, message in (
        (
            [f"--model={model}", kind, data, f"--classes={tmp_path}/classes.txt"],
            "record '0002': captions ['walrus']",
        ),
        ([f"--model={tmp_path}/empty", kind, data], "neither a run (recipe.json) nor a Hugging Face folder"),
        ([f"--model={model}", kind, f"--data={tmp_path}/y.tar"], "y.tar"),
        ([f"--model={model}", kind, data, f"--out={tmp_path}/x.tar/y.json"], "--out="),
    ):
        with pytest.raises(SystemExit):
            run(*arguments)
        err = capsys.readouterr().err
        assert err.startswith("error: ") and message in err and err.count("\n") == 1, err


def test_the_command_alone_ends_with_its_exit_code():
    run = subprocess.run(
        [sys.executable, "-m", "vlmjax.evaluate", "--benchmark=retrieval"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: --model is not given")
