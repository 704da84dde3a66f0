"""CLIP ViT-L/14 with 16,777,216 pairs in a batch, on small images, on one v5e pod.

The similarities would take 1 PiB. Images are 112 px and texts short, as CLIPA (2305.07017) trains large models for most
of their run, so that a chip holds its 65,536 of them; finish with configs/clip_vitl_336.py and
--config.model.text.max_length=32. What is not cited is our choice.
"""

from vlmjax import config


def get_config(arg=""):
    """`configs/clip_vitl_16m_batch.py`, or `:tiny` for a laptop (on simulated devices a ring as well)."""
    c = config.recipe()
    c.batch_size = 16_777_216
    c.micro_batches = 512  # gradient caching: 128 pairs a chip at a time on 256 chips
    c.total.epochs = 8.0  # over 2 B pairs

    c.model.image.update(
        {
            "width": 1024,  # ViT-L/14: table 20 of the CLIP paper (2103.00020)
            "depth": 24,  # table 20
            "heads": 16,  # table 20
            "mlp_dim": 4096,  # 4 x width, as in ViT (2010.11929)
            "image_size": 112,  # 64 patches; as CLIPA (2305.07017)
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
            "max_length": 32,  # short texts, as CLIPA
        }
    )
    c.model.projection_dim = 768  # table 20
    c.model.remat = "full"

    c.loss.form = "ring"
    c.loss.feature_dtype = "bfloat16"
    c.loss.logit_scale_max = 100.0  # table 18 of the CLIP paper

    c.data.train = "/data/laion-{00000..41455}.tar"  # img2dataset's layout: .jpg .txt .json
    c.data.tokenizer = "openai/clip-vit-large-patch14"
    # section 2.4: a random square crop alone; the paper does not give its size, 0.9 is open_clip's
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0), crop_ratio=(1.0, 1.0))

    c.optimizer.learning_rate = 1e-3
    c.optimizer.b1 = 0.9  # table 18
    c.optimizer.b2 = 0.95  # as SigLIP (2303.15343) for large batches
    c.optimizer.eps = 1e-6  # table 18
    c.optimizer.weight_decay = 0.2  # table 18
    c.optimizer.warmup.steps = 100

    c.mesh.update({"data": -1, "fsdp": 16, "tensor": 1})
    c.checkpoint.every.steps = 10
    c.eval_every.steps = 100
    c.evals.imagenet = config.evaluation("zeroshot", templates="photo")  # off until .data is given
    c.evals.retrieval = config.evaluation("retrieval")  # off until .data is given
    return config.choose(c, arg)
