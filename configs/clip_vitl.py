"""CLIP ViT-L/14 at 224 px (Radford et al. 2021, arXiv 2103.00020), from scratch on image-text shards."""

from vlmjax import config


def get_config(arg=""):
    """`configs/clip_vitl.py`, or `configs/clip_vitl.py:tiny` for a laptop."""
    c = config.recipe()
    c.batch_size = 32_768  # table 18
    c.total.epochs = 32.0  # table 18; over 400 M pairs there

    c.model.image.update(
        {
            "width": 1024,  # table 20
            "depth": 24,  # table 20
            "heads": 16,  # table 20
            "mlp_dim": 4096,  # 4 x width, as in ViT (2010.11929)
            "image_size": 224,  # table 20
            "patch_size": 14,  # ViT-L/14
            "activation": "quick_gelu",  # of the released weights' config
        }
    )
    c.model.text.update(
        {
            "width": 768,  # table 20
            "depth": 12,  # table 20
            "heads": 12,  # table 20
            "mlp_dim": 3072,  # 4 x width
            "vocab_size": 49_408,  # of the released tokenizer: 49,152 (section 2.4) + 256
            "max_length": 77,  # of the released weights; the paper caps at 76 (section 2.4)
            "activation": "quick_gelu",
        }
    )
    c.model.projection_dim = 768  # table 20
    c.model.dtype = "auto"  # section 2.5: mixed precision
    c.model.remat = "full"  # section 2.5: gradient checkpointing

    c.loss.logit_scale = "capped"  # section 2.5: clipped to prevent scaling the logits by more than 100
    c.loss.logit_scale_init = 1 / 0.07  # section 2.5
    c.loss.logit_scale_max = 100.0  # table 18

    c.data.train = "/data/cc12m-{00000..01242}.tar"  # img2dataset's layout: .jpg .txt .json
    c.data.tokenizer = "openai/clip-vit-large-patch14"
    # section 2.4: a random square crop alone; the paper does not give its size, 0.9 is open_clip's
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.name = "adamw"  # section 2.5
    c.optimizer.learning_rate = 4e-4  # table 20
    c.optimizer.b1 = 0.9  # table 18
    c.optimizer.b2 = 0.98  # table 18, vision transformers
    c.optimizer.eps = 1e-6  # table 18, vision transformers
    c.optimizer.weight_decay = 0.2  # table 18
    c.optimizer.schedule = "cosine"  # section 2.5
    c.optimizer.warmup.steps = 2000  # table 18

    # fsdp=16 on a v5e-256: 0.33 GiB of state per chip for 4.8. More cuts kernels so finely (fsdp=256: 4 of 1,024
    # rows) that XLA sums whole kernels instead of gathering slices, twice the bytes.
    c.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    c.checkpoint.every.steps = 1000
    c.eval_every.steps = 5000
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")  # off until .data is given
    c.evals.retrieval = config.evaluation("retrieval")  # off until .data is given
    return config.choose(c, arg)
