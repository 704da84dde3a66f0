"""BLIP's own .pth files: every form, read without PyTorch; ties, momentum, sizes, and what is refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import models
import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import lavis, table, torch_file
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip, BlipCaptioner, BlipRetriever
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.models.vit import VitConfig

VIT = VitConfig(
    128, 2, 2, 40, image_size=8, patch_size=4, activation="gelu", layer_norm_eps=1e-6, class_token=True,
    pre_norm=False, patch_bias=True, pool="none", init="normal",
)  # fmt: skip
MED = BertConfig(64, 3, 1, 24, vocab_size=120, max_length=10, type_vocab_size=None)
CONFIG = BlipConfig(VIT, MED, 12, bos_token_id=118, enc_token_id=119, sep_token_id=102)
MODELS = [Blip(CONFIG), BlipCaptioner(CONFIG), BlipRetriever(CONFIG), BlipVqa(CONFIG), BlipNlvr(CONFIG)]
EVERY = pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)


def params_of(model):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), lavis._abstract(model))


def names_there(name):
    """A tensor's name in a file of LAVIS."""
    name = name.replace("vision_model.encoder.layers", "visual_encoder.blocks")
    name = name.replace("self_attn.projection", "attn.proj").replace("self_attn", "attn")
    name = name.replace("layer_norm", "norm") if name.startswith("visual") else name
    for ours, theirs in (
        ("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed"),
        ("embeddings.patch_embedding", "patch_embed.proj"), ("post_layernorm", "norm"),
    ):  # fmt: skip
        name = name.replace(f"vision_model.{ours}", f"visual_encoder.{theirs}")
    return name


def tensors_of(model, params):
    """A state_dict as the original code keeps it."""
    params = {name: value for name, value in params.items() if name != "temp"}
    expected = {name: x for name, x in lavis._abstract(model).items() if name != "temp"}
    written = table.write(lavis._rows(model), params, expected)
    found = {
        names_there(name): torch.from_numpy(np.ascontiguousarray(tensor.make()))
        for name, tensor in written.items()
    }
    if isinstance(model, Blip):  # shared parameters stand under both names
        for name in [name for name in found if name.startswith("text_encoder.")]:
            if not re.search(r"layer\.\d+\.attention\.", name):
                found[name.replace("text_encoder.", "text_decoder.bert.")] = found[name]
    for prefix in ("text_decoder.bert", "text_encoder"):
        if f"{prefix}.embeddings.word_embeddings.weight" in found:
            found[f"{prefix}.embeddings.position_ids"] = torch.arange(10)[None]
    table_name = "text_decoder.bert.embeddings.word_embeddings.weight"
    if table_name in found:
        head = "text_decoder.cls.predictions"
        found |= {f"{head}.decoder.weight": found[table_name], f"{head}.decoder.bias": found[f"{head}.bias"]}
    return found


def saved(path, model, params, change=lambda tensors: tensors):
    tensors = tensors_of(model, params)
    if isinstance(model, BlipRetriever):
        tensors["temp"] = torch.tensor(0.0213)
    if isinstance(model, Blip):
        tensors |= {"vision_proj_m.weight": torch.ones(3), "visual_encoder_m.cls_token": torch.ones(2)}
        tensors |= {"image_queue": torch.ones(12, 4), "queue_ptr": torch.zeros(1, dtype=torch.long)}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    rest = {"optimizer": optimizer.state_dict(), "epoch": 3, "config": {"init_lr": 3e-4, "set": {1, 2}}}
    torch.save({"model": change(tensors), **rest}, path)
    return path


@EVERY
def test_every_form_comes_back_bit_equal(model, tmp_path):
    params = params_of(model)
    file = saved(tmp_path / "blip.pth", model, params)
    loaded, found = hub.load_lavis(file)
    dim = 12 if isinstance(model, BlipRetriever) else 256  # others have no common space
    assert (type(loaded), loaded.config) == (type(model), dataclasses.replace(CONFIG, projection_dim=dim))
    if "temp" in params:
        params["temp"] = np.float32(0.0213)
    assert models.same(found, jax.tree.map(jnp.asarray, params))


