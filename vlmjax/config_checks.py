"""The values of a recipe: what each may be, and what cannot be together. Keys and types are in vlmjax/config.py."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from vlmjax.errors import DataError, RecipeError

LOSS_FORMS = ("auto", "gather", "ring", "hierarchical")  # how pairs are computed: losses/choice.py
UNITS = ("steps", "examples", "epochs")  # in which a duration may be given
METRICS = {
    "zeroshot": ("top1", "top5"),
    "retrieval": tuple(f"{side}_r{k}" for side in ("text_to_image", "image_to_text") for k in (1, 5, 10)),
    "vqa": ("exact_match",),
    "probe": ("top1", "top5", "mean_per_class"),
    "classify": ("top1", "top5", "mean_per_class"),
    "matching": ("accuracy", "own", "other"),
    "statements": ("right",),
    "caption": ("exact", "bleu4", "rouge_l", "cider"),
}
EACH = "each"  # of data.captions: every caption is an example
BLIP_STAGES = ("blip", "blip_vqa", "blip_nlvr")  # pretraining, and what has a model of its own
BENCHMARKS_OF = {  # by stage
    "contrastive": ("zeroshot", "retrieval", "probe"),
    "generative": ("vqa",),
    "classification": ("classify", "probe"),
    "blip": ("zeroshot", "retrieval", "probe", "matching", "caption"),
    "blip_vqa": ("vqa",),
    "blip_nlvr": ("statements",),
}

EVAL_LEAST = {
    "examples": 0, "batch_size": 0, "max_new_tokens": 1, "min_new_tokens": 0, "num_beams": 1, "top": 0, "rerank": 0,
    "train_examples": 0, "l2": 0,
}  # fmt: skip
_MOST_PROCESSES = 256  # each takes seconds to start and its own memory


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest valid one, else all of them."""
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid here: {', '.join(sorted(valid))}"


def check_values(c: Any) -> None:
    """Raise RecipeError for the first value that cannot be, or cannot be together with another.

    Args:
      c: a recipe whose keys and types are those of the schema.
    """
    _one_of(c.stage, "config.stage", tuple(BENCHMARKS_OF))
    _one_of(c.model.text.kind, "config.model.text.kind", ("clip", "bert"))
    _one_of(c.model.dtype, "config.model.dtype", ("auto", "bfloat16", "float32"))
    _one_of(c.model.remat, "config.model.remat", ("none", "dots", "full"))
    _one_of(c.model.attention, "config.model.attention", ("auto", "xla", "cudnn", "splash"))
    _check_loss(c.loss)
    if c.stage == "blip" and (c.loss.kind != "softmax" or c.loss.hard_negatives):
        raise RecipeError(
            f"config.loss.kind={c.loss.kind!r}, hard_negatives={c.loss.hard_negatives}: stage 'blip' has the plain "
            "softmax; leave both as they are"
        )
    if c.stage in BLIP_STAGES[1:]:
        _check_fine_tuning(c)
    _check_lora(c)
    _check_classification(c)
    _one_of(c.optimizer.name, "config.optimizer.name", ("adamw", "muon", "lion", "adafactor"))
    _one_of(c.optimizer.schedule, "config.optimizer.schedule", ("cosine", "linear", "rsqrt", "constant"))
    for name in ("batch_size", "micro_batches", "log_every", "nonfinite_limit"):
        _at_least(c[name], 1, f"config.{name}")
    _at_least(c.seed, 0, "config.seed")
    if c.seed >= 2**63:
        raise RecipeError(f"config.seed={c.seed}: expected a number below 2**63")
    _at_least(c.watchdog, 0, "config.watchdog")
    for name, least in (("threshold", 0), ("window", 2), ("steps", 1), ("rewind", 0)):
        _at_least(c.spikes[name], least, f"config.spikes.{name}")
    if c.spikes.rewind and not c.spikes.threshold:
        raise RecipeError(
            f"config.spikes.rewind={c.spikes.rewind} needs spikes to be looked for: set config.spikes.threshold above 0"
        )
    for name in ("width", "depth", "heads", "mlp_dim"):
        for tower in ("image", "text"):
            _at_least(c.model[tower][name], 1, f"config.model.{tower}.{name}")
    for tower in ("image", "text"):
        width, heads = c.model[tower].width, c.model[tower].heads
        if width % heads:
            raise RecipeError(f"config.model.{tower}.width={width} is not a multiple of heads={heads}")
    image = c.model.image
    _at_least(image.patch_size, 1, "config.model.image.patch_size")
    if image.image_size < image.patch_size:
        raise RecipeError(
            f"config.model.image.image_size={image.image_size} is smaller than patch_size={image.patch_size}"
        )
    _in_range(image.patch_dropout, 0, 1, "config.model.image.patch_dropout")
    _in_range(c.ema.decay, 0, 1, "config.ema.decay")
    _in_range(c.data.max_bad_share, 0, 1, "config.data.max_bad_share", closed=True)
    for name in ("learning_rate", "eps"):
        _positive(c.optimizer[name], f"config.optimizer.{name}")
    for name in ("b1", "b2"):
        _in_range(c.optimizer[name], 0, 1, f"config.optimizer.{name}")
    for name in ("weight_decay", "clip_norm"):
        _at_least(c.optimizer[name], 0, f"config.optimizer.{name}")
    _at_least(c.checkpoint.keep_last, 1, "config.checkpoint.keep_last")
    _at_least(c.checkpoint.keep_best, 0, "config.checkpoint.keep_best")
    _check_durations(c)
    _check_mesh(c)
    _check_rules(c)
    _check_data(c)
    _check_conversations(c)
    _check_evals(c)


