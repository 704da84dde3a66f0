"""BLIP judges statements about two images of NLVR2 (2201.12086, section 5.4).

data.train are records with two `images`, a `sentence` and a `label` that is true or false. No class of transformers
looks at two images, so the model stays a checkpoint, which `python -m vlmjax.evaluate --benchmark=statements` reads.
Numbers without another source are those of configs/nlvr.yaml in salesforce/BLIP.
"""

from vlmjax.config import Config, augmentation, beside, choose, duration


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_14m.py")
    c.stage = "blip_nlvr"
    c.init_from = "runs/blip_vitb_129m/hf"
    c.export = False
    c.model.image_from = c.model.text_from = c.data.tokenizer = ""
    c.loss.momentum = c.loss.soft_targets = 0.0
    c.loss.queue = c.loss.soft_targets_ramp = 0
    c.data.train = "nlvr2/train.jsonl"
    # Of two pictures left and right count: neither is flipped.
    c.data.augment = augmentation(crop_scale=(0.5, 1.0), policy="blip(2, 5)")
    c.model.image.image_size = 384
    c.model.text.max_length = 50  # of texts of at most 30 words
    c.batch_size = 256
    c.total = duration(epochs=15)
    c.optimizer.learning_rate = 3e-5
    c.optimizer.warmup = duration()
    return choose(c, arg)
