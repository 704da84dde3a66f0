"""CLIP ViT-L/14 with 1,048,576 pairs in a batch: InfoNCE round a ring of chips, towers in micro-batches.

The similarities of such a batch would take 4 TiB; here each chip holds a tile of them at a time. What is not cited is
our choice: the CLIP paper stops at 32,768. `python -m vlmjax.plan` tells what it takes on which pod.
"""

from vlmjax import config


def get_config(arg=""):
    """`configs/clip_vitl_1m_batch.py`, or `:tiny` for a laptop (on simulated devices a ring as well)."""
    c = config.recipe()
    c.batch_size = 1_048_576
    c.micro_batches = 128  # 32 pairs a chip at a time on 256 chips
    c.total.epochs = 8.0  # over some 2 B pairs

    c.model.image.update(
        {
            "width": 1024,  # ViT-L/14: table 20 of the CLIP paper (2103.00020)
            "depth": 24,  # table 20
            "heads": 16,  # table 20
            "mlp_dim": 4096,  # 4 x width, as in ViT (2010.11929)
            "image_size": 224,  # table 20
            "patch_size": 14,  # ViT-L/14
        }
    )
    c.model.text.update(
        {
            "width": 768,  # table 20
            "depth": 12,  # table 20
            "heads": 12,  # table 20
            "mlp_dim": 3072,  # 4 x width
            "vocab_size": 49_408,  # of the released tokenizer
            "max_length": 77,  # of the released weights
        }
    )
    c.model.projection_dim = 768  # table 20
    c.model.remat = "full"

    c.loss.form = "ring"
    c.loss.feature_dtype = "bfloat16"  # on every backend
    c.loss.logit_scale_max = 100.0  # table 18

    c.data.train = "/data/laion-{00000..41455}.tar"  # img2dataset's layout: .jpg .txt .json
    c.data.tokenizer = "openai/clip-vit-large-patch14"
    # section 2.4: a random square crop alone; the paper does not give its size, 0.9 is open_clip's
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 1e-3  # ours: between 4e-4 at 32k (table 20) and 2.3e-3, its square-root rule
    c.optimizer.b1 = 0.9  # table 18
    c.optimizer.b2 = 0.95  # as SigLIP (2303.15343) for large batches
    c.optimizer.eps = 1e-6  # table 18
    c.optimizer.weight_decay = 0.2  # table 18
    c.optimizer.warmup.steps = 500

    c.mesh.update({"data": -1, "fsdp": 16, "tensor": 1})
    c.checkpoint.every.steps = 50
    c.eval_every.steps = 500
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")  # off until .data is given
    c.evals.retrieval = config.evaluation("retrieval")  # off until .data is given
    return config.choose(c, arg)
