"""CapFilt's captioner: a pretrained BLIP learns to caption COCO (2201.12086, section 3.3).

Its captions of web images are filtered by the model of blip_capfilt_filter.py; docs/blip.md has the whole loop. Numbers
without another source are those of configs/caption_coco.yaml in salesforce/BLIP.
"""

from vlmjax.config import Config, augmentation, beside, choose, duration


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_14m.py")
    c.init_from = "runs/blip_vitb_14m/hf"
    c.model.image_from = c.model.text_from = c.data.tokenizer = ""
    c.loss.itc = c.loss.itm = 0.0
    c.loss.momentum = c.loss.soft_targets = 0.0
    c.loss.queue = c.loss.soft_targets_ramp = 0
    c.loss.prompt_tokens = 4  # [DEC] a picture of
    c.data.train = "shards/coco-*.tar"
    c.data.captions = "each"
    c.data.templates = ("a picture of {caption}",)
    c.data.augment = augmentation(crop_scale=(0.5, 1.0), flip=0.5, policy="blip(2, 5)")
    c.model.image.image_size = 384
    c.model.text.max_length = 40
    c.batch_size = 256
    c.total = duration(epochs=5)
    c.optimizer.learning_rate = 1e-5
    c.optimizer.warmup = duration()
    return choose(c, arg)
