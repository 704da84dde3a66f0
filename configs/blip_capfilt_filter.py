"""CapFilt's filter: a pretrained BLIP learns which texts of COCO go with which image (2201.12086, section 3.3).

A copy of its own, since a model that both writes and judges finds fewer of its own mistakes (there, section 5.3).
Numbers without another source are those of configs/retrieval_coco.yaml in salesforce/BLIP.
"""

from vlmjax.config import Config, augmentation, beside, choose, duration


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_14m.py")
    c.init_from = "runs/blip_vitb_14m/hf"
    c.model.image_from = c.model.text_from = c.data.tokenizer = ""
    c.loss.lm = 0.0
    c.loss.itm_negatives = "global"  # negative_all_rank
    c.loss.soft_targets_ramp = 4_424  # two epochs of 566 thousand captions
    c.loss.positives = "images"  # idx of its data
    c.data.train = "shards/coco-*.tar"
    c.data.captions = "each"
    c.data.augment = augmentation(crop_scale=(0.5, 1.0), flip=0.5, policy="blip(2, 5)")
    c.model.image.image_size = 384
    c.model.text.max_length = 35
    c.batch_size = 256
    c.total = duration(epochs=6)
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = duration()
    return choose(c, arg)
