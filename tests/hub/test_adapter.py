"""Adapters in PEFT's format: put into the torch model by hand they give our logits, and so does the merged export."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from training import tiny_vlm

from vlmjax import export, hub
from vlmjax.config import Config
from vlmjax.errors import CheckpointError, HubError
from vlmjax.models import lora
from vlmjax.models.lora import LoraConfig
from vlmjax.training import build
from vlmjax.training.checkpoint import Checkpoints
from vlmjax.training.workdir import Workdir

CONFIG = LoraConfig(
    rank=3, alpha=6.0, targets=(r"language_model/.*/(q_proj|down_proj)/kernel", r"vision_model/.*/fc1/kernel")
)
IDS = np.array([[7, *[tiny_vlm.IMAGE] * 4, 9, 11, 30], [8, 9, 10, 11, 12, 13, 14, 15]], np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 1, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def adapted():
    """(parameters as they were, trained ones): adapters that do something, and another bridge."""
    base = tiny_vlm.random_params()
    params = tiny_vlm.host(lora.with_adapters(base, CONFIG, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params["lora"] = jax.tree.map(
        lambda x: x + 0.2 * rng.normal(size=x.shape).astype(x.dtype), params["lora"]
    )
    params["bridge"] = jax.tree.map(lambda x: x * 1.5, params["bridge"])
    return base, params


@pytest.fixture(scope="module")
def run(adapted, tmp_path_factory):
    """A run's folder without its training, beside its base model: the bridge and the adapters were trained."""
    from vlmjax.data import bpe

    folder = tmp_path_factory.mktemp("adapter")
    base, params = adapted
    hub.save(tiny_vlm.model(), base, folder / "base")
    workdir = Workdir(str(folder / "run"))
    bpe.train_bpe(["a red circle"] * 9, 520, folder / "run" / "tokenizer")
    group = Config({"rank": 3, "alpha": 6.0, "targets": CONFIG.targets, "dropout": 0.1})
    recipe = tiny_vlm.recipe(init_from=str(folder / "base"), lora=group)
    workdir.write_json("recipe.json", recipe.to_dict())
    workdir.write_json("model.json", build.model_to_json(tiny_vlm.model()))
    state = {"params": {}, "frozen": {}, "ema": {}, "opt_state": {"mu": np.zeros(3)}}
    for name, value in jax.tree.map(jax.numpy.asarray, params).items():
        state["params" if name in ("lora", "bridge") else "frozen"][name] = value
    checkpoints = Checkpoints(workdir.checkpoints)
    checkpoints.save(1, jax.tree.map(jax.numpy.asarray, state), {"step": 1}, {})
    checkpoints.close()
    return folder


def logits(params, config=CONFIG):
    with lora.applied(config):
        inputs = {"input_ids": IDS, "pixel_values": PIXELS, "method": "causal_lm"}
        run = jax.jit(lambda given: tiny_vlm.model().apply(given, **inputs))
        return np.asarray(run(lora.variables(params)))


def torch_logits(model):
    import torch

    pixels = torch.tensor(PIXELS[:1, 0].transpose(0, 3, 1, 2))
    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS, dtype=torch.long), pixel_values=pixels).logits.numpy()


@pytest.mark.slow
def test_put_beside_the_base_model_by_hand(run, adapted):
    """What PEFT does: W + (alpha / r) B A in the module of that name, and whole modules in the place of others."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    export.export_adapter(str(run / "run"), str(run / "adapter"))
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["base_model_name_or_path"] == str(run / "base")
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (3, 6.0, 0.1)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        settings["base_model_name_or_path"], attn_implementation="eager"
    ).eval()
    before = torch_logits(model)
    modules, prefix = dict(model.named_modules()), "base_model.model."
    tensors = {
        name.removeprefix(prefix): value
        for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items()
    }
    assert len(settings["target_modules"]) == 3 * 2
    with torch.no_grad():
        for name in settings["target_modules"]:
            a, b = (torch.tensor(tensors.pop(f"{name}.lora_{part}.weight")) for part in "AB")
            linear = modules[name]
            assert a.shape == (3, linear.in_features) and b.shape == (linear.out_features, 3)
            linear.weight += settings["lora_alpha"] / settings["r"] * (b @ a)
        for name in settings["modules_to_save"]:
            for part, value in modules[name].named_parameters():
                value.copy_(torch.tensor(tensors.pop(f"{name}.{part}")))
    assert not tensors
    assert settings["modules_to_save"] == [f"model.multi_modal_projector.linear_{i}" for i in (1, 2)]
    expected = logits(adapted[1])
    np.testing.assert_allclose(torch_logits(model), expected, atol=2e-5)
    assert np.abs(before - expected).max() > 0.1


def test_the_merged_export_is_what_was_applied(run, adapted):
    model, params, tokenizer, _ = export.load_workdir(str(run / "run"))
    assert "lora" not in params and len(tokenizer("a")) > 0
    expected = logits(adapted[1])
    np.testing.assert_allclose(logits(params, LoraConfig()), expected, atol=1e-5)
    hub.save(model, params, run / "merged")
    _, again = hub.load(run / "merged")
    np.testing.assert_allclose(logits(again, LoraConfig()), expected, atol=1e-5)


def test_every_adapted_tensor_is_a_module_of_transformers_with_siglip_too():
    """Names alone: each is one that LlavaForConditionalGeneration has in memory."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import dataclasses

    from vlmjax.hub import llava

    config = tiny_vlm.model().config
    siglip = dataclasses.replace(config.image, class_token=False, pool="attention", patch_bias=True)
    siglip = dataclasses.replace(siglip, pre_norm=False)
    for image in (config.image, siglip):
        whole = dataclasses.replace(config, image=image)
        with torch.device("meta"):
            theirs = transformers.LlavaForConditionalGeneration(
                transformers.LlavaConfig(**llava.from_llava(whole))
            )
        ours = {llava.in_memory(name) for row in llava.vlm_rows(whole) for name in row.names()}
        assert ours == set(dict(theirs.named_parameters()))


def test_what_has_no_place_in_the_format(adapted, tmp_path):
    base, params = adapted
    model, options = tiny_vlm.model(), {"alpha": 6.0, "base": "somewhere"}
    patches = LoraConfig(rank=2, targets=("vision_model/.*/patch_embedding/kernel",))
    with pytest.raises(
        HubError, match=r"patch_embedding/kernel is no Linear in LlavaForConditionalGeneration"
    ):
        hub.save_adapter(
            model, lora.with_adapters(base, patches, jax.random.key(0)), tmp_path / "x", **options
        )
    with pytest.raises(HubError, match="adapters of one rank are written, these have none"):
        hub.save_adapter(model, base, tmp_path / "x", **options)
    assert not (tmp_path / "x").exists()


def test_a_run_without_adapters_or_without_a_base(run, tmp_path):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps({**recipe, "init_from": ""}))
    with pytest.raises(CheckpointError, match="did not begin from one folder .* leave --adapter out"):
        export.export_adapter(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
