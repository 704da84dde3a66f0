"""BLIP answers questions of VQAv2 (2201.12086, section 5.3): question encoder, answer decoder, weighted answers.

data.train are records with a field `question`, and a field `answers` with all that annotators gave; Visual Genome's
have one, with `answer_weights` of 0.2. Scored by `python -m vlmjax.evaluate --benchmark=vqa`, of which --answers=FILE
ranks a list of answers in place of writing. Numbers without another source are those of configs/vqa.yaml and
train_vqa.py in salesforce/BLIP.
"""

from vlmjax.config import Config, augmentation, beside, choose, duration


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_14m.py")
    c.stage = "blip_vqa"
    c.init_from = "runs/blip_vitb_129m/hf"
    c.model.image_from = c.model.text_from = c.data.tokenizer = ""
    c.loss.momentum = c.loss.soft_targets = 0.0
    c.loss.queue = c.loss.soft_targets_ramp = 0
    c.data.train = "shards/{vqav2,vg_qa}-*.tar"
    c.data.augment = augmentation(crop_scale=(0.5, 1.0), flip=0.5, policy="blip(2, 5)")
    c.data.answers = 10  # as many annotators
    c.data.answer_length = 10
    c.model.image.image_size = 480
    c.model.text.max_length = 35
    c.model.drop_path = 0.1
    c.batch_size = 256
    c.total = duration(epochs=10)
    c.optimizer.learning_rate = 2e-5
    c.optimizer.warmup = duration()
    return choose(c, arg)
