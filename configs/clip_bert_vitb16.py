"""Two towers, ViT-B/16 and BERT-base, trained with InfoNCE: the plain dual encoder of vision-language surveys."""

from vlmjax import config


def get_config(arg=""):
    """Exports as `VisionTextDualEncoderModel`; `:tiny` for a laptop."""
    c = config.recipe()
    c.batch_size = 32_768  # as CLIP, table 18 of arXiv 2103.00020
    c.total.epochs = 32.0  # as CLIP, table 18

    c.model.image.update(
        {
            "width": 768,  # ViT-B, table 1 of arXiv 2010.11929
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "image_size": 224,
            "patch_size": 16,
            "activation": "quick_gelu",  # the tower is CLIP's
        }
    )
    c.model.text.update(
        {
            "kind": "bert",
            "width": 768,  # BERT-base, section 3 of arXiv 1810.04805
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "vocab_size": 30_522,  # of bert-base-uncased
            "max_length": 77,  # tokens per caption, as CLIP
            "activation": "gelu",
            "dropout": 0.1,  # appendix A.2 of arXiv 1810.04805
        }
    )
    c.model.projection_dim = 512  # as CLIP ViT-B, table 20
    c.model.remat = "dots"

    c.data.train = "/data/cc12m-{00000..01242}.tar"
    c.data.tokenizer = "google-bert/bert-base-uncased"
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 5e-4  # as CLIP ViT-B, table 20
    c.optimizer.b2 = 0.98  # as CLIP, table 18
    c.optimizer.eps = 1e-6  # as CLIP, table 18
    c.optimizer.weight_decay = 0.2  # as CLIP, table 18
    c.optimizer.warmup.steps = 2000  # as CLIP, table 18

    c.checkpoint.every.steps = 1000
    c.eval_every.steps = 5000
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")
    c.evals.retrieval = config.evaluation("retrieval")
    return config.choose(c, arg)
