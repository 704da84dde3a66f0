"""Whole folders: round trips of every family, dtypes, shards, placement, and what is refused."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import models
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import table
from vlmjax.hub.safetensors import FILE, INDEX, Weights, open_folder
from vlmjax.models.clip import Clip, ClipConfig, ClipVision

EVERY = pytest.mark.parametrize("name", list(models.MODELS))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    hub.save(models.MODELS["CLIPModel"], models.params_of("CLIPModel"), path)
    return path


@pytest.fixture
def changed(clip_folder, tmp_path):
    """Return a function that copies the folder with other tensors or another config, and gives its path."""

    def change(tensors=lambda t: t, config=lambda c: c):
        path = tmp_path / "changed"
        shutil.copytree(clip_folder, path)
        found = safetensors.numpy.load_file(path / FILE)
        safetensors.numpy.save_file(tensors(dict(found)), path / FILE)
        settings = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config(settings)))
        return path

    return change


@EVERY
def test_round_trip_is_bit_equal(name, tmp_path):
    model, params = models.MODELS[name], models.params_of(name)
    hub.save(model, params, tmp_path / "a")
    loaded, first = hub.load(tmp_path / "a")
    assert (type(loaded), loaded.config) == (type(model), model.config)
    assert getattr(loaded, "projection_dim", None) == getattr(model, "projection_dim", None)
    assert models.same(first, params)
    hub.save(loaded, first, tmp_path / "b")
    for file in (FILE, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert json.loads((tmp_path / "a" / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("name", [name for name in models.MODELS if not name.startswith("Blip")])
def test_the_architecture_may_be_left_out_of_config(name, tmp_path):
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name.endswith(
        ("WithProjection", "Classification")
    ):  # shares its model_type with the class without one
        with pytest.raises(HubError, match="left over: .*(_projection|classifier).weight"):
            hub.load(tmp_path)
        config["architectures"] = [name] if name.endswith("Classification") else []
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert models.same(hub.load(tmp_path, architecture=name)[1], models.params_of(name))
    else:
        assert models.same(hub.load(tmp_path)[1], models.params_of(name))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(dtype, tmp_path):
    name = "VisionTextDualEncoderModel"
    model, params = models.MODELS[name], models.params_of(name)
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    rounded = jax.tree.map(lambda x: x.astype(numpy_dtype), params)
    hub.save(model, params, tmp_path, dtype=dtype)
    code = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert f'"dtype":"{code}"'.encode() in (tmp_path / FILE).read_bytes()[:500]
    _, single = hub.load(tmp_path)
    assert models.same(single, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    loaded, half = hub.load(tmp_path, dtype=dtype)
    assert models.same(half, rounded)
    assert loaded.config.image.dtype == loaded.config.text.dtype == dtype
    assert hub.load(tmp_path, compute_dtype=dtype)[0].config.text.dtype == dtype


def test_sharded_files(clip_folder, tmp_path):
    params = models.params_of("CLIPModel")
    hub.save(models.MODELS["CLIPModel"], params, tmp_path, max_shard_bytes=20_000)
    assert (tmp_path / INDEX).is_file() and not (tmp_path / FILE).exists()
    assert models.same(hub.load(tmp_path)[1], params)
    whole, parts = open_folder(clip_folder), open_folder(tmp_path)
    assert set(whole) == set(parts) and all(np.array_equal(whole[n], parts[n]) for n in whole)


@pytest.mark.parametrize("name", ["CLIPModel", "VisionTextDualEncoderModel"])
def test_each_device_reads_its_own_part(name, tmp_path):
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def split(abstract):
        def place(leaf):
            axis = next((i for i in reversed(range(leaf.ndim)) if leaf.shape[i] % 4 == 0), None)
            spec = [None] * leaf.ndim
            if axis is not None:
                spec[axis] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(place, abstract)

    _, params = hub.load(tmp_path, shardings=split)
    assert models.same(params, models.params_of(name))
    kernel = params["vision_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, None, "fsdp")
    assert kernel.addressable_shards[0].data.shape == (2, 20, 7)
    _, again = hub.load(tmp_path, shardings=jax.tree.map(lambda leaf: leaf.sharding, params))
    assert models.same(again, params)


def test_a_part_is_read_without_the_rest(clip_folder, monkeypatch):
    """Of a stack only the layers of the part are opened; of a matrix only a view is cut."""
    model = models.MODELS["CLIPModel"]
    asked = []
    original = Weights.__getitem__
    monkeypatch.setattr(Weights, "__getitem__", lambda self, name: asked.append(name) or original(self, name))
    row = table.linear("text_model.encoder.layers.{layer}.mlp.fc1", "fc1", layers=model.config.text.depth)[0]
    part = table._load(
        row, row.names(), open_folder(clip_folder), (3, 12, 20), np.dtype(np.float32), np.s_[1:2, 3:6, ::2]
    )
    expected = models.params_of("CLIPModel")["text_model"]["encoder"]["layers"]["mlp"]["fc1"]["kernel"]
    assert np.array_equal(part, expected[1:2, 3:6, ::2])
    assert {name for name in asked if "layers" in name} == {"text_model.encoder.layers.1.mlp.fc1.weight"}


def test_loaded_parameters_do_not_hang_on_the_file(clip_folder, tmp_path):
    path = tmp_path / "copy"
    shutil.copytree(clip_folder, path)
    _, params = hub.load(path)
    with (path / FILE).open("r+b") as stream:
        stream.truncate(8)
        stream.write(b"\0" * 100)
    assert models.same(params, models.params_of("CLIPModel"))


def test_what_is_missing_left_over_and_ill_shaped_is_listed(changed):
    def spoil(tensors):
        del tensors["text_projection.weight"]
        tensors["text_model.head.weight"] = np.zeros((2, 3), np.float32)
        tensors["logit_scale"] = np.zeros((1,), np.float32)
        tensors["vision_model.embeddings.class_embedding"] = np.zeros(20, np.int32)
        return tensors

    with pytest.raises(HubError) as caught:
        hub.load(changed(spoil))
    message = str(caught.value)
    assert "1 missing: text_projection.weight [10, 12]" in message
    assert "1 left over: text_model.head.weight [2, 3]" in message
    assert "1 ill-shaped: logit_scale is [1], expected []" in message
    assert "1 not floating point: vision_model.embeddings.class_embedding is int32" in message
    assert "\n" not in message


def test_position_buffers_of_old_files_are_ignored_and_nothing_else(changed):
    ids = {
        f"{tower}.embeddings.position_ids": np.arange(16)[None] for tower in ("text_model", "vision_model")
    }
    assert models.same(hub.load(changed(lambda t: t | ids))[1], models.params_of("CLIPModel"))


def test_another_buffer_is_left_over(changed):
    with pytest.raises(HubError, match="left over: text_model.position_ids"):
        hub.load(changed(lambda t: t | {"text_model.position_ids": np.arange(16)}))


def test_a_layer_too_many_or_too_few(changed):
    path = changed(config=lambda c: c | {"text_config": c["text_config"] | {"num_hidden_layers": 2}})
    with pytest.raises(HubError, match=r"16 left over: text_model.encoder.layers.2"):
        hub.load(path)


@pytest.mark.parametrize("name", ["BertModel", "VisionTextDualEncoderModel"])
def test_old_spellings_of_bert(name, tmp_path):
    """gamma and beta, the `bert.` prefix, buffers."""
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    prefix = "bert." if name == "BertModel" else ""
    old = {
        prefix
        + key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value
        for key, value in tensors.items()
    }
    assert len(set(old) - set(tensors)) >= 10
    inner = "bert." if name == "BertModel" else "text_model."
    old[f"{inner}embeddings.position_ids"] = np.arange(16)[None]
    safetensors.numpy.save_file(old, tmp_path / FILE)
    assert models.same(hub.load(tmp_path)[1], models.params_of(name))
    safetensors.numpy.save_file(old | {"bert.pooler.dense.bias": np.zeros(12, np.float32),
                                       "pooler.dense.bias": np.zeros(12, np.float32)}, tmp_path / FILE)  # fmt: skip
    with pytest.raises(HubError, match="two spellings|left over"):
        hub.load(tmp_path)


@pytest.mark.parametrize("name", ["CLIPVisionModel", "CLIPTextModel", "VisionTextDualEncoderModel"])
def test_names_of_transformers_5(name, tmp_path):
    """It writes towers without the prefix that transformers 4 needs."""
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / FILE)
    if name.startswith("CLIP"):
        new = {key.partition(".")[2]: value for key, value in tensors.items()}
    else:
        new = {key.replace("vision_model.vision_model.", "vision_model."): v for key, v in tensors.items()}
    assert set(new) != set(tensors)
    safetensors.numpy.save_file(new, tmp_path / FILE)
    assert models.same(hub.load(tmp_path)[1], models.params_of(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"architectures": ["CLIPModle"]}, "architecture CLIPModle is not supported; nearest.*CLIPModel"),
        (lambda c: c | {"architectures": ["T5Stack"]}, "T5Stack is not supported; supported: BertModel, Blip"),
        (lambda c: c | {"architectures": None, "model_type": "gemma"}, "architecture gemma is not supported"),
        (lambda c: c | {"vision_config": c["vision_config"] | {"hidden_act": "gelu_quick"}}, "'gelu_quick'; nearest"),
        (lambda c: c | {"vision_config": c["vision_config"] | {"num_channels": 4}}, "num_channels is 4; only 3"),
        (lambda c: c | {"vision_config": c["vision_config"] | {"image_size": [24, 32]}}, "image_size.*square"),
        (lambda c: c | {"vision_config": c["vision_config"] | {"num_attention_heads": 3}}, "multiple of heads 3"),
        (lambda c: c | {"text_config": c["text_config"] | {"eos_token_id": [1, 2]}}, "eos_token_id.*one token id"),
        (lambda c: c | {"text_config": "no"}, "wrong type"),
        (lambda c: [], "expected an object"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(changed, change, message):
    with pytest.raises(HubError, match=message) as caught:
        hub.load(changed(config=change))
    assert "changed" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("position_embedding_type", "relative_key"), ("is_decoder", True), ("add_cross_attention", True)],
)
def test_a_bert_of_another_kind_is_refused(key, value, tmp_path):
    hub.save(models.MODELS["BertModel"], models.params_of("BertModel"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match=f"{key} is {value!r}; only"):
        hub.load(tmp_path)


def test_a_dual_encoder_of_other_towers_is_refused(tmp_path):
    name = "VisionTextDualEncoderModel"
    hub.save(models.MODELS[name], models.params_of(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["model_type"] = "vit"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match="vision_config.model_type is 'vit'"):
        hub.load(tmp_path)


def test_what_a_folder_cannot_be_read_as(clip_folder):
    with pytest.raises(HubError, match="holds CLIPModel, which cannot be read as BertModel"):
        hub.load(clip_folder, architecture="BertModel")
    with pytest.raises(HubError, match="dtype is 'fp32'; supported: float32"):
        hub.load(clip_folder, dtype="fp32")


def test_activation_follows_the_file(changed):
    """Two folders that differ in hidden_act alone give two models."""
    path = changed(config=lambda c: c | {"vision_config": c["vision_config"] | {"hidden_act": "quick_gelu"}})
    model, _ = hub.load(path)
    assert (model.config.image.activation, model.config.text.activation) == ("quick_gelu", "quick_gelu")
    assert models.IMAGE.activation == "gelu"


def test_left_out_keys_mean_transformers_defaults():
    from vlmjax.hub.clip import CLIP

    config = CLIP.to_model(
        {"model_type": "clip", "vision_config": {"hidden_size": 1024, "num_attention_heads": 16}}
    )
    assert config.config.image.width == 1024 and config.config.image.patch_size == 32
    assert config.config.text.activation == "quick_gelu" and config.config.text.eos_token_id == 49407


def test_the_second_copy_in_openais_folders_wins():
    """Their config.json has text_config and text_config_dict; CLIPConfig lets the second overrule, defaults too."""
    from vlmjax.hub.clip import CLIP

    text = {"hidden_size": 512, "num_attention_heads": 8, "eos_token_id": 2, "vocab_size": 100}
    copy = {"hidden_size": 768, "num_attention_heads": 12}
    both = {"model_type": "clip", "text_config": text, "text_config_dict": copy, "vision_config_dict": None}
    tower = CLIP.to_model(both).config.text
    assert (tower.width, tower.heads, tower.eos_token_id, tower.vocab_size) == (768, 12, 49407, 49408)


def test_folders_that_are_not_there(tmp_path, clip_folder):
    for name in (tmp_path / "nothing", "./nothing", "no/such/folder"):
        with pytest.raises(HubError, match="no such folder"):
            hub.load(name)
    with pytest.raises(HubError, match="is a file; give the folder"):
        hub.load(clip_folder / FILE)
    with pytest.raises(HubError, match="holds no config.json"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HubError, match="not valid JSON"):
        hub.load(tmp_path)


def test_a_hub_id_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        HubError, match="openai/no-such-clip: no such folder, not in the hub cache.*HF_HUB_OFFLINE"
    ):
        hub.load("openai/no-such-clip")


def test_a_hub_id_is_fetched_once_with_its_revision(monkeypatch, clip_folder):
    calls = []

    def fetch(repository, *, revision, allow_patterns):
        calls.append((repository, revision))
        assert "model.safetensors" in allow_patterns and "*.json" in allow_patterns
        return str(clip_folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub.load("someone/clip")
    hub.load("someone/clip@refs/pr/3")
    assert calls == [("someone/clip", None), ("someone/clip", "refs/pr/3")]


class TestRefusedOnSave:
    """What the Hugging Face class cannot express."""

    def test_images_that_are_not_square(self, tmp_path):
        wide = ClipVision(dataclasses.replace(models.IMAGE, image_size=(24, 32)))
        with pytest.raises(HubError, match="24x32.*square"):
            hub.save(wide, {}, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_parameters_that_have_no_name_there(self, tmp_path):
        params = models.params_of("CLIPModel")
        head = params["visual_projection"] | {"bias": np.zeros(10, np.float32)}
        with pytest.raises(HubError, match=r"without a Hugging Face name: visual_projection/bias \[10\]"):
            hub.save(models.MODELS["CLIPModel"], params | {"visual_projection": head}, tmp_path)
        with pytest.raises(HubError, match="not there: logit_scale"):
            without = {key: value for key, value in params.items() if key != "logit_scale"}
            hub.save(models.MODELS["CLIPModel"], without, tmp_path)

    def test_parameters_of_another_model(self, tmp_path):
        other = Clip(ClipConfig(models.IMAGE, models.TEXT, 8))
        with pytest.raises(HubError, match=r"visual_projection/kernel is \[20, 10\], expected \[20, 8\]"):
            hub.save(other, models.params_of("CLIPModel"), tmp_path)
        deeper = Clip(ClipConfig(models.IMAGE, dataclasses.replace(models.TEXT, depth=4), 10))
        with pytest.raises(HubError, match="the configuration says 4 layers"):
            hub.save(deeper, models.params_of("CLIPModel"), tmp_path)

    def test_a_model_without_a_class(self, tmp_path):
        from vlmjax.models.vit import Vit

        with pytest.raises(HubError, match="Vit has no Hugging Face class"):
            hub.save(Vit(models.IMAGE), {}, tmp_path)


def test_importing_the_room_is_light():
    code = (
        "import sys, vlmjax\n"
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert vlmjax.hub.load.__name__ == 'load' and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("name", ["CLIPModel", "VisionTextDualEncoderModel"])
def test_a_bias_that_the_class_has_not_is_kept_beside(name, tmp_path):
    """The sigmoid loss trains one; transformers reads the folder as ever, and we read the bias back."""
    model, params = models.MODELS[name], {**models.params_of(name), "logit_bias": np.float32(-9.5)}
    hub.save(model, params, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["logit_bias"] == -9.5
    loaded, again = hub.load(tmp_path / "a")
    assert models.same(again, params)
    hub.save(loaded, again, tmp_path / "b")
    for file in (FILE, "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
