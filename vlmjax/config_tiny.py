"""Recipes at a size that trains on a laptop's CPU in minutes, on the built-in scenes: `configs/NAME.py:tiny`."""

from vlmjax.config import Config, duration, evaluation


def tiny(c: Config) -> Config:
    """The same recipe, small. Nothing is imported, and so nothing is frozen whose parameters would be random."""
    c.batch_size = 64
    c.micro_batches = min(c.micro_batches, 2)
    c.total = duration(steps=60)
    c.init_from = ""
    c.log_every = 5
    c.eval_every, c.report_every = duration(), duration()
    c.checkpoint.every = duration(steps=30)
    c.model.image.update(
        {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128, "image_size": 32, "patch_size": 8}
    )
    c.model.text.update(
        {"width": 64, "depth": 2, "heads": 2, "mlp_dim": 128, "vocab_size": 0, "max_length": 32}
    )
    c.model.projection_dim = 32
    c.loss.queue = min(c.loss.queue, 2 * c.batch_size)
    c.mesh.update({"data": -1, "fsdp": 1, "tensor": 1})
    c.data.train = "scenes"
    c.data.tokenizer = "bpe:640"
    c.data.max_length = min(c.data.max_length, 256)
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup = duration(steps=10)
    c.optimizer.cooldown = duration()
    given = c.evals
    c.evals = Config(
        {
            "zeroshot": evaluation("zeroshot", "scenes:heldout:class", examples=256),
            "retrieval": evaluation("retrieval", "scenes:heldout", examples=256),
        }
    )
    c.checkpoint.best_metric = ""
    forms = {"generative": _tiny_generative, "blip": lambda c: _tiny_blip(c, given)}
    forms |= {
        "blip_vqa": _tiny_blip_vqa,
        "blip_nlvr": _tiny_blip_nlvr,
        "classification": _tiny_classification,
    }
    return forms.get(c.stage, lambda c: c)(c)


def _tiny_classification(c: Config) -> Config:
    """The shape of one thing; the head begins at random, for there is no text tower to make it of."""
    c.data.classes = c.model.head_from = ""
    c.data.train = "scenes:train:single:shape"
    c.frozen = tuple(pattern for pattern in c.frozen if not pattern.startswith("vision"))
    c.evals = Config(
        {
            "val": evaluation("classify", "scenes:val:single:shape", examples=256),
            "new_colours": evaluation("classify", "scenes:heldout:single:shape", examples=256),
        }
    )
    return c


def _tiny_blip(c: Config, given: Config) -> Config:
    """Three losses on scenes of one thing, in a common space of their own; `given` are the recipe's evaluations."""
    c.batch_size = 32
    if c.loss.momentum:
        c.loss.queue, c.loss.soft_targets_ramp = 256, 20
    c.model.image_from = c.model.text_from = ""
    c.model.text.max_length, c.model.text.positions = 24, 0
    c.data.train = "scenes:train:single"
    if c.data.captions == "each":
        c.data.captions = "random"  # of a world without end
    heldout = "scenes:heldout:single:class"
    ranked = {"retrieval": evaluation("retrieval", "scenes:heldout:single", examples=128, rerank=16)}
    ranked = ranked if any(entry.rerank for entry in given.values()) else {}
    c.evals = Config(
        {
            "zeroshot": evaluation("zeroshot", heldout, examples=256),
            **ranked,
            "matching": evaluation("matching", heldout, examples=256),
            "caption": evaluation("caption", heldout, examples=128),
        }
    )
    return c


def _tiny_blip_vqa(c: Config) -> Config:
    """Questions about scenes, each with one answer."""
    c.batch_size = 32
    c.model.text.max_length, c.model.text.positions = 24, 0
    c.data.train, c.data.answers = "scenes:train:single:questions", 2
    c.evals = Config({"vqa": evaluation("vqa", "scenes:heldout:single:questions", examples=128)})
    return c


def _tiny_blip_nlvr(c: Config) -> Config:
    """Statements about two scenes."""
    c.batch_size = 32
    c.model.text.max_length, c.model.text.positions = 24, 0
    c.data.train = "scenes:train:single:statements"
    c.evals = Config({"nlvr": evaluation("statements", "scenes:heldout:single:statements", examples=256)})
    return c


def _tiny_generative(c: Config) -> Config:
    """Conversations about scenes, for a language model of 0.6 M parameters."""
    c.batch_size = 32
    c.model.image_from = c.model.language_from = ""
    c.model.language.update(
        {"width": 96, "depth": 3, "heads": 4, "kv_heads": 2, "mlp_dim": 256, "vocab_size": 0, "tied": True}
    )
    c.frozen = tuple(pattern for pattern in c.frozen if not pattern.startswith(("vision", "language")))
    if c.lora.rank > 4:
        c.lora.alpha, c.lora.rank = 4 * c.lora.alpha / c.lora.rank, 4
    c.data.max_length = 96
    if c.data.conversation.template == "plain":
        c.data.train = "scenes"
        captions = evaluation("vqa", "scenes:val:all", examples=128, max_new_tokens=24)
        c.evals = Config({"captions": captions})
        return c
    c.data.train = "scenes:train:questions"
    c.data.conversation.system = c.data.conversation.system or "Answer in a few words."
    c.data.max_length = 192  # four rounds
    c.data.lengths = (96, 192) if c.data.lengths else ()
    questions = {"benchmark": "vqa", "data": "scenes:heldout:questions", "examples": 128}
    c.evals = Config({"vqa": evaluation(**questions), "blind": evaluation(**questions, blind=True)})
    return c
