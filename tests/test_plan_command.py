"""The plan command: mistakes in one line before anything compiles, plans as pages, tables and json."""

import json
import os

import pytest
from planning import tpu
from training import tiny

from vlmjax.planning.topologies import LIBTPU


def command(*arguments, code=""):
    """`vlmjax.plan` with these arguments in a process of its own, after some code."""
    probe = (
        f"import runpy, sys\n{code}\nsys.argv = ['vlmjax.plan', *{[str(a) for a in arguments]!r}]\n"
        "runpy.run_module('vlmjax.plan', run_name='__main__')\n"
    )
    return tiny.python("-c", probe)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    small = {"model__image__depth": 1, "model__text__depth": 1}
    return f"--config={tiny.write_recipe(tmp_path_factory.mktemp('recipe'), **small)}"


def refused(*arguments, said, exit_code=78, code=""):
    run = command(*arguments, code=code)
    assert run.returncode == exit_code, run.stderr
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1, run.stderr
    assert said in run.stderr, run.stderr
    assert "compile" not in run.stdout


NO_JAX = "sys.modules['jax'] = None"  # importing it is an error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology=v5e:16x32"], "a slice has at most 256 chips"),
        (["--topology=v5e:2x2,v7x:2x2"], "unknown device 'v7x'"),
        ([], "give --topology=v5e:16x16 or the like, or --devices=8"),
        (["--topology=v5e:2x2", "--devices=4"], "or --devices=8"),
        (["--topology=v5e:2x2", "--config.batchsize=8"], "did you mean 'batch_size'"),
        (["--topology=v5e:2x2", "--json=/nowhere/plan.json"], "--json=/nowhere/plan.json: cannot be written"),
        (["--topology=v5e:2x2,v5e:2x4", "--hlo=/tmp/x"], "--hlo takes the program of one topology"),
        (["--topology=v5e:2x2", "stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_told_before_jax_is_imported(recipe, arguments, said):
    refused(recipe, *arguments, said=said, code=NO_JAX)


def test_no_recipe():
    refused("--topology=v5e:2x2", said="--config is not given", code=NO_JAX)
    refused("--config=nothing.py", "--topology=v5e:2x2", said="nothing.py", code=NO_JAX)


def test_a_missing_compiler(recipe):
    code = (
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "hidden = ('libtpu', 'jax_cuda12_plugin', 'jax_cuda13_plugin')\n"
        "importlib.util.find_spec = lambda name, *a: None if name in hidden else find(name, *a)"
    )
    refused(recipe, "--topology=v5e:2x2", said=LIBTPU, code=code)
    refused(recipe, "--topology=h100:1x8", said="pip install -e '.[cuda]'", code=code)


@tpu.needs_libtpu
def test_a_batch_that_the_devices_cannot_share(recipe):
    """Of several topologies the last is looked at before the first compiles."""
    code = "import vlmjax.planning.plan as plan\nplan.compile_subject = None"
    listed = "--topology=v5e:2x2,v5e:2x4"
    refused(recipe, listed, "--config.batch_size=12", said="batch_size = 12 cannot be cut evenly", code=code)


@pytest.mark.slow
def test_simulated_devices(recipe, tmp_path):
    out = tmp_path / "plan.json"
    run = command(recipe, "--devices=4", f"--json={out}", "--config.mesh.fsdp=2")
    assert run.returncode == 0, run.stderr
    found = json.loads(out.read_text())
    assert found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1} and found["devices"] == 4
    assert found["fits"] is None and found["predicted_step_seconds"] is None and found["steps"] == 6
    assert "simulated CPU device" in run.stdout and "left out" in run.stdout and f"wrote {out}" in run.stdout


@tpu.needs_libtpu
@pytest.mark.slow
def test_several_topologies_are_a_table(tmp_path):
    out = tmp_path / "plans.json"
    run = command("--loss", "--batch=4096", "--width=64", "--topology=v5e:2x2,v5p:2x2x1", f"--json={out}")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("| v5") == 2 and "| devices" in run.stdout
    first, second = json.loads(out.read_text())
    assert (first["topology"], second["topology"]) == ("v5e:2x2", "v5p:2x2x1")
    assert first["hbm_bytes"] < second["hbm_bytes"] and first["ideal_seconds"] > second["ideal_seconds"]


@tpu.needs_libtpu
def test_what_does_not_fit_has_an_exit_code_and_a_plan(tmp_path):
    out = tmp_path / "plan.json"
    run = command("--loss", "--batch=268435456", "--width=64", "--topology=v5e:1x1", f"--json={out}")
    assert run.returncode == 3, run.stderr
    assert run.stderr.endswith("error: does not fit v5e:1x1\n")
    found = json.loads(out.read_text())
    assert found["fits"] is False and found["needed_bytes"] > found["hbm_bytes"] > 15 << 30
    assert "does not fit: " in run.stdout and "--batch" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--loss", "--config=RECIPE", "--devices=1"], "--config belongs to a recipe, without --loss"),
        (["--config=RECIPE", "--form=ring", "--devices=1"], "--form belongs to --loss"),
        (["--loss", "--devices=1", "--kernel_utilisation=nan"], "--kernel_utilisation=nan"),
        (["--loss", "--devices=1", "--json=PIPE"], "is no file"),
        (["--loss", "--devices=1", "--json=FILE", "--hlo=FILE"], "both name"),
        (["--loss", "--devices=1", "--batch=1000000000000"], "expected at most"),
        (["--loss", "--devices=1", "--topology=v5e:2x2"], "both are given"),
    ],
)
def test_flags_that_would_be_ignored_or_do_harm(arguments, said, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    places = {"RECIPE": tiny.write_recipe(tmp_path), "PIPE": tmp_path / "pipe", "FILE": tmp_path / "file"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    run = command(*arguments)
    assert run.returncode == 78 and said in run.stderr and run.stderr.count("\n") == 1, run.stderr
