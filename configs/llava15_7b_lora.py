"""LLaVA-1.5 7B, stage 2 with low-rank adapters in place of the language model's own weights (2106.09685, 2310.03744).

As llava15_7b_stage2.py, but of the language model only adapters are trained. Numbers without another source are those
of scripts/v1_5/finetune_lora.sh in haotian-liu/LLaVA. `python -m vlmjax.export --adapter` writes what was learned.
"""

from vlmjax.config import Config, beside, choose


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on questions about scenes."""
    c = beside(__file__, "llava15_7b_stage2.py")
    c.frozen = ("vision_model/.*", "language_model/.*")
    c.lora.rank, c.lora.alpha = 128, 256.0
    c.lora.dropout = 0.05  # llava/train/train.py: lora_dropout
    # llava/train/train.py, find_all_linear_names: every projection of the language model but the head
    c.lora.targets = (r"language_model/.*/(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)/kernel",)
    c.optimizer.learning_rate = 2e-4
    c.optimizer.learning_rate_multipliers = ((r"bridge/.*", 0.1),)  # mm_projector_lr 2e-5
    return choose(c, arg)
