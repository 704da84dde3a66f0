"""BLIP with ViT-B/16 on 129 million pairs (2201.12086, section 4.1): as blip_vitb_14m.py, with LAION's 115 million."""

from vlmjax.config import Config, beside, choose


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_vitb_14m.py")
    c.data.train = "shards/{coco,vg,sbu,cc3m,cc12m,laion}-*.tar"
    c.loss.soft_targets_ramp = 89_583  # two epochs of 129 million pairs
    return choose(c, arg)
