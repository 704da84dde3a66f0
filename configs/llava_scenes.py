"""LLaVA in minutes on two CPU cores: a small language model learns to answer questions about drawn scenes.

    python -m vlmjax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m vlmjax.main --config=configs/llava_scenes.py:stage1 --workdir=runs/scenes1
    python -m vlmjax.main --config=configs/llava_scenes.py --workdir=runs/scenes2

The tower is the quickstart's CLIP and stays as it is. The language model is new, so that stage 1 teaches it to describe
pictures and stage 2 to answer. Sizes and rates are our own, chosen by measurement.

`:fine_tower`, `:fine_stage1` and `:fine` are the same with smaller patches and a CLIP that had to learn shapes: better
answers in three times the time (docs/language.md).
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, beside, choose, recipe


def get_config(arg: str = "") -> Config:
    """Stage 2; `:stage1` comes before it, `:tiny` is a smoke test of both parts."""
    c = recipe()
    c.stage = "generative"
    c.init_from = "runs/scenes1/hf"
    c.batch_size = 64  # rows, each of several conversations
    c.total.steps = 500
    c.log_every = 20
    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "patch_size": 16}
    )
    c.model.language.update({"width": 128, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_dim": 344})
    c.frozen = ("vision_model/.*",)
    c.sharding = VLM_SHARDING

    c.data.train = "scenes:train:single:questions"
    c.data.conversation.template = "mistral_instruct"  # the shortest
    c.data.max_length = 128
    c.data.images_per_row = 4
    c.data.packing = True
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # places are asked for

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.b1 = 0.95
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 50
    return choose(c, arg, stage1=stage1, fine_tower=fine_tower, fine_stage1=fine_stage1, fine=fine)


def stage1(c: Config) -> Config:
    """Captions, for the bridge and a language model that knows nothing yet."""
    c.init_from = ""
    c.model.image_from = "runs/quickstart/hf"
    c.total.steps = 400
    c.data.train = "scenes:train:single"
    c.data.tokenizer = "bpe:1024"
    c.data.conversation.template = "plain"
    return c


def fine_tower(c: Config) -> Config:
    """The quickstart with patches of 8 pixels; half of its captions name nothing but colour and shape."""
    c = beside(__file__, "quickstart.py")
    c.model.image.patch_size = 8
    c.data.train = "scenes:train:single:class,scenes:train:single"
    c.total.steps = 1000
    return c


def fine_stage1(c: Config) -> Config:
    """Stage 1 on that tower."""
    c = _fine(stage1(c))
    c.model.image_from = "runs/fine_tower/hf"
    c.total.steps = 300
    return c


def fine(c: Config) -> Config:
    """Stage 2 after it."""
    c = _fine(c)
    c.init_from = "runs/fine_stage1/hf"
    c.total.steps = 600
    return c


def _fine(c: Config) -> Config:
    c.model.image.patch_size = 8
    c.data.max_length = 384  # four pictures of 64 tokens and what is said about them
    c.batch_size = 32
    return c
