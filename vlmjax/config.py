"""The schema of a recipe: every key with its default and meaning, and the checks that run before jax starts.

A recipe file defines `get_config(arg)`, calls `recipe()` and sets what differs from the defaults. `validate` then
compares it with the schema: unknown keys (with the nearest valid name), wrong types, impossible combinations.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from vlmjax.config_checks import UNITS, check_values, nearest
from vlmjax.errors import RecipeError

Config = ml_collections.ConfigDict

# Regex on parameter paths -> mesh axes per dimension, first match wins (stacked layers lead with a depth axis).
# Column-parallel into attention and MLP, row-parallel out of them; the other matmul dimension is sharded by fsdp.
TOWER_SHARDING = (
    (r".*/(q_proj|k_proj|v_proj|query|key|value|fc1|intermediate/dense)/kernel", (None, "fsdp", "tensor")),
    (r".*/(q_proj|k_proj|v_proj|query|key|value|fc1|intermediate/dense)/bias", (None, "tensor")),
    (r".*/(out_proj|fc2|output/dense)/kernel", (None, "tensor", "fsdp")),
    (r".*/(token_embedding|word_embeddings|patch_embedding/kernel)", (None, "fsdp")),
    (r".*(_projection|pooler/dense)/kernel", ("fsdp", None)),
    (r".*", ()),
)

# BLIP's towers and a classifier's likewise; their heads are small, and copied.
BLIP_SHARDING = (*TOWER_SHARDING[:-2], (r".*", ()))

# The same for language models. A head is laid out as the embedding; both are cut along the vocabulary as well. Biases,
# which Llama has none of, are copied.
DECODER_SHARDING = (
    (r".*/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1)/kernel", (None, "fsdp", "tensor")),
    (r".*/(o_proj|down_proj|fc2)/kernel", (None, "tensor", "fsdp")),
    (r"(.*/)?(token_embedding|lm_head)", ("tensor", "fsdp")),
    (r".*", ()),
)

# A tower, a bridge and a language model: each by its own rules.
VLM_SHARDING = (
    *((f"vision_model/{rule}", places) for rule, places in TOWER_SHARDING[:-2]),
    *((f"language_model/{rule}", places) for rule, places in DECODER_SHARDING[:-1]),
    (r"bridge/linear_\d+/kernel", (None, "fsdp")),
    (r".*", ()),
)

# What has no weight decay: CLIP paper section 2.5, "all weights that are not gains or biases" have it; nor have
# low-rank adapters.
NO_DECAY = r".*(/bias|/scale|class_embedding|logit_scale|logit_bias)|lora/.*"


def duration(
    steps: int | None = None, examples: int | None = None, epochs: float | int | None = None
) -> Config:
    """A length of training, given exactly once: as optimizer steps, as examples, or as passes over the data."""
    return Config(
        {
            "steps": config_dict.placeholder(int) if steps is None else steps,
            "examples": config_dict.placeholder(int) if examples is None else examples,
            "epochs": config_dict.placeholder(float) if epochs is None else float(epochs),
        }
    )


def evaluation(benchmark: str, data: str = "", **options) -> Config:
    """One entry of `evals`: a benchmark (`zeroshot`, `retrieval`, `vqa`) on a data source, scored at `eval_every`.

    Without `data` the entry is off until the command line names some: --config.evals.NAME.data=SHARDS.
    """
    entry = _evaluation_schema()
    for name, value in {"benchmark": benchmark, "data": data, **options}.items():
        if name not in entry:
            raise RecipeError(f"evaluation({benchmark!r}): unknown option {name!r}{nearest(name, entry)}")
        entry[name] = value
    return entry


def augmentation(**settings) -> Config:
    """What training images go through: every setting of `vlmjax.data.augment.Augmentation`, changed by name.

    Raises:
      RecipeError: a name that is no setting (with the nearest that is), or a value out of range.
    """
    from vlmjax.data.augment import Augmentation

    return Config(dataclasses.asdict(Augmentation.from_recipe(settings)))


def _evaluation_schema() -> Config:
    return Config(
        {
            # zeroshot | retrieval, of dual encoders | probe, of image towers | classify, of classifiers | vqa, of
            # models that write | matching | caption | statements, of BLIP
            "benchmark": "",
            "data": "",  # a source as in data.train; empty: this entry is off
            "exclude": "",  # regex on record keys (re.search) to leave out
            "keep": "",  # regex on record keys (re.search) that are kept; empty keeps all
            "examples": 0,  # use the first this many records; 0 = all
            "classes": "",  # zeroshot, probe, classify: file of class names; empty: the distinct captions
            "templates": "",  # zeroshot: name of a built-in prompt set or a file, one template per line
            "canonical": False,  # lower-case texts without punctuation, as SigLIP expects
            "train": "",  # probe: the source that is fitted
            "train_examples": 0,  # probe: its first this many records; 0 = all
            "l2": 0.0,  # probe: strength, 1 / C of scikit-learn; 0 = the best on a fifth of the training records
            "batch_size": 0,  # global; 0 = the training batch, at most 256
            "blind": False,  # vqa: every image in the mean colour: what the questions alone give away
            "max_new_tokens": 16,  # vqa, caption: of what is written
            "min_new_tokens": 0,  # caption
            "num_beams": 1,  # caption: 1 is greedy; BLIP's papers have 3
            "prompt": "",  # caption: what every caption begins with
            "rerank": 0,  # retrieval, of BLIP: nearest candidates that image-text matching puts in order; 0 = none
            "answers": "",  # vqa, of BLIP: file of answers, of which the likeliest is taken; empty: it writes
            "top": 128,  # vqa, of BLIP: look only at so many of them, those that begin likeliest; 0 = all
        }
    )


def recipe() -> Config:
    """The schema: every key a recipe may set, with its default.

    Returns an unlocked ConfigDict, so that a recipe file can assign to it; `validate` finds misspelt keys.
    """
    c = Config()
    c.stage = "contrastive"  # what is learned: see vlmjax/stages
    c.seed = 0  # parameters, data order and augmentation are functions of (seed, step)
    c.batch_size = 256  # global, examples per optimizer step; divisible by data * fsdp * micro_batches
    c.micro_batches = 1  # forward passes per step; the result equals one large batch
    c.total = duration()  # length of the run
    # HF folder or hub id to start from; its tokenizer replaces "bpe:N", its config model.* but for image_size,
    # patch_dropout, max_length, dtype and remat
    c.init_from = ""
    c.frozen = ()  # regexes on parameter paths that are not trained, e.g. ("vision_model/.*",) for LiT
    c.log_every = 10  # steps between lines of metrics.jsonl
    c.eval_every = duration()  # nothing set: at the end only
    c.report_every = duration()  # report.html beside the run; nothing set: with every evaluation
    c.nonfinite_limit = 5  # as many updates in a row skipped for a NaN or infinity end the run (77)
    # A spike is so many steps in a row whose loss lies `threshold` robust deviations above the median of the last
    # `window`. It is told; with `rewind` the run goes back to the newest checkpoint so many steps before it, and goes
    # on with the data after it (PaLM, 2204.02311, section 5.1: some 100 steps before).
    c.spikes = Config(
        {"threshold": 10.0, "window": 100, "steps": 5, "rewind": 0}
    )  # threshold 0 = not looked for
    c.watchdog = (
        300.0  # seconds a step may take before the process exits (76), ten times that for the rest; 0 = off
    )
    c.compilation_cache = True  # keep compiled programs in workdir/compiled for the next start
    c.export = True  # write workdir/hf when the run ends

    c.model = Config()
    c.model.image = Config(
        {
            "width": 768,
            "depth": 12,
            "heads": 12,
            "mlp_dim": 3072,
            "image_size": 224,  # pixels, square
            "patch_size": 32,  # pixels
            "activation": "quick_gelu",  # quick_gelu | gelu (exact), as in the HF config
            "patch_dropout": 0.0,  # share of patches dropped in training (FLIP, arXiv 2212.00794)
        }
    )
    c.model.text = Config(
        {
            "kind": "clip",  # clip (causal, pooled at the end token) | bert (pooled at [CLS])
            "width": 512,
            "depth": 12,
            "heads": 8,
            "mlp_dim": 2048,
            "vocab_size": 0,  # 0 = that of the tokenizer
            "max_length": 77,  # tokens
            "activation": "quick_gelu",
            "dropout": 0.0,  # bert only
            "positions": 0,  # blip: rows of the position table, so that later texts may be longer; 0 = max_length
        }
    )
    c.model.projection_dim = 512
    # Stages of BLIP alone: a ViT's folder (model.image_from) and a BERT's to begin with, and stochastic depth.
    c.model.text_from = (
        ""  # HF folder or id of a BertModel, whose tokenizer is used; the sizes stay those above
    )
    # Stage "classification" alone: what the head reads (class | mean | projected: see models/classifier.py), and the
    # prompts whose embeddings by CLIP's text tower it begins as (a set, a file, or one with "{}"; empty: at random).
    c.model.pool = "class"
    c.model.head_from = ""
    c.model.drop_path = (
        0.0  # classification too: chance that a sub-layer of the image tower's last block is left out
    )
    # What follows is for stage "generative": a tower, a bridge and a language model (models/vlm.py).
    c.model.image_from = (
        ""  # HF folder or id whose image tower is taken, in place of model.image but its image_size
    )
    c.model.language_from = ""  # HF folder or id of the language model, in place of model.language
    c.model.bridge = Config({"kind": "mlp", "depth": 2, "activation": "gelu"})  # linear | mlp | identity
    c.model.feature_layers = (
        -2,
    )  # hidden states of the tower that the bridge reads; -2: after the last but one
    c.model.keep_class = False  # whether the class token is among the features
    c.model.language = Config(
        {
            "width": 512,
            "depth": 8,
            "heads": 8,
            "kv_heads": 8,  # heads of keys and values; divides heads
            "mlp_dim": 1376,
            "vocab_size": 0,  # 0 = that of the tokenizer
            "rope_theta": 10000.0,
            "tied": True,  # whether the head is the token embedding
        }
    )
    c.model.dtype = (
        "auto"  # compute dtype: auto (bfloat16 on accelerators, float32 on CPU) | bfloat16 | float32
    )
    c.model.attention = "auto"  # of a language model in training: auto (by device) | xla | cudnn | splash
    c.model.remat = "none"  # what the backward pass recomputes: none | dots | full

    # Generative: low-rank adapters beside kernels, which are frozen then (LoRA, arXiv 2106.09685): models/lora.py.
    # They are placed as their kernels, and merged into them where the model is exported.
    c.lora = Config(
        {
            "rank": 0,  # 0 = none
            "alpha": 16.0,  # the product of the two matrices counts alpha / rank times
            "targets": (),  # regexes on paths of kernels, such as "language_model/.*/(q_proj|v_proj)/kernel"
            "dropout": 0.0,  # share of what an adapter reads that is zero in training
        }
    )

    c.loss = Config()
    c.loss.kind = "softmax"  # softmax (CLIP) | sigmoid (SigLIP)
    c.loss.form = (
        "auto"  # gather | ring | hierarchical: same result, other memory; auto rings when it is large
    )
    c.loss.feature_dtype = (
        "auto"  # float32 | bfloat16: what is multiplied; auto: bfloat16 round a ring, else float32
    )
    c.loss.logit_scale = "capped"  # learned | capped (at most logit_scale_max) | fixed (as it starts)
    c.loss.logit_scale_init = 1 / 0.07  # CLIP paper section 2.5
    c.loss.logit_scale_max = 100.0  # CLIP paper section 2.5
    c.loss.logit_bias_init = -10.0  # sigmoid only; SigLIP paper section 3.2
    c.loss.label_smoothing = 0.0
    c.loss.positives = (
        "pairs"  # pairs (row i with row i) | captions, images (rows with equal ones are positives too)
    )
    c.loss.hard_negatives = 0.0  # negatives count in proportion to exp(this x logit); HN-NCE, 2301.02280
    c.loss.momentum = 0.0  # keys from a moving average of the towers, e.g. 0.999 (MoCo, 1911.05722); 0 = none
    c.loss.queue = 0  # keys kept from earlier batches, a multiple of batch_size; needs momentum
    c.loss.soft_targets = (
        0.0  # share of the average's own similarities in the targets (ALBEF); needs momentum
    )

    c.loss.soft_targets_ramp = 0  # steps over which that share grows from 0
    # BLIP (2201.12086, section 3.2): what its three losses count, and how two of them are made.
    c.loss.itc = c.loss.itm = c.loss.lm = 1.0
    c.loss.itm_negatives = (
        "local"  # local (drawn among the rows of the same device, as in the paper) | global
    )
    c.loss.itm_hardness = (
        1.0  # they are drawn in proportion to exp(this x logit); 1 as in the paper, 0 any alike
    )
    c.loss.lm_smoothing = 0.1  # label smoothing of the language loss
    c.loss.prompt_tokens = 0  # tokens at the beginning of every text that it does not learn

    c.loss.z_loss = (
        0.0  # generative: coefficient of log sum exp(scores) squared, e.g. 1e-4 (PaLM, 2204.02311)
    )

    c.data = Config()
    c.data.train = "scenes"  # shards, table, folder or "scenes"; comma-separated for several sources
    c.data.mix = "size"  # size | sqrt | equal: the share of each source, by its number of records or its root
    c.data.weights = ()  # a factor on the share of each source, in their order; explicit shares: mix = "equal"
    c.data.accept_new_mixture = False  # continue with other sources or shares, from the checkpoint's step on
    c.data.image_column = ""  # of tables, where it has an unusual name
    c.data.caption_columns = ()  # likewise; several are several captions
    c.data.exclude = ""  # regex on record keys (re.search) to leave out
    # Classification: a file, 'name' or 'label<TAB>name' a line; empty: the records' own captions or labels.
    c.data.classes = ""
    # Which of several: random | first | all | weights:3,1 | each: every caption is an example of its own
    c.data.captions = "random"
    c.data.templates = ()  # sentences around the caption, one drawn each time: "a photo of {caption}"
    c.data.clean = ""  # blip: captions in lower case without signs, of at most 30 words
    c.data.tokenizer = ""  # HF tokenizer folder or id; "bpe:N" trains one of N tokens on the captions
    c.data.background = (255, 255, 255)  # what shows through transparent pixels, RGB
    c.data.pad_to_square = (
        False  # before anything else, in the mean colour, so that no crop has to cut (LLaVA-1.5)
    )
    c.data.mean = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP preprocessing
    c.data.std = (0.26862954, 0.26130258, 0.27577711)
    c.data.augment = augmentation()  # see vlmjax/data/augment.py
    c.data.cache_decoded = 0  # pixels of the shorter side kept in memory; 0 = decode every time
    c.data.threads = 0  # decoding threads per host; 0 = number of CPU cores, at most 16
    c.data.processes = (
        0  # processes that share them; 0 = in the trainer's own, enough for some 8,000 images/s
    )
    c.data.max_bad_share = 0.01  # more corrupt records than this share stop the run
    # What follows is for stage "generative", whose rows hold conversations.
    c.data.conversation = Config(
        {
            "template": "v1",  # see vlmjax/data/conversation_templates.py; "tokenizer" for the tokenizer's own
            "image_first": False,  # each message's images before its text, as LLaVA trains; False keeps the order
            "system": "",  # in place of the template's system message; the conversation's own goes before both
        }
    )
    c.data.max_length = 2048  # tokens of a row, those of images included
    c.data.images_per_row = 1  # places for images; a conversation with more is cut before the first too many
    c.data.blind = False  # grey pictures: how much the words alone teach
    c.data.lengths = ()  # that rows are padded to, in batches of like length with images or without; () = max_length
    # What follows is for stage "blip_vqa": places for the different answers of a question, and tokens of each.
    c.data.answers = 10
    c.data.answer_length = 10
    c.data.packing = False  # several conversations in a row, none of which sees the others

    c.optimizer = Config()
    c.optimizer.name = "adamw"  # adamw | muon | lion | adafactor
    c.optimizer.learning_rate = 5e-4  # peak
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.98
    c.optimizer.eps = 1e-6
    c.optimizer.weight_decay = 0.2  # decoupled; multiplied by the learning rate
    c.optimizer.clip_norm = 0.0  # global gradient norm; 0 = no clipping
    c.optimizer.schedule = "cosine"  # cosine | linear | rsqrt | constant
    c.optimizer.warmup = duration()  # linear, from 0
    c.optimizer.cooldown = duration()  # linear, to 0 (rsqrt and constant)
    c.optimizer.layer_decay = (
        1.0  # classification: the rate of each block of the tower, by that of the one above it
    )
    c.optimizer.learning_rate_multipliers = ()  # ((regex, factor), ...), first match wins, others 1
    c.optimizer.weight_decay_multipliers = ((NO_DECAY, 0.0),)

    c.ema = Config({"decay": 0.0})  # moving average of the parameters, evaluated and exported; 0 = none

    c.evals = Config()  # name -> evaluation(...)

    c.checkpoint = Config()
    c.checkpoint.every = duration()  # nothing set: at the end only
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_best = 1  # needs best_metric
    c.checkpoint.best_metric = ""  # e.g. "eval/heldout/top1"; higher is better

    c.mesh = Config({"data": -1, "fsdp": 1, "tensor": 1})  # devices per axis; data -1 takes the rest
    c.sharding = TOWER_SHARDING  # ((regex, mesh axis or None per dimension), ...), first match wins
    return c


def completed(saved: Mapping[str, Any]) -> Config:
    """The recipe that a run wrote down, perhaps of an earlier vlmjax: keys that came since have their defaults."""
    return Config(_with_defaults(saved, recipe().to_dict()))


def _with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    out = {**defaults, **values}
    for name, value in values.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(name), Mapping):
            out[name] = _with_defaults(value, defaults[name])
    return out


def beside(file: str, name: str) -> Config:
    """The full recipe of another file of the same folder, for one that differs from it in a few lines.

    Args:
      file: `__file__` of the recipe that differs.
      name: such as "llava15_7b_stage1.py".
    """
    path = Path(file).with_name(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None:
        raise RecipeError(f"{file} is a change of {path}, which is not there: copy both")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def tiny(c: Config) -> Config:
    """The same recipe at a size that trains on a laptop's CPU in minutes, on the built-in scenes."""
    from vlmjax import config_tiny

    return config_tiny.tiny(c)


