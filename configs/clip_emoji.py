"""A small CLIP on a few thousand emoji drawings: names by what a thing looks like, in any artist's style."""

from vlmjax import config

STYLES = ("noto", "openmoji", "twemoji")


def get_config(arg=""):
    """Trains on every shard of `--config.data.train`; `:leave_out=noto` holds one style out for a test.

    The record keys are `style_name`. Sizes and rates are our own, chosen by measurement for two CPU cores.
    """
    c = config.recipe()
    c.batch_size = 64  # many small steps: three thousand drawings are learned in fifty passes
    c.total.steps = 2300
    c.log_every = 50

    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "patch_size": 16}
    )
    c.model.text.update({"width": 128, "depth": 1, "heads": 4, "mlp_dim": 512, "max_length": 12})
    c.model.projection_dim = 128

    c.loss.positives = "captions"  # a name appears once per style
    c.data.train = "emoji-{00000..00003}.tar.gz"
    c.data.tokenizer = "bpe:2048"
    c.data.cache_decoded = 72  # the drawings are 72 px and are seen dozens of times
    c.data.augment = config.augmentation(
        crop_scale=(0.6, 1.0),
        flip=0.3,
        rotate=10.0,
        zoom=(0.7, 1.0),
        jitter=0.2,  # colours mean much (flags, hearts): stronger changes learn slower and end lower
    )

    c.optimizer.name = "muon"  # learns twice as fast as AdamW here
    c.optimizer.learning_rate = 2e-3
    c.optimizer.b1 = 0.95
    c.optimizer.weight_decay = 0.2
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 60

    forms = {f"leave_out={style}": lambda c, style=style: leave_out(c, style) for style in STYLES}
    return config.choose(c, arg, **forms)


def leave_out(c, style):
    """Train without one style; `python -m vlmjax.evaluate --keep=^noto_` then asks for its drawings by name."""
    c.data.exclude = f"^{style}_"
    return c
