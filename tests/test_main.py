"""The train command: every mistake ends in one line and exit code 78, and most of them before jax is imported."""

import pytest
from training import tiny

from vlmjax import config

ROOT = tiny.ROOT


def command(*arguments, devices=1):
    """Exit code, the error output, and whether jax was imported, of `vlmjax.main` with these arguments."""
    probe = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('JAX', 'jax' in sys.modules))\n"
        f"sys.argv = ['vlmjax.main', *{[str(a) for a in arguments]!r}]\n"
        "runpy.run_module('vlmjax.main', run_name='__main__')\n"
    )
    run = tiny.python("-c", probe, devices=devices)
    return run.returncode, run.stderr, run.stdout.rstrip().endswith("JAX True")


def refused(*arguments, said, jax=False, devices=1):
    code, err, loaded = command(*arguments, devices=devices)
    assert code == 78, err
    assert "Traceback" not in err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert said in err, err
    assert loaded is jax


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny.write_recipe(tmp_path_factory.mktemp("recipe"))


WORKDIR = (
    "--workdir=/nowhere/run"  # never reached: what is known before jax starts is said before a folder is made
)


def test_the_tiny_form_of_every_recipe_is_found():
    for path in sorted((ROOT / "configs").glob("*.py")):
        refused(f"--config={path}:tiny", WORKDIR, "--config.micro_batches=7", said="not a multiple of 7")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config.batchsize=8"], "did you mean 'batch_size'"),
        (["--config.batch_size=many"], "batch_size"),
        (["--config.optimizer.learning_rate=fast"], "learning_rate"),
        (["--config.total.steps=0"], "config.total.steps=0"),
        (["--config.batch_size=10", "--config.micro_batches=4"], "not a multiple of 4"),
        (["--config.mesh.data=3"], "not a multiple of 3"),
        (["--config.frozen=('(',)"], "not a regular expression"),
        (["--config.data.augment.crop_scal=1"], "crop_scal"),
        (["--confg=x"], "Unknown command line flag 'confg'"),
        (["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_in_values_and_flags(recipe, arguments, said):
    refused(f"--config={recipe}", WORKDIR, *arguments, said=said)


def test_mistakes_in_naming_the_recipe(recipe, tmp_path):
    refused("--config=configs/clip_vitm.py", WORKDIR, said="clip_vitm.py")
    refused("--config=configs/quickstart.py:tiney", WORKDIR, said="no form 'tiney'; did you mean 'tiny'?")
    refused(WORKDIR, said="--config is not given")
    refused(f"--config={recipe}", said="--workdir is not given")
    (tmp_path / "broken.py").write_text("def get_config(arg=''):\n    return nothing\n")
    refused(f"--config={tmp_path}/broken.py", WORKDIR, said=f"({tmp_path}/broken.py:2)")
    (tmp_path / "list.py").write_text("def get_config(arg=''):\n    return [1]\n")
    refused(f"--config={tmp_path}/list.py", WORKDIR, said="list")
    (tmp_path / "empty.py").write_text("x = 1\n")
    refused(f"--config={tmp_path}/empty.py", WORKDIR, said="get_config")


def test_the_command_line_replaces_a_unit_of_the_recipe(recipe):
    """`total.epochs` beside the recipe's `total.steps`: the complaint is about the next thing, the data."""
    refused(
        f"--config={recipe}",
        WORKDIR,
        "--config.total.epochs=2",
        "--config.data.train=",
        said="config.data.train",
    )


@pytest.mark.slow
def test_mistakes_that_need_devices_or_data(recipe, tmp_path):
    run = (f"--config={recipe}", f"--workdir={tmp_path}/run")
    refused(*run, said="batch_size = 16 cannot be cut evenly", jax=True, devices=3)
    refused(*run, "--config.mesh.fsdp=2", said="fsdp=2", jax=True)
    missing = f"--config.data.train={tmp_path}/x-{{00..02}}.tar"
    refused(*run, missing, said=f"config.data.train: no such data file: {tmp_path}/x-00.tar", jax=True)
    refused(*run, "--config.data.tokenizer=/no/such/folder", said="config.data.tokenizer: ", jax=True)
    refused(*run, "--config.data.tokenizer=bpe:100", said="from 514", jax=True)
    refused(*run, "--config.model.text.vocab_size=100", said="config.model.text.vocab_size", jax=True)
    refused(*run, "--config.init_from=/no/such/model", said="config.init_from: ", jax=True)
    refused(*run, "--config.frozen=('visionmodel/.*',)", said="matches no parameter", jax=True)
    (tmp_path / "few.jsonl").write_text('{"image": "a.png", "caption": "a"}\n' * 3)
    few = f"--config.data.train={tmp_path}/few.jsonl"
    refused(*run, few, said="holds 3 records, fewer than one batch", jax=True)


def test_a_recipe_of_the_tests_is_a_recipe():
    config.validate(tiny.recipe())
    assert tiny.recipe(optimizer__clip_norm=2.0).optimizer.clip_norm == 2.0
