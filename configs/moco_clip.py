"""CLIP ViT-B/16 whose negatives come from a queue: a momentum encoder's keys of the last batches (MoCo).

A few devices see as many negatives as a pod would; soft targets from the same encoder as in ALBEF.
"""

from vlmjax import config


def get_config(arg=""):
    """`configs/moco_clip.py`, or `configs/moco_clip.py:tiny` for a laptop."""
    c = config.recipe()
    c.batch_size = 512  # 2107.07651 (ALBEF), section 3.5
    c.total.epochs = 30.0  # 2107.07651, section 3.5

    c.model.image.update(
        {
            "width": 768,  # ViT-B/16, 2107.07651, section 3.1
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "image_size": 224,  # 256 there; a multiple of the patch here, so that CLIP's weights can be a start
            "patch_size": 16,
        }
    )
    c.model.text.update(
        {
            "width": 512,  # of CLIP ViT-B/16: 2103.00020, table 20
            "depth": 12,
            "heads": 8,
            "mlp_dim": 2048,
            "vocab_size": 49_408,
            "max_length": 77,
        }
    )
    c.model.projection_dim = 256  # 2107.07651, section 3.2
    c.model.remat = "dots"

    c.loss.momentum = 0.995  # 2107.07651, section 3.5; MoCo has 0.999 (1911.05722)
    c.loss.queue = 65_536  # 2107.07651, section 3.5, and 1911.05722
    c.loss.soft_targets = 0.4  # 2107.07651, section 3.5, where it grows from 0 during the first epoch
    c.loss.logit_scale_init = 1 / 0.07  # 2107.07651, section 3.2

    c.data.train = "/data/cc12m-{00000..01242}.tar"
    c.data.tokenizer = "openai/clip-vit-base-patch16"
    c.data.augment = config.augmentation(crop_scale=(0.5, 1.0))  # of ALBEF's released configuration

    c.optimizer.learning_rate = 1e-4  # 2107.07651, section 3.5
    c.optimizer.b2 = 0.999  # AdamW as there
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.02  # 2107.07651, section 3.5
    c.optimizer.warmup.steps = 1000  # 2107.07651, section 3.5

    c.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    c.checkpoint.every.steps = 2000
    c.eval_every.steps = 5000
    c.evals.retrieval = config.evaluation("retrieval")  # off until .data is given
    return config.choose(c, arg)
