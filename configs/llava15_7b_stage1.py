"""LLaVA-1.5 7B, stage 1: an MLP learns to say in the language model's words what CLIP sees (2310.03744).

Tower and language model stay as they are; 558k pictures with captions of BLIP are described in one sentence each.
Numbers without another source are those of scripts/v1_5/pretrain.sh in haotian-liu/LLaVA.
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, choose, duration, recipe


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size."""
    c = recipe()
    c.stage = "generative"
    c.model.image_from = "openai/clip-vit-large-patch14-336"
    c.model.language_from = "lmsys/vicuna-7b-v1.5"
    # The sizes of both, which are planned with where the folders are not at hand.
    c.model.image.update({"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096})
    c.model.image.update({"image_size": 336, "patch_size": 14})
    c.model.language.update({"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008})
    c.model.language.update(
        {"vocab_size": 32064, "tied": False}
    )  # 32,000 of Llama 2, <image>, up to whole 64s
    c.model.bridge.update({"kind": "mlp", "depth": 2, "activation": "gelu"})  # section 3.3
    c.model.feature_layers = (-2,)  # 2304.08485, section 4.1: the grid before the last layer
    c.model.remat = "full"
    c.frozen = ("vision_model/.*", "language_model/.*")
    c.sharding = VLM_SHARDING

    c.data.train = "blip_laion_cc_sbu_558k.json"  # the images lie beside it
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # the square in the middle
    c.data.conversation.template = "plain"  # the picture, then its caption
    c.data.max_length = (
        768  # 576 of them the picture; longer captions are cut (LLaVA pads to the longest, up to 2048)
    )
    c.batch_size = 256  # global
    c.total = duration(epochs=1)

    c.optimizer.learning_rate = 1e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = duration(steps=66)  # 0.03 of 2,181 steps
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8  # AdamW of transformers
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # transformers' default
    c.checkpoint.every = duration(steps=500)
    return choose(c, arg)
