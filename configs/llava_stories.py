"""A real language model that learns to see: stories260K of karpathy/llama2.c, with the quickstart's CLIP as its eye.

    python -m vlmjax.hub.llama2c stories260K.bin tok512.bin runs/stories
    python -m vlmjax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m vlmjax.main --config=configs/llava_stories.py:stage1 --workdir=runs/stories1
    python -m vlmjax.main --config=configs/llava_stories.py --workdir=runs/stories2

Both stages as in LLaVA-1.5 (2310.03744), the numbers for a model of 260 thousand parameters: first the bridge alone
learns from captions, then bridge and language model from questions.
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, choose, recipe


def get_config(arg: str = "") -> Config:
    """Stage 2; `:stage1` comes before it, `:tiny` is a smoke test without either of the folders."""
    c = recipe()
    c.stage = "generative"
    c.init_from = "runs/stories1/hf"
    c.batch_size = 32  # rows, each of several conversations
    c.total.steps = 600
    c.log_every = 20
    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "patch_size": 16}
    )
    c.model.language.update({"width": 64, "depth": 5, "heads": 8, "kv_heads": 4, "mlp_dim": 172})
    c.frozen = ("vision_model/.*",)
    c.sharding = VLM_SHARDING

    c.data.train = "scenes:train:single:questions"
    c.data.conversation.template = "v0"
    c.data.conversation.system = "Look at the picture."  # the template's own would be a third of a row
    c.data.max_length = 256
    c.data.images_per_row = 4
    c.data.packing = True
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # places are asked for

    c.optimizer.learning_rate = 2e-3
    c.optimizer.b2 = 0.95
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 30
    return choose(c, arg, stage1=stage1)


def stage1(c: Config) -> Config:
    """Captions for the bridge alone."""
    c.init_from = ""
    c.model.image_from = "runs/quickstart/hf"
    c.model.language_from = "runs/stories"
    c.frozen = ("vision_model/.*", "language_model/.*")
    c.total.steps = 300
    c.data.train = "scenes:train:single"
    c.data.conversation.template = "plain"
    return c
