"""LLaVA-1.5 13B, stage 2 (2310.03744): as llava15_7b_stage2.py, from the 13B's own stage 1.

The numbers of both sizes are the same (table 9, and scripts/v1_5/finetune.sh in haotian-liu/LLaVA).
"""

from vlmjax.config import Config, beside, choose


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on questions about scenes."""
    c = beside(__file__, "llava15_7b_stage2.py")
    c.model = beside(__file__, "llava15_13b_stage1.py").model
    c.init_from = "runs/llava15_13b_stage1/hf"  # what configs/llava15_13b_stage1.py leaves
    return choose(c, arg)
