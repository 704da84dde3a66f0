"""BLIP on drawn scenes in minutes on two CPU cores: what it contrasts, matches and writes, on unseen combinations."""

from vlmjax.config import BLIP_SHARDING, Config, augmentation, choose, evaluation, recipe


def get_config(arg: str = "") -> Config:
    """Sizes and rates are our own, chosen for two CPU cores; `:tiny` is a smoke test.

    `:web`, `:captioner` and `:filter` are CapFilt on pictures whose noise is known: benchmarks/capfilt_noise.py.
    """
    c = recipe()
    c.stage = "blip"
    c.batch_size = 64
    c.total.steps = 600
    c.log_every = 20

    c.model.image.update({"width": 128, "depth": 4, "heads": 4, "mlp_dim": 512, "image_size": 64})
    c.model.image.update({"patch_size": 8, "activation": "gelu"})
    c.model.text.update({"width": 128, "depth": 3, "heads": 4, "mlp_dim": 384, "max_length": 24})
    c.model.text.activation = "gelu"
    c.model.projection_dim = 64
    c.sharding = BLIP_SHARDING

    c.loss.momentum = 0.99
    c.loss.queue = 512
    c.loss.soft_targets = 0.4
    c.loss.soft_targets_ramp = 200
    c.loss.positives = "captions"  # short captions fit several pictures of a batch
    c.loss.itm, c.loss.itm_hardness = 2.0, 0.0  # among hard negatives matching is not learned: docs/blip.md

    # Half of the captions name colour and shape alone, which makes the three losses look at shapes.
    c.data.train = "scenes:train:single:class,scenes:train:single"
    c.data.tokenizer = "bpe:640"
    c.data.augment = augmentation(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))  # places are asked for

    c.optimizer.name = "muon"
    c.optimizer.learning_rate = 4e-3
    c.optimizer.b1 = 0.95
    c.optimizer.weight_decay = 0.05
    c.optimizer.clip_norm = 1.0
    c.optimizer.warmup.steps = 50

    classes = "scenes:heldout:single:class"
    c.evals.zeroshot = evaluation("zeroshot", classes, examples=512)
    c.evals.retrieval = evaluation("retrieval", "scenes:heldout:single", examples=256)
    c.evals.matching = evaluation("matching", classes, examples=512)
    c.evals.caption = evaluation("caption", "scenes:heldout:single:all", examples=256, max_new_tokens=22)
    return choose(c, arg, web=web, captioner=captioner, filter=match_filter)


def web(c: Config) -> Config:
    """Pretraining on small pictures with noisy captions; the command line names shards for data.train and evals."""
    c.total.steps = 300
    c.model.image.update({"depth": 3, "image_size": 32})
    c.model.text.update({"depth": 2, "max_length": 16})
    c.loss.momentum = c.loss.soft_targets = 0.0  # in so few steps an average comes too late
    c.loss.queue = c.loss.soft_targets_ramp = 0
    c.optimizer.warmup.steps = 30
    options = {"retrieval": {}, "zeroshot": {}, "matching": {}, "caption": {"max_new_tokens": 13}}
    c.evals = Config({name: evaluation(name, **more) for name, more in options.items()})
    return c


def captioner(c: Config) -> Config:
    """Writes captions, after a little right data: as blip_capfilt_captioner.py."""
    c = _copy(web(c), steps=160, rate=2e-3)
    c.loss.itc = c.loss.itm = 0.0
    c.loss.lm_smoothing = 0.0  # of 600 words, what it spreads would be drawn
    c.loss.prompt_tokens = 4  # [DEC] a picture of
    c.data.templates = ("a picture of {caption}",)
    c.evals = Config({"caption": evaluation("caption", prompt="a picture of ", max_new_tokens=10)})
    return c


def match_filter(c: Config) -> Config:
    """Says which captions match, after the same: as blip_capfilt_filter.py."""
    c = _copy(web(c), steps=120, rate=1e-3)
    c.loss.lm = 0.0
    del c.evals.caption
    return c


def _copy(c: Config, steps: int, rate: float) -> Config:
    """What begins with the model of pretraining."""
    c.init_from = "runs/blip_web/hf"
    c.data.tokenizer = ""
    c.total.steps = steps
    c.optimizer.learning_rate = rate
    c.optimizer.warmup.steps = 10
    return c
