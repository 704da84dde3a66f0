"""CLIP ViT-L/14 fine-tuned end to end on ImageNet, from its zero-shot classifier (WiSE-FT, arXiv 2109.01903).

python -m vlmjax.main --config=configs/clip_vitl_finetune.py --workdir=runs/finetune
python -m vlmjax.wiseft --workdir=runs/finetune --alphas=0,0.25,0.5,0.75,1
"""

from vlmjax import config


def get_config(arg=""):
    """Numbers are WiSE-FT's: "paper" its section on experiments, "code" github.com/mlfoundations/wise-ft."""
    c = config.recipe()
    c.stage = "classification"
    c.init_from = "openai/clip-vit-large-patch14"
    c.batch_size = 512  # code: README
    c.total.epochs = 10.0  # code: README

    c.model.image.update(
        {
            "width": 1024,  # of the folder, like all sizes: here for planning without it
            "depth": 24,
            "heads": 16,
            "mlp_dim": 4096,
            "image_size": 224,
            "patch_size": 14,
        }
    )
    c.model.projection_dim = 768
    c.model.pool = "projected"  # code: the head reads the normalised embedding
    c.model.head_from = "photo"  # ours, of seven prompts; the paper has CLIP's 80
    c.model.remat = "full"
    c.sharding = config.BLIP_SHARDING

    # "label<TAB>name" a line: the .cls of the shards and CLIP's names of the 1,000 classes
    c.data.classes = "imagenet_classes.txt"
    c.data.train = "/data/imagenet-train-{00000..00146}.tar"
    c.data.augment = config.augmentation(crop_scale=(0.9, 1.0))  # code: CLIP's own preprocessing

    c.optimizer.learning_rate = 3e-5  # code: README
    c.optimizer.b2 = 0.999  # code: AdamW as torch has it
    c.optimizer.eps = 1e-8  # the same
    c.optimizer.weight_decay = 0.1  # paper
    c.optimizer.weight_decay_multipliers = ()  # code: of everything
    c.optimizer.clip_norm = 1.0  # code: finetune.py
    c.optimizer.warmup.steps = 500  # paper

    c.checkpoint.every.epochs = 1.0
    c.evals.imagenet = config.evaluation("classify")  # with data: --config.evals.imagenet.data=SHARDS
    c.evals.imagenet_v2 = config.evaluation("classify")
    return config.choose(c, arg)