def choose(c: Config, arg: str, **forms) -> Config:
    """The form of a recipe that `configs/x.py:arg` names: itself for an empty arg, `tiny`, or one of `forms`.

    Args:
      c: the full recipe.
      arg: what stands behind the colon on the command line.
      forms: other names and functions from a recipe to a recipe.
    """
    forms = {"tiny": tiny, **forms}
    if not arg:
        return c
    if arg not in forms:
        raise RecipeError(f"this recipe has no form {arg!r}{nearest(arg, forms)}")
    return forms[arg](c)


def check_overrides(arguments: Iterable[str]) -> None:
    """Raise RecipeError for a `--config.a.b=...` whose path is not in the schema, before absl parses it."""
    schema = recipe()
    for argument in arguments:
        match = re.match(r"--?config\.([^=]+)", argument)
        if match:
            parts = match[1].split(".")
            if parts[0] != "evals":
                _check_path(parts, schema, argument)
            elif len(parts) > 2:
                _check_path(parts[2:], _evaluation_schema(), argument, f"config.evals.{parts[1]}")


def _check_path(parts: list[str], schema: Config | Mapping, shown: str, seen: str = "config") -> None:
    node = schema
    for part in parts:
        if not isinstance(node, (Config, Mapping)):
            raise RecipeError(f"{shown}: {seen} is a value and has no key {part!r}")
        if part not in node:
            raise RecipeError(f"{shown}: {seen} has no key {part!r}{nearest(part, node)}")
        node, seen = node[part], f"{seen}.{part}"