@pytest.mark.parametrize("form", [BlipCaptioner, BlipRetriever])
def test_halves_of_a_file_of_pretraining(form, tmp_path):
    params = params_of(MODELS[0])
    file = saved(tmp_path / "blip.pth", MODELS[0], params)
    name = {value: key for key, value in lavis.FORMS.items()}[form]
    loaded, found = hub.load_lavis(file, name)
    assert type(loaded) is form
    whole = table.flatten(params | {"temp": np.float32(0.0213)})
    flat = table.flatten(found)
    assert set(flat) == set(table.flatten(lavis._abstract(loaded)))
    assert all(np.array_equal(value, whole[path]) for path, value in flat.items())


def test_images_of_another_size(tmp_path):
    file = saved(tmp_path / "blip.pth", MODELS[1], params_of(MODELS[1]))
    model, params = hub.load_lavis(file, image_size=(12, 20))
    assert model.config.image.grid == (3, 5)
    found = params["vision_model"]["embeddings"]["position_embedding"]
    before = params_of(MODELS[1])["vision_model"]["embeddings"]["position_embedding"]
    grid = torch.from_numpy(before[1:].reshape(1, 2, 2, 128)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(3, 5), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(found[1:], wanted.permute(0, 2, 3, 1).reshape(15, 128), atol=2e-6)
    np.testing.assert_array_equal(found[0], before[0])


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_another(name):
    return lambda tensors: tensors | {name: tensors[name] + 1}


TIED = "text_decoder.bert.encoder.layer.1.output.dense.weight"


@pytest.mark.parametrize(
    ("index", "change", "form", "message"),
    [
        (0, with_another(TIED), None, "is not what text_encoder has.*form='captioning'"),
        (1, without("visual_encoder.norm.bias"), None, "1 missing: vision_model.post_layernorm.bias"),
        (1, lambda t: t | {"more": torch.ones(2)}, None, r"1 left over: model.more \[2\]"),
        (1, without("visual_encoder.pos_embed"), None, "position_embedding"),
        (1, lambda t: {"x.weight": torch.ones(2)}, None, "holds no BLIP"),
        (1, lambda t: t, "retrieval", "holds a model of captioning.*'retrieval'"),
        (0, lambda t: t, "vqa", "holds a model of pretraining"),
    ],
)
def test_what_is_refused(index, change, form, message, tmp_path):
    file = saved(tmp_path / "blip.pth", MODELS[index], params_of(MODELS[index]), change)
    with pytest.raises(HubError, match=message):
        hub.load_lavis(file, form)


# ---- PyTorch's files


def test_tensors_of_every_dtype_views_and_shared_storages(tmp_path):
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "whole": base, "rows": base[1:3], "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3),
        "half": base.half(), "bfloat": base.bfloat16(), "long": torch.tensor([[1], [-2]]),
        "parameter": torch.nn.Parameter(torch.ones(2)), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    torch.save({"a": {"b": tensors}, "list": [1, torch.ones(2)]}, tmp_path / "x.pth")
    found = torch_file.open_file(tmp_path / "x.pth")
    assert set(found) == {f"a.b.{name}" for name in tensors}
    for name, tensor in tensors.items():
        value = found[f"a.b.{name}"]
        assert value.shape == tuple(tensor.shape)
        if name == "bfloat":
            assert value.dtype == ml_dtypes.bfloat16
            value = value.astype(np.float32)
        np.testing.assert_array_equal(value, tensor.detach().float().numpy())


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def test_no_code_of_a_file_is_run(tmp_path):
    torch.save({"bad": Evil(), "good": torch.ones(2)}, tmp_path / "x.pth")
    assert list(torch_file.open_file(tmp_path / "x.pth")) == ["good"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(HubError, match="no such file"):
        torch_file.open_file(tmp_path / "none.pth")
    torch.save({"x": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(HubError, match=r"PyTorch 1\.6"):
        torch_file.open_file(tmp_path / "old.pth")
    torch.save({"x": torch.arange(6).reshape(2, 3).T}, tmp_path / "turned.pth")
    with pytest.raises(HubError, match="does not lie in order"):
        torch_file.open_file(tmp_path / "turned.pth")
    whole = (tmp_path / "turned.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(HubError, match="cut short"):
        torch_file.open_file(tmp_path / "cut.pth")
