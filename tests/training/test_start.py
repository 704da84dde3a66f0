"""The first state of a run: imported parameters lie where the recipe says, at the recipe's image size."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec
from training import tiny

from vlmjax import hub
from vlmjax.data import text
from vlmjax.errors import CheckpointError, RecipeError
from vlmjax.models.clip import Clip, ClipConfig
from vlmjax.models.text import TextConfig
from vlmjax.models.vit import VitConfig
from vlmjax.ops.resize import resize_positions
from vlmjax.sharding.mesh import make_mesh
from vlmjax.training import build, finish, frozen, inspecting, records
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.compile import init_params, make_program
from vlmjax.training.start import reference, start_state
from vlmjax.training.state import merge
from vlmjax.training.workdir import Workdir

SIZES = {"width": 16, "depth": 2, "heads": 2, "mlp_dim": 32}
MODEL = Clip(
    ClipConfig(
        VitConfig(**SIZES, image_size=32, patch_size=8, activation="gelu"),
        TextConfig(**SIZES, vocab_size=64, max_length=8, eos_token_id=1, bos_token_id=0, pad_token_id=1),
        projection_dim=16,
    )
)


class Words(text.Tokenizer):
    """As much of a tokenizer as making a model asks for."""

    def __init__(self, vocab_size=60):
        self.vocab_size = vocab_size

    def encode(self, text):
        """The model's own end closes every text."""
        return [1, MODEL.config.text.eos_token_id]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    params = jax.tree.map(np.asarray, jax.jit(lambda: init_params(MODEL, 3))())
    path = tmp_path_factory.mktemp("hf")
    hub.save(MODEL, params, path)
    return path, params


def started(recipe, mesh, checkpoints, frozen=()):
    recipe.frozen = frozen
    model = build.make_model(recipe, Words())
    program = make_program(recipe, model, mesh, optax.constant_schedule(0.1))
    state, data = start_state(recipe, model, program, mesh, Checkpoints(str(checkpoints)))
    return model, state, data