def validate(config: Any, overrides: Iterable[str] = ()) -> Config:
    """Check a recipe against the schema and return a locked copy.

    Args:
      config: what a recipe file returned, with command-line values applied.
      overrides: dotted paths given on the command line. A duration given there replaces the recipe's own unit.

    Raises:
      RecipeError: naming the key, its value, what was expected and the nearest valid name.
    """
    if not isinstance(config, Config):
        raise RecipeError(f"get_config returned {type(config).__name__}, expected vlmjax.config.recipe()")
    config = Config(config.to_dict())  # a deep copy without locks
    for path in overrides:
        _replace_duration(config, path.split("."))
    _check_keys(config, recipe(), "config")
    check_values(config)
    return config.lock()


def _replace_duration(config: Config, parts: list[str]) -> None:
    if parts[-1] in UNITS and len(parts) > 1:
        node = config
        for part in parts[:-1]:
            node = node[part]
        for unit in UNITS:
            if unit != parts[-1]:
                node[unit] = None


def _check_keys(config: Config | Mapping, schema: Config | Mapping, where: str) -> None:
    if where == "config.data.augment":
        return  # the data room checks these, and some may be left to their defaults: see config_checks
    for key in config:
        if where == "config.evals":
            if not isinstance(config[key], Config):
                raise RecipeError(
                    f"config.evals.{key}={config[key]!r}: expected evaluation(...), see vlmjax.config"
                )
            _check_keys(config[key], _evaluation_schema(), f"config.evals.{key}")
            continue
        if key not in schema:
            raise RecipeError(f"{where} has no key {key!r}{nearest(key, schema)}")
        value, default = config[key], schema[key]
        if isinstance(default, Config) != isinstance(value, Config):
            expected = "a group of keys" if isinstance(default, Config) else "a value"
            found = "a group" if isinstance(value, Config) else repr(value)
            raise RecipeError(f"{where}.{key}: expected {expected}, found {found}")
        if isinstance(default, Config):
            _check_keys(value, default, f"{where}.{key}")
        else:
            _check_type(value, default, schema.get_type(key), f"{where}.{key}")
    for key in schema:
        if key not in config:
            raise RecipeError(f"{where} lacks {key!r}: start the recipe from vlmjax.config.recipe()")


def _check_type(value, default, expected: type, where: str) -> None:
    if value is None and default is None:
        return
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return
    if expected is tuple and isinstance(value, (list, tuple)):
        return
    if where == "config.data.train" and isinstance(value, (list, tuple)):
        return
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise RecipeError(f"{where}={value!r}: expected {expected.__name__}, found {type(value).__name__}")


def steps_of(value: Config | Mapping, batch_size: int, examples: int) -> int | None:
    """Translate a duration into optimizer steps, rounded to the nearest step and at least 1; None if not given.

    Args:
      value: a `duration`.
      batch_size: examples per step, global.
      examples: records in one epoch.
    """
    if value["steps"] is not None:
        return value["steps"]
    if value["examples"] is not None:
        return _round_steps(value["examples"] / batch_size)
    if value["epochs"] is None:
        return None
    return _round_steps(value["epochs"] * examples / batch_size)


def _round_steps(steps: float) -> int:
    return max(1, round(steps)) if steps > 0 else 0
