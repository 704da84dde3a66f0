"""BLIP with ViT-L/16 on 129 million pairs (2201.12086, section 4.1).

Numbers without another source are those of pretrain.py and models/vit.py in salesforce/BLIP.
"""

from vlmjax.config import Config, beside, choose


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_129m.py")
    c.batch_size = 2400  # section 4.1
    c.model.image.update({"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096})
    c.model.image_from = "google/vit-large-patch16-224-in21k"
    c.model.drop_path = 0.1
    c.model.remat = "full"
    c.loss.soft_targets_ramp = 107_500  # two epochs of 129 million pairs
    c.optimizer.learning_rate = 2e-4  # section 4.1
    return choose(c, arg)
