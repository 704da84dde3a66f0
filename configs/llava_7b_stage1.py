"""LLaVA 7B, stage 1: one matrix turns what CLIP sees into words of Vicuna (2304.08485, section 4.2).

Tower and language model stay as they are; 595k pictures of CC3M with their captions. Numbers without another source
are those of section 5 ("Training details") of the paper.
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, choose, duration, recipe


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size."""
    c = recipe()
    c.stage = "generative"
    c.model.image_from = "openai/clip-vit-large-patch14"  # section 4.1
    c.model.language_from = "lmsys/vicuna-7b-v1.3"  # scripts/pretrain.sh in haotian-liu/LLaVA, v1.0
    # The sizes of both, which are planned with where the folders are not at hand.
    c.model.image.update({"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 4096})
    c.model.image.update({"image_size": 224, "patch_size": 14})
    c.model.language.update({"width": 4096, "depth": 32, "heads": 32, "kv_heads": 32, "mlp_dim": 11008})
    c.model.language.update(
        {"vocab_size": 32064, "tied": False}
    )  # 32,000 of Llama 2, <image>, up to whole 64s
    c.model.bridge.update({"kind": "linear", "depth": 1})  # section 4.1, equation 1: the matrix W
    c.model.feature_layers = (-2,)  # section 4.1: the grid before the last layer
    c.model.remat = "full"
    c.frozen = ("vision_model/.*", "language_model/.*")
    c.sharding = VLM_SHARDING

    c.data.train = "cc3m_595k_images.json"  # LLaVA-CC3M-Pretrain-595K; the images lie beside it
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # the square in the middle
    c.data.conversation.template = "plain"  # scripts/pretrain.sh: the picture, then its caption
    c.data.max_length = 448  # 256 of them the picture; longer captions are cut
    c.batch_size = 128  # global
    c.total = duration(epochs=1)

    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = duration(steps=140)  # 0.03 of 4,651 steps
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8  # AdamW of transformers
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # transformers' default
    c.checkpoint.every = duration(steps=500)
    return choose(c, arg)
