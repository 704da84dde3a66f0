"""LLaVA-1.5 7B, stage 2: bridge and language model learn to follow instructions about pictures (2310.03744).

Goes on from stage 1 with 665k conversations (section 3.3 and table 7: LLaVA's own, questions of VQA sets, text in
pictures, regions, and ShareGPT's, which have no picture). The tower stays as it is. Numbers without another source are
those of scripts/v1_5/finetune.sh in haotian-liu/LLaVA.
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, beside, choose, duration, recipe


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on questions about scenes."""
    c = recipe()
    c.stage = "generative"
    c.model = beside(__file__, "llava15_7b_stage1.py").model
    c.init_from = "runs/llava15_7b_stage1/hf"  # what configs/llava15_7b_stage1.py leaves
    c.frozen = ("vision_model/.*",)
    c.sharding = VLM_SHARDING
    c.mesh.fsdp = 8  # the script spreads parameters and moments over its 8 devices too (ZeRO-3)

    c.data.train = "llava_v1_5_mix665k.json"  # the folders of images lie beside it
    c.data.pad_to_square = True  # image_aspect_ratio pad: no part of a picture is cut off
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    c.data.conversation.template = "v1"
    c.data.conversation.image_first = True  # llava/train/train.py, preprocess_multimodal
    c.data.max_length = 2048  # 576 of them the picture
    c.data.lengths = (704, 1024, 1536, 2048)  # group_by_modality_length; the steps between are our own
    c.batch_size = 128  # global; 8 devices x 16
    c.total = duration(epochs=1)

    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = duration(steps=156)  # 0.03 of 5,198 steps
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8  # AdamW of transformers
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # transformers' default
    c.checkpoint.every = duration(steps=500)
    return choose(c, arg)
