"""Whole generative runs, rows packed or grouped: killed in the middle they end as if they never had been."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from training import tiny

from vlmjax import export, hub
from vlmjax.config import VLM_SHARDING

pytestmark = pytest.mark.slow

CHANGES = {
    "stage": "generative",
    "batch_size": 8,
    "micro_batches": 2,
    "total__steps": 7,
    "checkpoint__every__steps": 3,
    "checkpoint__keep_last": 3,
    "export": True,
    "sharding": VLM_SHARDING,
    "frozen": ("vision_model/.*",),
    "lora__rank": 2,
    "lora__dropout": 0.1,
    "lora__targets": ("language_model/.*/(q_proj|v_proj)/kernel",),
    "data__train": "scenes:train:questions",
    "data__tokenizer": "bpe:600",
    "data__conversation__template": "mistral_instruct",
    "data__max_length": 160,
    "data__images_per_row": 3,
    "data__packing": True,
    **{f"model__language__{name}": size for name, size in (("width", 16), ("depth", 2), ("mlp_dim", 32))},
    **{f"model__language__{name}": 2 for name in ("heads", "kv_heads")},
}


def train(recipe, workdir):
    done = tiny.python("-m", "vlmjax.main", f"--config={recipe}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exact(workdir):
    """What must be equal bit for bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in tiny.rows(workdir) if "loss" in row]


def test_killed_in_the_middle_and_exported(tmp_path):
    recipe = tiny.write_recipe(tmp_path, **CHANGES)
    said = train(recipe, tmp_path / "whole")
    assert "adapters of rank 2" in said
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in (6, 7):  # as if the process had been killed after step 5
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    shutil.rmtree(tmp_path / "again" / "hf")
    said = train(recipe, tmp_path / "again")
    assert "3 to 7 (continued)" in said
    assert len(exact(tmp_path / "whole")) == 7
    assert exact(tmp_path / "again") == exact(tmp_path / "whole")
    (_, one), (_, other) = (hub.load(tmp_path / name / "hf") for name in ("whole", "again"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    _, params, _, _ = export.load_workdir(str(tmp_path / "whole"))
    assert "lora" not in params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, one)
    start = export.load_workdir(str(tmp_path / "whole"), step=3)[1]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, params)
    attention = moved["language_model"]["layers"]["self_attn"]
    assert attention["q_proj"]["kernel"] and attention["o_proj"]["kernel"]
    assert not any(jax.tree.leaves(moved["vision_model"])) and all(jax.tree.leaves(moved["bridge"]))


def conversations(folder, count=96):
    """Rows of LLaVA's json: long and short ones, with a picture and without."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        said = [
            {"from": "human", "value": f"{'word ' * (i % 7)}number {i}?"},
            {"from": "gpt", "value": f"it is {i}"},
        ]
        row = {"id": str(i), "conversations": said * (1 + i % 3)}
        if i % 2:
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
            first = {**said[0], "value": "<image>\n" + said[0]["value"]}
            row["conversations"] = [first, said[1], *row["conversations"][2:]]
        rows.append(row)
    (folder / "talk.json").write_text(json.dumps(rows))
    return str(folder / "talk.json")


def test_rows_grouped_by_length_and_modality(tmp_path):
    """Every shape is compiled once, and a run that goes on takes the same batches."""
    data = conversations(tmp_path)
    changes = CHANGES | {"data__packing": False, "data__lengths": (64, 160), "data__images_per_row": 1}
    changes |= {"data__train": data, "total__steps": 13, "checkpoint__every__steps": 6, "lora__rank": 0}
    recipe = tiny.write_recipe(tmp_path, **changes)
    assert "rows of 64 or 160 tokens" in train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for step in (12, 13):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / str(step))
    said = train(recipe, tmp_path / "again")
    assert "6 to 13 (continued)" in said, said
    assert len(exact(tmp_path / "whole")) == 13 and exact(tmp_path / "again") == exact(tmp_path / "whole")
    work = {round(row["model_tflops_per_second"] * row["step_seconds"], 9) for row in tiny.rows(tmp_path / "whole")
            if "model_tflops_per_second" in row}  # fmt: skip
    assert len(work) >= 3  # lengths, with and without images
