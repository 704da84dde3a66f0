"""CLIP ViT-B/16 at 224 px (Radford et al. 2021, arXiv 2103.00020), from scratch on image-text shards."""

from vlmjax import config


def get_config(arg=""):
    """`configs/clip_vitb16.py`, or `configs/clip_vitb16.py:tiny` for a laptop."""
    c = config.recipe()
    c.batch_size = 32_768  # table 18
    c.total.epochs = 32.0  # table 18

    c.model.image.update(
        {
            "width": 768,  # table 20
            "depth": 12,  # table 20
            "heads": 12,  # table 20
            "mlp_dim": 3072,  # 4 x width
            "image_size": 224,  # table 20
            "patch_size": 16,
        }
    )
    c.model.text.update(
        {
            "width": 512,  # table 20
            "depth": 12,  # table 20
            "heads": 8,  # table 20
            "mlp_dim": 2048,  # 4 x width
            "vocab_size": 49_408,  # of the released tokenizer
            "max_length": 77,  # of the released weights
        }
    )
    c.model.projection_dim = 512  # table 20
    c.model.remat = "dots"

    c.data.train = "/data/cc12m-{00000..01242}.tar"
    c.data.tokenizer = "openai/clip-vit-base-patch16"
    # section 2.4: a random square crop alone; the paper does not give its size, 0.9 is open_clip's
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 5e-4  # table 20
    c.optimizer.b2 = 0.98  # table 18
    c.optimizer.eps = 1e-6  # table 18
    c.optimizer.weight_decay = 0.2  # table 18
    c.optimizer.warmup.steps = 2000  # table 18

    c.checkpoint.every.steps = 1000
    c.eval_every.steps = 5000
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")
    c.evals.retrieval = config.evaluation("retrieval")
    return config.choose(c, arg)