def _check_loss(loss: Any) -> None:
    """What each value may be, and what only one of the losses knows."""
    _one_of(loss.kind, "config.loss.kind", ("softmax", "sigmoid"))
    _one_of(loss.form, "config.loss.form", LOSS_FORMS)
    _one_of(loss.feature_dtype, "config.loss.feature_dtype", ("auto", "float32", "bfloat16"))
    _one_of(loss.logit_scale, "config.loss.logit_scale", ("learned", "capped", "fixed"))
    _one_of(loss.positives, "config.loss.positives", ("pairs", "captions", "images"))
    for name in ("logit_scale_init", "logit_scale_max"):
        _positive(loss[name], f"config.loss.{name}")
    if loss.logit_scale == "capped" and loss.logit_scale_init > loss.logit_scale_max:
        raise RecipeError(
            f"config.loss.logit_scale_init={loss.logit_scale_init} is above logit_scale_max={loss.logit_scale_max}"
        )
    for name in ("label_smoothing", "momentum"):
        _in_range(loss[name], 0, 1, f"config.loss.{name}")
    _in_range(loss.soft_targets, 0, 1, "config.loss.soft_targets", closed=True)
    for name in ("hard_negatives", "queue"):
        _at_least(loss[name], 0, f"config.loss.{name}")
    for name in ("hard_negatives", "logit_bias_init", "logit_scale_init"):
        if not math.isfinite(loss[name]):
            raise RecipeError(f"config.loss.{name}={loss[name]}: expected a finite number")
    for name in ("queue", "soft_targets"):
        if loss[name] and not loss.momentum:
            raise RecipeError(
                f"config.loss.{name}={loss[name]} needs a momentum encoder: set config.loss.momentum, such as 0.999"
            )
    _one_of(loss.itm_negatives, "config.loss.itm_negatives", ("local", "global"))
    _in_range(loss.lm_smoothing, 0, 1, "config.loss.lm_smoothing")
    for name in ("itc", "itm", "itm_hardness", "lm", "prompt_tokens", "soft_targets_ramp"):
        _at_least(loss[name], 0, f"config.loss.{name}")
    if loss.kind == "sigmoid":
        for name in ("label_smoothing", "hard_negatives", "momentum"):
            if loss[name]:
                raise RecipeError(
                    f"config.loss.{name}={loss[name]} belongs to the softmax; with kind='sigmoid' leave it at 0"
                )


