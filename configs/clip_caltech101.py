"""A small CLIP on a few thousand photographs of about a hundred kinds of things, from scratch."""

from vlmjax import config


def get_config(arg=""):
    """Trains on `--config.data.train`; sizes and rates are our own, chosen by measurement for two CPU cores."""
    c = config.recipe()
    c.batch_size = 64
    c.total.steps = 2400
    c.log_every = 50

    c.model.image.update(
        {"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 48, "patch_size": 8}
    )
    # 48 px at half the cost of 64: more passes over a thousand pictures teach more than finer ones
    c.model.image.patch_dropout = 0.5  # halves the cost of a step (FLIP, arXiv 2212.00794) and overfits less
    c.model.text.update({"width": 128, "depth": 1, "heads": 4, "mlp_dim": 512, "max_length": 12})
    c.model.projection_dim = 128

    c.loss.positives = "captions"  # pictures of one kind share their caption
    c.data.train = "caltech101-train-{00000..00001}.tar.gz"
    c.data.tokenizer = "bpe:1024"
    c.data.cache_decoded = 96  # a photograph is decoded once and then cropped from memory
    # strong: a dozen pictures of each kind are soon known by heart
    c.data.augment = config.augmentation(
        crop_scale=(0.35, 1.0), flip=0.5, jitter=0.4, grayscale=0.1, rotate=10.0
    )

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 2e-3
    c.optimizer.b1 = 0.95
    c.optimizer.weight_decay = 0.2
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 60
    return config.choose(c, arg)
