"""A small CLIP on the built-in drawn scenes: minutes on two CPU cores, judged on combinations it has never seen."""

from vlmjax import config


def get_config(arg=""):
    """Sizes and rates are our own, chosen by measurement for two CPU cores; `:tiny` is a smoke test."""
    c = config.recipe()
    c.batch_size = 128
    c.total.steps = 280
    c.log_every = 10

    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64, "patch_size": 16}
    )
    c.model.text.update({"width": 128, "depth": 2, "heads": 4, "mlp_dim": 512, "max_length": 24})
    c.model.projection_dim = 128

    c.loss.positives = "captions"  # short captions fit several pictures of a batch
    c.data.train = "scenes:train:single,scenes:train:simple"
    c.data.tokenizer = "bpe:1024"
    # places are part of the captions
    c.data.augment = config.augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.name = "muon"  # finds more pictures than AdamW in as many steps
    c.optimizer.learning_rate = 2e-3
    c.optimizer.b1 = 0.95
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 50

    c.evals.zeroshot = config.evaluation("zeroshot", "scenes:heldout:single:class")
    c.evals.retrieval = config.evaluation("retrieval", "scenes:heldout", examples=256)
    return config.choose(c, arg)
