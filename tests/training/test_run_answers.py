"""A run of stage "generative" from its first step to its folder: answers while it trains, and by commands after it."""

import json

import numpy as np
import pytest
from PIL import Image
from training import tiny

from vlmjax import evaluate, generate
from vlmjax.data.form import Form
from vlmjax.data.images import decode
from vlmjax.data.scenes import open_scenes
from vlmjax.evals.benchmark import EvalResult
from vlmjax.training import report, report_answers

pytest.importorskip("torch")
DATA = "scenes:heldout:questions"


RECIPE = '''"""Two layers on pictures of four patches."""

from tests.training import tiny
from vlmjax import config


def get_config(arg=""):
    c = tiny.recipe(stage="generative", total__steps=4, data__train="scenes:train:questions", export=True)
    c.model.language.update({"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_dim": 24, "tied": True})
    c.data.conversation.update({"template": "v1", "system": "Be brief.", "image_first": True})
    c.data.max_length, c.eval_every.steps, c.batch_size = 160, 2, 16
    c.sharding = config.VLM_SHARDING
    for name, blind in (("asked", False), ("unseen", True)):
        options = {"examples": 12, "max_new_tokens": 4, "batch_size": 8, "blind": blind}
        c.evals[name] = config.evaluation("vqa", "scenes:heldout:questions", **options)
    c.checkpoint.best_metric = "eval/asked/exact_match"
    return c
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on two devices that share the batch, and what it measured last."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "talk.py").write_text(RECIPE)
    done = tiny.python(
        "-m", "vlmjax.main", f"--config={folder}/talk.py", f"--workdir={folder}/talk", devices=2
    )
    assert done.returncode == 0, done.stdout + done.stderr
    last = tiny.rows(folder / "talk")[-1]
    return folder / "talk", {name: value for name, value in last.items() if name.startswith("eval/")}


def command(module, *arguments):
    module.FLAGS.unparse_flags()
    for name in module.FLAGS:
        module.FLAGS[name].unparse()
    module.parse([module.__name__, *map(str, arguments)])


@pytest.mark.slow
def test_what_it_leaves(run):
    """Numbers of both looks, samples of every evaluation, and a page with them."""
    workdir, measured = run
    assert set(measured) == {"eval/asked/exact_match", "eval/unseen/exact_match"}
    assert [row["step"] for row in tiny.rows(workdir) if "eval/asked/exact_match" in row] == [2, 4]
    for name, blind in (("asked", False), ("unseen", True)):
        found = json.loads((workdir / "report" / f"answers_{name}.json").read_text())
        assert found["blind"] is blind and len(found["samples"]) == 8
        assert all([a["step"] for a in sample["answers"]] == [2, 4] for sample in found["samples"])
    page = (workdir / "report.html").read_text()
    for words in ("Rows per second", "Token accuracy", "Answers · asked", report_answers.BLIND_LEAD):
        assert words in page
    assert "mages per second" not in page


@pytest.mark.slow
def test_every_command_gives_the_same_answers(run, tmp_path, capsys):
    """Of the run and of its folder: the benchmark as the run measured it, and text about an image."""
    workdir, measured = run
    picture = decode(open_scenes(DATA, image_size=16)[0].image)
    Image.fromarray(picture).save(tmp_path / "x.png")
    said = []
    for model in (workdir, workdir / "hf"):
        assert evaluate.read_form(str(model)) == Form("v1", "Be brief.", True)
        out = tmp_path / "out.json"
        options = [f"--model={model}", "--benchmark=vqa", f"--data={DATA}", "--examples=12", f"--out={out}"]
        command(evaluate, *options, "--max_new_tokens=4", "--batch_size=8", f"--report={tmp_path}/shown")
        evaluate.main()
        assert json.loads(out.read_text())["exact_match"] == measured["eval/asked/exact_match"]
        assert "Answers" in (tmp_path / "shown" / "report.html").read_text()
        capsys.readouterr()
        command(
            generate, f"--model={model}", f"--image={tmp_path}/x.png", "--prompt=What?", "--max_new_tokens=5"
        )
        generate.generate(generate.FLAGS)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    command(evaluate, f"--model={workdir}", "--benchmark=zeroshot", "--data=scenes:heldout:class")
    with pytest.raises(SystemExit):
        evaluate.main()
    assert "Vlm has no encode_image; --benchmark=zeroshot needs both towers" in capsys.readouterr().err


def result(*answers, expected="yes", blind=False):
    samples = [
        {"image": tiny_picture(i), "question": f"Is <it> {i}?", "expected": expected, "answer": said}
        | {"right": said == expected}
        for i, said in enumerate(answers)
    ]
    kinds = [
        {"kind": "is <it>", "questions": 3, "right": 1, "chance": 2, "guess": "yes"},
        {"kind": "why", "questions": 1, "right": 0, "chance": 1, "guess": "so"},
    ]
    counts = {"records": 2, "used": 2, "skipped": 0}
    metrics = {"exact_match": 0.5}
    return EvalResult(
        "q", "vqa", metrics, metrics, counts, {}, {"samples": samples, "kinds": kinds, "blind": blind}
    )


def tiny_picture(shade):
    return np.full((8, 8, 3), 40 * shade, np.uint8)


def test_samples_grow_with_the_run(tmp_path):
    """Answers of one question by step; equal ones as one; a run that went back drops those after it."""
    for step, answers in ((10, ("no", "a")), (20, ("no", "b")), (30, ("yes", "c")), (40, ("", "c"))):
        report.save_result(tmp_path, result(*answers), step)
    page = report.write_report(tmp_path).read_text()
    for words in (
        "steps 10 to 20",
        "step 30",
        "(nothing)",
        "steps 30 to 40",
        "Is &lt;it&gt; 0?",
        "is &lt;it&gt; …",
    ):
        assert words in page
    assert page.count("data:image/jpeg") == 2 and "is <it>" not in page.lower()
    report.save_result(tmp_path, result("yes", "d"), 20)
    found = json.loads((tmp_path / "report" / "answers_q.json").read_text())
    assert [(a["step"], a["answer"], a["right"]) for a in found["samples"][0]["answers"]] == [
        (10, "no", False),
        (20, "yes", True),
    ]
    report.save_result(tmp_path, result("yes", "e", expected="no"), 30)
    found = json.loads((tmp_path / "report" / "answers_q.json").read_text())
    assert [len(sample["answers"]) for sample in found["samples"]] == [1, 1]


def test_many_answers_are_thinned(tmp_path):
    """The first and the last are among those shown."""
    for step in range(1, 30):
        report.save_result(tmp_path, result(f"answer {step}"), step)
    page = report.write_report(tmp_path).read_text()
    assert page.count("answer ") - page.count("most frequent answer ") >= report_answers.SHOWN
    assert "answer 1<" in page and "answer 29<" in page and page.count("✗") == report_answers.SHOWN


@pytest.mark.parametrize("damaged", ["", "[]", '{"samples": 3}', '{"samples": [1, {"answers": 5}]}'])
def test_a_damaged_file_of_earlier_answers_is_begun_anew(tmp_path, damaged):
    report.save_result(tmp_path, result("yes"), 1)
    path = tmp_path / "report" / "answers_q.json"
    begun = json.loads(path.read_text())
    begun["samples"][0]["answers"] = [3, {"step": "x"}, {"step": 0}]
    path.write_text(damaged or json.dumps(begun))
    report.save_result(tmp_path, result("yes"), 2)
    found = json.loads((tmp_path / "report" / "answers_q.json").read_text())
    assert [a["step"] for a in found["samples"][0]["answers"]] == [2]
