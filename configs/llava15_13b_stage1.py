"""LLaVA-1.5 13B, stage 1 (2310.03744): as llava15_7b_stage1.py, with Vicuna 13B to learn for.

The numbers of both sizes are the same (table 9, and scripts/v1_5/pretrain.sh in haotian-liu/LLaVA).
"""

from vlmjax.config import Config, beside, choose


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size."""
    c = beside(__file__, "llava15_7b_stage1.py")
    c.model.language_from = "lmsys/vicuna-13b-v1.5"
    c.model.language.update({"width": 5120, "depth": 40, "heads": 40, "kv_heads": 40, "mlp_dim": 13824})
    return choose(c, arg)
