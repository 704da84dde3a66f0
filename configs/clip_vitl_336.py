"""CLIP ViT-L/14 at 336 px: one more epoch of the 224-px model at higher resolution (arXiv 2103.00020, section 2.5)."""

from vlmjax import config


def get_config(arg=""):
    """Continues `configs/clip_vitl.py`; start it with --config.init_from=FOLDER of that run's export."""
    c = config.recipe()
    c.batch_size = 32_768  # table 18
    c.total.epochs = 1.0  # section 2.5: "one additional epoch"
    c.init_from = "openai/clip-vit-large-patch14"  # positions are resized from 224 px

    c.model.image.update(
        {
            "width": 1024,  # table 20
            "depth": 24,  # table 20
            "heads": 16,  # table 20
            "mlp_dim": 4096,  # 4 x width
            "image_size": 336,  # section 2.5
            "patch_size": 14,
        }
    )
    c.model.text.update(
        {"width": 768, "depth": 12, "heads": 12, "mlp_dim": 3072, "vocab_size": 49_408}
    )  # table 20
    c.model.projection_dim = 768  # table 20
    c.model.remat = "full"

    c.data.train = "/data/cc12m-{00000..01242}.tar"
    c.data.tokenizer = "openai/clip-vit-large-patch14"
    # section 2.4: a random square crop alone; the paper does not give its size, 0.9 is open_clip's
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 2e-5  # table 20
    c.optimizer.b2 = 0.98  # table 18
    c.optimizer.eps = 1e-6  # table 18
    c.optimizer.weight_decay = 0.2  # table 18
    c.optimizer.warmup.steps = 200  # our choice: the paper gives none for this epoch

    c.checkpoint.every.steps = 500
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")
    c.evals.retrieval = config.evaluation("retrieval")
    return config.choose(c, arg)