def _check_fine_tuning(c: Any) -> None:
    """What a stage that begins with a pretrained BLIP cannot be given."""
    for key in ("image_from", "text_from"):
        if c.model[key]:
            raise RecipeError(
                f"config.model.{key}={c.model[key]!r}: stage {c.stage!r} begins with a whole BLIP; set config.init_from"
            )
    if c.data.cache_decoded:
        raise RecipeError(
            f"config.data.cache_decoded={c.data.cache_decoded} is for pairs; with stage={c.stage!r} leave it 0"
        )
    for name, least in (("answers", 1), ("answer_length", 3)):
        _at_least(c.data[name], least, f"config.data.{name}")


def _check_lora(c: Any) -> None:
    lora = c.lora
    _at_least(lora.rank, 0, "config.lora.rank")
    _positive(lora.alpha, "config.lora.alpha")
    _in_range(lora.dropout, 0, 1, "config.lora.dropout")
    if lora.rank and c.stage != "generative":
        raise RecipeError(
            f"config.lora.rank={lora.rank}: adapters are for stage='generative'; leave it at 0 with {c.stage!r}"
        )
    if lora.rank and not lora.targets:
        raise RecipeError(
            f"config.lora.rank={lora.rank} without config.lora.targets: name the kernels, such as "
            "('language_model/.*/(q_proj|v_proj)/kernel',)"
        )


def _check_classification(c: Any) -> None:
    """What only a classifier has, and what its head needs."""
    _one_of(c.model.pool, "config.model.pool", ("class", "mean", "projected"))
    if not 0 < c.optimizer.layer_decay <= 1:
        raise RecipeError(
            f"config.optimizer.layer_decay={c.optimizer.layer_decay}: expected a number from 0 to 1"
        )
    if c.stage != "classification":
        for key, value, without in (
            ("model.pool", c.model.pool, "class"),
            ("model.head_from", c.model.head_from, ""),
            ("data.classes", c.data.classes, ""),
            ("optimizer.layer_decay", c.optimizer.layer_decay, 1.0),
        ):
            if value != without:
                raise RecipeError(
                    f"config.{key}={value!r} is for stage='classification'; leave it {without!r}"
                )
    if c.model.head_from and not (c.init_from and c.model.pool == "projected"):
        raise RecipeError(
            f"config.model.head_from={c.model.head_from!r}: a head of prompts reads images where CLIP compares them "
            "with texts; set config.model.pool='projected' and config.init_from to a CLIPModel"
        )


def _check_mesh(c: Any) -> None:
    """What can be known without devices: sizes, and that the batch divides by those that are given."""
    for axis, size in c.mesh.items():
        if size < 1 and not (axis == "data" and size == -1):
            raise RecipeError(
                f"config.mesh.{axis}={size}: expected at least 1" + (", or -1" if axis == "data" else "")
            )
    shards = max(c.mesh.data, 1) * c.mesh.fsdp
    if c.batch_size % (shards * c.micro_batches):
        raise RecipeError(
            f"config.batch_size={c.batch_size} is not a multiple of {shards * c.micro_batches}: mesh.data * mesh.fsdp "
            f"hold {shards} part(s) of it, in config.micro_batches={c.micro_batches}"
        )


