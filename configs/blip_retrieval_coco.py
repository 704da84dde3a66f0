"""BLIP finds images by text and texts by image on COCO (2201.12086, section 5.1): the filter of CapFilt, scored.

On Karpathy's test split by `python -m vlmjax.evaluate --benchmark=retrieval --rerank=256`. For Flickr30k
rerank=128, and config.loss.itm_negatives='local' (configs/retrieval_flickr.yaml in salesforce/BLIP).
"""

from vlmjax.config import Config, beside, choose, evaluation


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on scenes."""
    c = beside(__file__, "blip_capfilt_filter.py")
    # k_test; its data: the test split
    c.evals.coco = evaluation("retrieval", "", rerank=256)
    return choose(c, arg)
