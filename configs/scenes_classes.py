"""Fine-tuning in minutes on two CPU cores: colour and shape of one drawn thing, from the quickstart's CLIP.

    python -m vlmjax.main --config=configs/quickstart.py --workdir=runs/quickstart
    python -m vlmjax.main --config=configs/scenes_classes.py --workdir=runs/scenes_classes

`:head` trains the head alone, `:prompts` begins with one made of the classes' names (WiSE-FT), `:scratch` with nothing:
what each is worth is in docs/classification.md. Sizes and rates are our own, chosen by measurement.
"""

from vlmjax.config import BLIP_SHARDING, Config, augmentation, choose, evaluation, recipe


def get_config(arg: str = "") -> Config:
    """Everything is trained, with a new head; `:tiny` is a smoke test."""
    c = recipe()
    c.stage = "classification"
    c.init_from = "runs/quickstart/hf"
    c.batch_size = 64
    c.total.steps = 400
    c.log_every = 20
    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "patch_size": 16}
    )
    c.sharding = BLIP_SHARDING

    c.data.train = "scenes:train:single:class"  # its captions are the 108 classes
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 5e-4
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 40

    c.evals.val = evaluation("classify", "scenes:val:single:class")
    return choose(c, arg, head=head, prompts=prompts, scratch=scratch)


def head(c: Config) -> Config:
    """A linear probe by gradient descent."""
    c.frozen = ("vision_model/.*",)
    c.optimizer.learning_rate = 1e-2
    return c


def prompts(c: Config) -> Config:
    """At the first step the zero-shot classifier, of all 144 pairs, 36 of which training never shows."""
    c.model.pool, c.model.head_from = "projected", "plain"
    c.data.classes = "runs/pairs.txt"  # python -m vlmjax.data.scenes --classes=runs/pairs.txt
    c.evals.new_pairs = evaluation("classify", "scenes:heldout:single:class")
    return c


def scratch(c: Config) -> Config:
    """The same steps without what the quickstart has learned."""
    c.init_from = ""
    return c
