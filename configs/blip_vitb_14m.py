"""BLIP with ViT-B/16 on 14 million pairs (2201.12086, section 4.1 and table 1).

Numbers without another source are those of configs/pretrain.yaml and pretrain.py in salesforce/BLIP.
"""

from vlmjax.config import BLIP_SHARDING, Config, augmentation, choose, duration, recipe


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = recipe()
    c.stage = "blip"
    c.batch_size = 2880  # section 4.1; the yaml has 75 on each of 8 devices
    c.total = duration(epochs=20)

    c.model.image.update({"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "image_size": 224})
    c.model.image.update({"patch_size": 16, "activation": "gelu"})
    c.model.image_from = "facebook/deit-base-patch16-224"  # section 4.1: a ViT of ImageNet
    c.model.text.update({"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "activation": "gelu"})
    c.model.text.update({"dropout": 0.1, "vocab_size": 30524, "max_length": 30, "positions": 512})
    c.model.text_from = "google-bert/bert-base-uncased"
    c.model.projection_dim = 256

    c.sharding = BLIP_SHARDING

    c.loss.momentum = 0.995
    c.loss.queue = 57_600
    c.loss.soft_targets = 0.4
    c.loss.soft_targets_ramp = 9_722  # two epochs of 14 million pairs

    # COCO, Visual Genome, SBU, CC3M and CC12M (table 15)
    c.data.train = "shards/{coco,vg,sbu,cc3m,cc12m}-*.tar"
    c.data.tokenizer = "google-bert/bert-base-uncased"
    c.data.clean = "blip"
    c.data.augment = augmentation(crop_scale=(0.2, 1.0), flip=0.5, policy="blip(2, 5)")

    c.optimizer.learning_rate = 3e-4
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8  # AdamW of torch
    c.optimizer.weight_decay = 0.05
    c.optimizer.warmup = duration(steps=3_000)
    c.optimizer.schedule = "cosine"  # in the place of 0.9 (0.85 in the paper) to the power of the epoch
    c.checkpoint.every = duration(steps=2_000)
    return choose(c, arg)
