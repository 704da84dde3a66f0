"""LLaVA 7B, stage 2: the matrix and the language model learn from 158k conversations (2304.08485, section 4.2).

Goes on from stage 1; the tower stays as it is. Numbers without another source are those of section 5 ("Training
details") of the paper; scripts/finetune.sh in haotian-liu/LLaVA trains one epoch in batches of 128.
"""

from vlmjax.config import VLM_SHARDING, Config, augmentation, beside, choose, duration, recipe


def get_config(arg: str = "") -> Config:
    """The recipe; `:tiny` is the same at laptop size, on questions about scenes."""
    c = recipe()
    c.stage = "generative"
    c.model = beside(__file__, "llava_7b_stage1.py").model
    c.init_from = "runs/llava_7b_stage1/hf"  # what configs/llava_7b_stage1.py leaves
    c.frozen = ("vision_model/.*",)
    c.sharding = VLM_SHARDING
    c.mesh.fsdp = 8  # the paper's 8 devices share parameters and moments

    c.data.train = "llava_instruct_158k.json"  # the images of COCO's train2014 lie beside it
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # the square in the middle
    c.data.conversation.template = "v1"  # scripts/finetune.sh
    c.data.conversation.image_first = True  # llava/train/train.py, preprocess_multimodal
    c.data.max_length = 2048  # scripts/finetune.sh; 256 of them the picture
    c.batch_size = 32  # global
    c.total = duration(epochs=3)

    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = duration(steps=444)  # 0.03 of 14,786 steps
    c.optimizer.b1, c.optimizer.b2, c.optimizer.eps = 0.9, 0.999, 1e-8  # AdamW of transformers
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0  # transformers' default
    c.checkpoint.every = duration(steps=500)
    return choose(c, arg)