def _check_data(c: Any) -> None:
    from vlmjax.data.augment import Augmentation
    from vlmjax.data.captions import CaptionRule
    from vlmjax.data.mixture import MIXES

    if not c.data.train:
        raise RecipeError(
            "config.data.train is empty: give shards, e.g. --config.data.train='/data/cc12m-{00000..01242}.tar'"
        )
    if not (c.data.tokenizer or c.init_from or c.model.language_from or c.stage == "classification"):
        raise RecipeError("config.data.tokenizer is empty: give a tokenizer folder or hub id, or 'bpe:1024'")
    for name in ("background", "mean", "std"):
        value = c.data[name]
        if len(value) != 3 or not all(isinstance(number, (int, float)) for number in value):
            raise RecipeError(
                f"config.data.{name}={value!r}: expected three numbers, for red, green and blue"
            )
    if not all(0 <= number <= 255 and isinstance(number, int) for number in c.data.background):
        raise RecipeError(
            f"config.data.background={c.data.background!r}: expected whole numbers from 0 to 255"
        )
    if min(c.data.std) <= 0:
        raise RecipeError(f"config.data.std={c.data.std!r}: expected numbers above 0")
    _one_of(c.data.mix, "config.data.mix", MIXES)
    for weight in c.data.weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise RecipeError(f"config.data.weights={c.data.weights!r}: expected numbers, such as (0.7, 0.3)")
        _positive(weight, "config.data.weights")
    if c.data.processes > _MOST_PROCESSES:
        raise RecipeError(
            f"config.data.processes={c.data.processes}: expected at most {_MOST_PROCESSES}; a few per host are enough"
        )
    for name in ("threads", "processes", "cache_decoded"):
        _at_least(c.data[name], 0, f"config.data.{name}")
    try:
        CaptionRule.parse(
            "first" if c.data.captions == EACH else c.data.captions, c.data.templates, c.data.clean
        )
    except DataError as error:
        raise RecipeError(
            f"config.data.captions, config.data.templates or config.data.clean: {error}"
        ) from None
    try:
        Augmentation.from_recipe(c.data.augment.to_dict())
    except RecipeError as error:
        raise RecipeError(f"config.data.augment: {error}") from None


def _check_conversations(c: Any) -> None:
    from vlmjax.data.conversation_templates import OWN, TEMPLATES

    _one_of(c.data.conversation.template, "config.data.conversation.template", (*TEMPLATES, OWN))
    for name in ("max_length", "images_per_row"):
        _at_least(c.data[name], 1, f"config.data.{name}")
    for name in ("width", "depth", "heads", "kv_heads", "mlp_dim"):
        _at_least(c.model.language[name], 1, f"config.model.language.{name}")
    if c.data.lengths:
        _check_lengths(c)
    if c.stage != "generative":
        return
    if c.model.image.patch_dropout:
        raise RecipeError(
            f"config.model.image.patch_dropout={c.model.image.patch_dropout}: every patch has its place in a text; "
            "with stage='generative' leave it 0"
        )
    if c.data.cache_decoded:
        raise RecipeError(
            f"config.data.cache_decoded={c.data.cache_decoded} is for pairs; with stage='generative' leave it 0"
        )
    side = c.model.image.image_size // c.model.image.patch_size
    if side * side >= c.data.max_length:
        raise RecipeError(
            f"config.data.max_length={c.data.max_length} has no room for words beside an image of {side * side} tokens"
        )


def _check_lengths(c: Any) -> None:
    lengths = tuple(c.data.lengths)
    if c.stage != "generative" or c.data.packing:
        why = (
            "rows are packed (data.packing)" if c.data.packing else f"stage {c.stage!r} has no conversations"
        )
        raise RecipeError(f"config.data.lengths={lengths}: {why}; leave it empty")
    whole = all(isinstance(one, int) and one > 0 for one in lengths)
    if not whole or list(lengths) != sorted(set(lengths)) or lengths[-1] != c.data.max_length:
        raise RecipeError(
            f"config.data.lengths={lengths}: expected numbers of tokens that increase up to config.data.max_length, "
            f"which is {c.data.max_length}"
        )


