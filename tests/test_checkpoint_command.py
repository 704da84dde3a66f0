"""The checkpoint command: what it says of good and damaged checkpoints, what differs, and averages that export."""

import shutil

import jax
import numpy as np
import pytest
from test_export import write_run
from training import damage

from vlmjax import checkpoint, export, hub
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.digests import by_path

# Where a read fails, threads of tensorstore complain of an event loop that orbax has closed, whenever they come to it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    write_run(folder, ema=True)
    return folder


def payload(step):
    """The file with most of the arrays."""
    return max((step / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)


def ran(*arguments, capsys, code=0):
    with pytest.raises(SystemExit) as ended:
        checkpoint.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == code, out + err
    return out if code == 0 or not err else err


def test_listed_and_verified(workdir, tmp_path, capsys):
    lines = ran("list", workdir, capsys=capsys).splitlines()
    assert [line.split()[1] for line in lines] == ["1", "2"] and "MiB" in lines[0] and "arrays" in lines[0]
    out = ran("verify", workdir, capsys=capsys)
    assert out.count("arrays and the data position are as they were saved") == 2
    assert out.endswith("newest good checkpoint: 2\n")
    shutil.copytree(workdir, tmp_path / "run")
    damage.flip(0.5)(payload(tmp_path / "run" / "checkpoints" / "2"))
    out = ran("verify", tmp_path / "run", capsys=capsys, code=1)
    assert "step 2          damaged: " in out and out.endswith("newest good checkpoint: 1\n")
    assert out.count("\n") == 3
    assert ran("verify", f"{tmp_path}/run:1", capsys=capsys).count("\n") == 2
    (tmp_path / "run" / "checkpoints" / "2" / "why.txt").write_text("because\n")
    (tmp_path / "run" / "checkpoints" / "2").rename(tmp_path / "run" / "checkpoints" / "2.damaged")
    assert ran("list", tmp_path / "run", capsys=capsys).endswith("2.damaged       because\n")


def test_difference(workdir, tmp_path, capsys):
    assert ran("diff", workdir, f"{workdir}:2", capsys=capsys) == "no parameters differ\n"
    first = Checkpoints(f"{workdir}/checkpoints", writable=False).read_params(1)[0]
    changed = jax.tree.map(np.copy, first)
    flat = by_path(changed)
    flat["params/logit_scale"] *= 2
    kernel = flat["ema/text_projection/kernel"]
    kernel[0, 0] += 0.01
    writer = Checkpoints(f"{tmp_path}/run/checkpoints")
    writer.save(7, jax.tree.map(jax.numpy.asarray, changed), {"step": 7}, {})
    writer.close()
    lines = ran("diff", f"{workdir}:1", f"{tmp_path}/run:7", capsys=capsys).splitlines()
    assert lines[2] == "2 parameters differ"
    assert lines[0].split()[:2] == ["params/logit_scale", "1"]
    relative = 0.01 / np.sqrt(np.square(kernel).sum())
    name, found, _, largest = lines[1].split()
    assert name == "ema/text_projection/kernel"
    assert float(found) == pytest.approx(relative, rel=0.02) and float(largest) == pytest.approx(
        0.01, rel=0.01
    )


def test_average_is_the_mean_of_what_is_exported(workdir, tmp_path, capsys):
    out = ran("average", workdir, f"--out={tmp_path}/mean", capsys=capsys)
    assert out == f"wrote {tmp_path}/mean: checkpoint 2 is the mean of 1, 2\n"
    reader = Checkpoints(f"{workdir}/checkpoints", writable=False)
    one, two = (reader.read_params(step)[0] for step in (1, 2))
    expected = jax.tree.map(
        lambda x, y: ((x.astype(np.float64) + y) / 2).astype(x.dtype), one["ema"], two["ema"]
    )
    export.export(f"{tmp_path}/mean", str(tmp_path / "hf"))
    _, found = hub.load(tmp_path / "hf")
    jax.tree.map(np.testing.assert_array_equal, found, {**expected, **two["frozen"]})
    assert "mean of 1, 2" in ran("list", tmp_path / "mean", capsys=capsys)
    ran("average", workdir, "--last=1", f"--out={tmp_path}/last", capsys=capsys)
    last = Checkpoints(f"{tmp_path}/last/checkpoints", writable=False).read_params(2)[0]["params"]
    jax.tree.map(np.testing.assert_array_equal, last, two["ema"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "required: {list,verify,diff,average}"),
        (("show", "RUN"), "invalid choice: 'show'"),
        (("verify", "RUN/absent"), "absent: no such folder"),
        (("verify", "RUN/tokenizer"), "tokenizer: no complete checkpoint here"),
        (("verify", "RUN:3"), "no checkpoint of step 3; there are: 1, 2"),
        (("diff", "RUN"), "required: second"),
        (("average", "RUN"), "required: --out"),
        (("average", "RUN", "--out=RUN"), "exists and is not an empty folder"),
        (("average", "RUN", "--out=x", "--steps=1,3"), "no checkpoint of step 3"),
        (
            ("average", "RUN", "--out=x", "--steps=a"),
            "--steps=a: expected numbers of checkpoints such as 8,16",
        ),
        (("average", "RUN", "--out=x", "--last=3"), "--last=3: there are 2 checkpoints"),
        (("average", "RUN", "--out=x", "--last=1", "--steps=1"), "--steps and --last exclude each other"),
    ],
)
def test_mistakes_are_one_line(workdir, capsys, arguments, said):
    arguments = [argument.replace("RUN", str(workdir)) for argument in arguments]
    err = ran(*arguments, capsys=capsys, code=1)
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err
