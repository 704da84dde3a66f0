"""Low-rank adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, beside a base model.

Source of names and keys: huggingface/peft, tuners/lora/config.py and utils/save_and_load.py.
"""

import json
import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from vlmjax.errors import HubError
from vlmjax.hub import safetensors, table
from vlmjax.hub.folder import abstract_params, family_of
from vlmjax.hub.safetensors import Pending
from vlmjax.models import lora

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_FLOAT = np.dtype(np.float32)


def save_adapter(
    model: nn.Module,
    params: Mapping[str, Any],
    folder: str | os.PathLike[str],
    *,
    alpha: float,
    base: str,
    trained: Iterable[str] = (),
    dropout: float = 0.0,
) -> None:
    """Write what training has changed of a base model as a folder that `peft.PeftModel.from_pretrained` reads.

    Names are those of transformers 5 in memory. Tensors are float32, `lora_A` [rank, in] and `lora_B` [out, rank].

    Args:
        model: that the adapters belong to.
        params: its parameters with adapters under `lora`, all on this host.
        folder: made if it is not there.
        alpha: see models/lora.py; the same for all.
        base: Hugging Face folder or id of the model without adapters.
        trained: paths of other parameters that were trained. Their modules are written whole, as `modules_to_save`.
        dropout: of the adapters, should training go on from here.

    Raises:
        HubError: no adapters, adapters of several ranks, or one of a kernel that is no torch.nn.Linear there.
    """
    adapters = lora.pairs(params.get(lora.GROUP, {}))
    ranks = sorted({a.shape[-1] for a, _ in adapters.values()})
    if len(ranks) != 1:
        raise HubError(
            f"adapters of one rank are written, these have {ranks or 'none'}; export the whole model"
        )
    family = family_of(model)
    rows = {path: row for row in family.rows(model) for path in row.paths}
    tensors: dict[str, Pending] = {}
    modules: list[str] = []
    for path, pair in adapters.items():
        row = rows[path]
        if row.transform is not table.LINEAR or len(row.paths) > 1:
            raise HubError(
                f"{path} is no Linear in {family.architecture}, so PEFT has no such adapter for it; export the whole "
                "model"
            )
        for layer, name in enumerate(row.names()):
            module = family.in_memory(name).removesuffix(".weight")
            modules.append(module)
            for part, matrix in zip(("lora_A", "lora_B"), pair, strict=True):
                one = np.asarray(matrix)[layer] if row.layers is not None else np.asarray(matrix)
                name_there = f"{_PREFIX}{module}.{part}.weight"
                tensors[name_there] = Pending(one.T.shape, _FLOAT, partial(np.array, one.T, _FLOAT))
    whole = _modules_of(family, rows, trained)
    own = lora.variables(params)["params"]
    written = table.write(family.rows(model), own, abstract_params(family, model))
    for name, tensor in written.items():
        if any(family.in_memory(name).startswith(f"{module}.") for module in whole):
            tensors[_PREFIX + family.in_memory(name)] = tensor
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    safetensors.write_file(tensors, path / WEIGHTS)
    settings = _settings(base, ranks[0], alpha, dropout, modules, whole)
    (path / SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _modules_of(family: Any, rows: Mapping[str, table.Row], trained: Iterable[str]) -> list[str]:
    """Modules of transformers that hold the parameters at these paths."""
    names = [family.in_memory(name) for path in trained for name in rows[path].names()]
    return sorted({name.rpartition(".")[0] for name in names})


def _settings(
    base: str, rank: int, alpha: float, dropout: float, modules: list[str], whole: list[str]
) -> dict[str, Any]:
    """`peft.LoraConfig` as json; what is not here has PEFT's default."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(modules),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