def _check_evals(c: Any) -> None:
    """Benchmarks exist, and the metric that ranks checkpoints is one of theirs."""
    for name, entry in c.evals.items():
        _one_of(entry.benchmark, f"config.evals.{name}.benchmark", tuple(METRICS))
        if entry.benchmark not in BENCHMARKS_OF[c.stage]:
            raise RecipeError(
                f"config.evals.{name}.benchmark={entry.benchmark!r} is not for stage {c.stage!r}, which can be scored "
                f"by {', '.join(BENCHMARKS_OF[c.stage])}"
            )
        if entry.blind and entry.benchmark != "vqa":
            raise RecipeError(f"config.evals.{name}.blind=True is for 'vqa'; leave it out")
        if entry.rerank and (entry.benchmark != "retrieval" or c.stage != "blip"):
            raise RecipeError(
                f"config.evals.{name}.rerank={entry.rerank} is for 'retrieval' by BLIP; leave it 0"
            )
        if entry.answers and c.stage != "blip_vqa":
            raise RecipeError(
                f"config.evals.{name}.answers={entry.answers!r} is for stage 'blip_vqa'; leave it out"
            )
        if bool(entry.train) != (entry.benchmark == "probe"):
            what = (
                "needs the records to fit" if entry.benchmark == "probe" else "is for 'probe'; leave it out"
            )
            raise RecipeError(f"config.evals.{name}.train={entry.train!r} {what}")
        for key, least in EVAL_LEAST.items():
            _at_least(entry[key], least, f"config.evals.{name}.{key}")
        if entry.min_new_tokens > entry.max_new_tokens:
            raise RecipeError(
                f"config.evals.{name}.min_new_tokens={entry.min_new_tokens} is above max_new_tokens="
                f"{entry.max_new_tokens}"
            )
    best = c.checkpoint.best_metric
    known = [
        f"eval/{name}/{metric}"
        for name, entry in c.evals.items()
        if entry.data
        for metric in METRICS[entry.benchmark]
    ]
    if best and not known:
        raise RecipeError(f"config.checkpoint.best_metric={best!r} needs an entry with data in config.evals")
    if best and best not in known:
        raise RecipeError(f"config.checkpoint.best_metric={best!r} is never measured{nearest(best, known)}")


def _check_durations(c: Any) -> None:
    durations = {
        "total": c.total,
        "eval_every": c.eval_every,
        "report_every": c.report_every,
        "optimizer.warmup": c.optimizer.warmup,
        "optimizer.cooldown": c.optimizer.cooldown,
        "checkpoint.every": c.checkpoint.every,
    }
    for name, value in durations.items():
        given = {unit: value[unit] for unit in UNITS if value[unit] is not None}
        if len(given) > 1:
            raise RecipeError(
                f"config.{name} is given {len(given)} times ({given}): keep one of steps, examples, epochs"
            )
        if name == "total" and not given:
            raise RecipeError("config.total is not given: set one of config.total.steps, .examples, .epochs")
        for unit, number in given.items():
            may_be_none = name in ("optimizer.warmup", "optimizer.cooldown")
            if not (number > 0 or (number == 0 and may_be_none)) or not math.isfinite(number):
                raise RecipeError(f"config.{name}.{unit}={number}: expected a number above 0")


def _check_rules(c: Any) -> None:
    factors = ("learning_rate_multipliers", "weight_decay_multipliers")
    groups = {
        "sharding": [rule[0] for rule in _pairs(c.sharding, "sharding", "tuple of mesh axes", (list, tuple))],
        "frozen": list(c.frozen),
        "lora.targets": list(c.lora.targets),
        "data.exclude": [c.data.exclude],
        **{
            f"optimizer.{name}": [
                rule[0] for rule in _pairs(c.optimizer[name], f"optimizer.{name}", "factor", (int, float))
            ]
            for name in factors
        },
        **{
            f"evals.{name}.{key}": [entry[key]]
            for name, entry in c.evals.items()
            for key in ("keep", "exclude")
        },
    }
    for name, patterns in groups.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise RecipeError(
                    f"config.{name}: {pattern!r} is not a regular expression ({error})"
                ) from None


def _pairs(rules, name: str, meaning: str, kind: type | tuple[type, ...]) -> list:
    for rule in rules:
        if not isinstance(rule, (list, tuple)) or len(rule) != 2 or not isinstance(rule[1], kind):
            raise RecipeError(f"config.{name}: {rule!r} is not a pair (regular expression, {meaning})")
    return list(rules)


def _one_of(value, where: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise RecipeError(f"{where}={value!r}{nearest(str(value), valid)} (one of {', '.join(valid)})")


def _positive(value, where: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise RecipeError(f"{where}={value}: expected a number above 0")


def _at_least(value, least, where: str) -> None:
    if not value >= least:
        raise RecipeError(f"{where}={value}: expected at least {least}")


def _in_range(value, low, high, where: str, closed: bool = False) -> None:
    if not (low <= value < high or (closed and value == high)):
        raise RecipeError(f"{where}={value}: expected a number from {low} to {high}")
