"""BLIP writes captions of COCO (2201.12086, section 5.2): the captioner of CapFilt, scored.

Scored on Karpathy's test split by `python -m vlmjax.evaluate --benchmark=caption --prompt="a picture of "`.
"""

from vlmjax.config import Config, beside, choose, evaluation


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_capfilt_captioner.py")
    c.evals.coco = evaluation(
        "caption", "", prompt="a picture of ", max_new_tokens=16
    )  # its data: the test split
    return choose(c, arg)