@pytest.mark.parametrize(("size", "cut"), [(32, ()), (40, ("fsdp",))])
def test_imported_parameters(folder, tmp_path, size, cut):
    """The file's 17 positions cannot be cut in two, the 26 of the larger grid can: only those are asked to be."""
    path, params = folder
    recipe = tiny.recipe(init_from=str(path), model__image__image_size=size, ema__decay=0.5)
    recipe.sharding = (("vision_model/.*/position_embedding", cut), *recipe.sharding)
    mesh = make_mesh(data=4, fsdp=2)
    model, state, data = started(recipe, mesh, tmp_path / "checkpoints", ("text_model/.*",))
    assert data == {} and model.config.image.image_size == size and model.config.image.activation == "gelu"
    table = params["vision_model"]["embeddings"]["position_embedding"]
    wanted = np.asarray(resize_positions(jnp.asarray(table), (4, 4), model.config.image.grid))
    assert len(wanted) == 1 + (size // 8) ** 2
    whole = merge(state.params, state.frozen)
    found = whole["vision_model"]["embeddings"]["position_embedding"]
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=0, atol=1e-6)
    assert found.sharding.spec == PartitionSpec(*cut)
    kernel = whole["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 32)}
    assert state.ema["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"].sharding == kernel.sharding
    expected = jax.tree.map(np.asarray, params)
    expected["vision_model"]["embeddings"]["position_embedding"] = np.asarray(found)
    jax.tree.map(np.testing.assert_array_equal, whole, expected)


def test_a_continued_run_reads_no_weights(folder, tmp_path):
    path, params = folder
    recipe = tiny.recipe(init_from=str(path), model__image__image_size=32)
    mesh = make_mesh(data=4, fsdp=2)
    _, state, _ = started(recipe, mesh, tmp_path / "checkpoints")
    checkpoints = Checkpoints(str(tmp_path / "checkpoints"))
    checkpoints.save(7, state, {"step": 7}, {})
    checkpoints.close()
    only_config = tmp_path / "config_only"
    only_config.mkdir()
    (only_config / "config.json").write_bytes((path / "config.json").read_bytes())
    recipe.init_from = str(only_config)
    _, again, data = started(recipe, mesh, tmp_path / "checkpoints")
    assert data == {"step": 7}
    jax.tree.map(np.testing.assert_array_equal, again, state)
    with pytest.raises(RecipeError, match="config.init_from: .*holds no model.safetensors"):
        started(recipe, mesh, tmp_path / "elsewhere")


def test_frozen_parameters_are_named_and_fetched_again(folder, tmp_path):
    """Half of the model is in no checkpoint; with it the run, its export and its average are whole again."""
    path, params = folder
    source = tmp_path / "hf"
    shutil.copytree(path, source)
    recipe = tiny.recipe(init_from=str(source), model__image__image_size=40)
    recipe.frozen = ("vision_model/.*", "logit_scale")
    mesh = make_mesh(data=4, fsdp=2)
    model = build.make_model(recipe, Words())
    program = make_program(recipe, model, mesh, optax.constant_schedule(0.1))
    named = reference(recipe, model, program, mesh)
    workdir = Workdir(str(tmp_path / "run"))
    finish.describe(workdir, recipe, model, mesh)
    checkpoints = Checkpoints(workdir.checkpoints, reference=named)
    state, _ = start_state(recipe, model, program, mesh, checkpoints)
    for step in (1, 2):
        checkpoints.save(step, state, {"step": step}, {})
    checkpoints.close()
    held, record = Checkpoints(workdir.checkpoints, writable=False).read_params()
    assert held["frozen"] == {} and record["frozen_from"] == str(source)
    assert len(records.named_only(record)) == len(jax.tree.leaves(state.frozen))

    again, _ = start_state(recipe, model, program, mesh, Checkpoints(workdir.checkpoints, reference=named))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    assert jax.tree.map(lambda x: x.sharding, again) == jax.tree.map(lambda x: x.sharding, state)
    both = merge(state.params, state.frozen)
    jax.tree.map(
        np.testing.assert_array_equal, frozen.whole(held, record, recipe, model)["frozen"], state.frozen
    )
    run = inspecting.open_run(str(tmp_path / "run"))
    assert "; 24 frozen ones are those of" in inspecting.verdict(run, 2)[1]
    assert list(inspecting.difference((run, 1), (run, 2))) == []
    inspecting.average(run, [1, 2], str(tmp_path / "mean"))
    mean, _ = Checkpoints(f"{tmp_path}/mean/checkpoints", writable=False).read_params()
    jax.tree.map(np.testing.assert_array_equal, merge(mean["params"], mean["frozen"]), both)

    with pytest.raises(CheckpointError, match=r"set config\.init_from, or model"):
        Checkpoints(workdir.checkpoints).restore_newest(program.state)
    changed = jax.tree.map(lambda x: x + 1e-3, params)
    hub.save(MODEL, changed, source)
    for read in (
        lambda: Checkpoints(workdir.checkpoints, reference=named).restore_newest(program.state),
        lambda: frozen.whole(held, record, recipe, model),
    ):
        with pytest.raises(
            CheckpointError, match="frozen parameters .*vision_model/.*bring back what was there"
        ):
            read()
    assert Checkpoints(workdir.checkpoints).steps() == [1, 2]  # they are good, and not set aside
    shutil.rmtree(source)
    with pytest.raises(CheckpointError, match=r"config\.init_from: .*hf"):
        Checkpoints(workdir.checkpoints, reference=named).restore_newest(program.state)


def test_sizes_and_vocabularies_that_do_not_fit(folder):
    path, _ = folder
    with pytest.raises(RecipeError, match="image_size=20 is not a multiple of the model's patch_size=8"):
        build.make_model(tiny.recipe(init_from=str(path), model__image__image_size=20), Words())
    with pytest.raises(RecipeError, match="has 65 tokens, the text tower embeds 64"):
        build.make_model(tiny.recipe(init_from=str(path), model__image__image_size=32), Words(65))


def test_heads_and_widths_that_tensor_does_not_divide_are_refused_before_anything_compiles():
    """Three heads over two devices: the recipe's key and what would do are named."""

    def start(tensor, **changes):
        config = dataclasses.replace(MODEL.config, image=dataclasses.replace(MODEL.config.image, **changes))
        make_program(tiny.recipe(), Clip(config), make_mesh(tensor=tensor), optax.constant_schedule(0.1))

    said = (
        r"config\.mesh\.tensor=2 does not divide the 3 heads of the image tower "
        r"\(config\.model\.image\.heads\): choose one of 1, 3$"
    )
    with pytest.raises(RecipeError, match=said):
        start(2, width=24, heads=3)
    with pytest.raises(
        RecipeError, match=r"fc1/.*31 cannot be cut into 2 .*; change config\.mesh\.tensor, or"
    ):
        start(2, mlp_dim=31)
