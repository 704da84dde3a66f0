"""The schema of recipes: every mistake is one clear line, and the recipes in configs/ say what their papers say."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

from vlmjax import config
from vlmjax.data.augment import Augmentation
from vlmjax.errors import RecipeError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name: str, form: str = "") -> config.Config:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(form)


def valid(**changes) -> config.Config:
    """A complete recipe with some values changed; `__` stands for the dots of a path."""
    c = config.recipe()
    c.total.steps = 10
    c.data.tokenizer = "bpe:514"
    c.evals.cats = config.evaluation("zeroshot", "cats.tar")
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = c
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[last] = value
    return c


def refusal(c: config.Config, overrides=()) -> str:
    with pytest.raises(RecipeError) as caught:
        config.validate(c, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_valid_recipe_comes_back_as_a_locked_copy():
    c = valid()
    checked = config.validate(c)
    assert checked.to_dict() == c.to_dict() and checked is not c
    with pytest.raises((KeyError, AttributeError)):
        checked.new = 1
    c.optimizer.learning_rate = 7.0
    assert checked.optimizer.learning_rate == 5e-4


@pytest.mark.parametrize(
    ("path", "key", "meant"),
    [
        ("", "batchsize", "batch_size"),
        ("", "optimiser", "optimizer"),
        ("optimizer", "learning_rat", "learning_rate"),
        ("model.image", "patchsize", "patch_size"),
        ("loss", "label_smoothin", "label_smoothing"),
        ("evals.cats", "template", "templates"),
        ("data.augment", "crop_scales", "crop_scale"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_nearest(path, key, meant):
    c = valid()
    node = c
    for part in path.split(".") if path else ():
        node = node[part]
    node[key] = 1
    message = refusal(c)
    assert repr(key) in message and f"did you mean {meant!r}" in message
    assert not path or path.split(".")[0] in message


def test_a_key_like_no_other_lists_what_there_is():
    assert "'data', 'fsdp'" not in refusal(valid(mesh__zzz=1))
    assert "valid here: data, fsdp, tensor" in refusal(valid(mesh__zzz=1))


def test_a_missing_key_says_where_to_start():
    c = valid()
    del c.optimizer["b1"]
    assert "config.optimizer lacks 'b1'" in refusal(c)
    with pytest.raises(RecipeError, match=re.escape("expected vlmjax.config.recipe()")):
        config.validate({"batch_size": 1})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("batch_size", "64", "config.batch_size='64': expected int, found str"),
        ("batch_size", True, "expected int, found bool"),
        ("batch_size", 64.0, "expected int, found float"),
        ("total__steps", 10.5, "config.total.steps=10.5: expected int"),
        ("frozen", "vision_model/.*", "expected tuple, found str"),
        ("export", 1, "expected bool"),
        ("optimizer", 3, "config.optimizer: expected a group of keys, found 3"),
        ("seed", config.Config({"a": 1}), "config.seed: expected a value, found a group"),
        ("evals__cats", "cats.tar", "config.evals.cats='cats.tar': expected evaluation(...)"),
        ("data__mean", (0.5, 0.5), "config.data.mean=(0.5, 0.5): expected three numbers"),
        ("data__std", (0.5, 0.5, 0.0), "config.data.std"),
        ("data__background", (255, 255, 300), "whole numbers from 0 to 255"),
    ],
)
def test_values_of_the_wrong_type(path, value, said):
    assert said in refusal(valid(**{path: value}))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer__learning_rate", 1),
        ("optimizer__weight_decay", 0),
        ("data__train", ["a.tar", "b.tar"]),
        ("frozen", ["vision_model/.*"]),
        ("total__steps", 1),
    ],
)
def test_what_may_stand_for_another_type(path, value):
    config.validate(valid(**{path: value}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 0}, "config.batch_size=0: expected at least 1"),
        ({"nonfinite_limit": 0}, "config.nonfinite_limit=0: expected at least 1"),
        ({"watchdog": -1.0}, "config.watchdog=-1.0: expected at least 0"),
        ({"batch_size": 10, "micro_batches": 4}, "config.batch_size=10 is not a multiple of 4"),
        ({"batch_size": 24, "mesh__fsdp": 4, "micro_batches": 4}, "not a multiple of 16"),
        ({"batch_size": 12, "mesh__data": 8}, "not a multiple of 8"),
        ({"mesh__data": 0}, "config.mesh.data=0: expected at least 1, or -1"),
        ({"mesh__tensor": -1}, "config.mesh.tensor=-1: expected at least 1"),
        ({"model__image__width": 100, "model__image__heads": 3}, "not a multiple of heads=3"),
        ({"model__text__heads": 0}, "config.model.text.heads=0"),
        ({"model__image__image_size": 16, "model__image__patch_size": 32}, "smaller than patch_size=32"),
        ({"model__image__patch_dropout": 1.0}, "config.model.image.patch_dropout=1.0"),
        ({"loss__label_smoothing": -0.1}, "config.loss.label_smoothing=-0.1"),
        ({"loss__logit_scale_init": 0.0}, "config.loss.logit_scale_init=0.0: expected a number above 0"),
        ({"loss__logit_scale_init": 200.0}, "is above logit_scale_max=100.0"),
        ({"loss__logit_scale": "capt"}, "did you mean 'capped'"),
        ({"model__text__kind": "brt"}, "did you mean 'bert'"),
        ({"model__dtype": "float16"}, "one of auto, bfloat16, float32"),
        ({"stage": "contrastiv"}, "did you mean 'contrastive'"),
        ({"optimizer__name": "adam"}, "did you mean 'adamw'"),
        ({"optimizer__schedule": "cosinus"}, "did you mean 'cosine'"),
        ({"optimizer__learning_rate": float("nan")}, "config.optimizer.learning_rate=nan"),
        ({"optimizer__b2": 1.0}, "config.optimizer.b2=1.0"),
        ({"optimizer__clip_norm": -1.0}, "config.optimizer.clip_norm=-1.0"),
        ({"ema__decay": 1.0}, "config.ema.decay=1.0"),
        ({"data__max_bad_share": 1.5}, "config.data.max_bad_share=1.5"),
        ({"data__train": ""}, "config.data.train is empty"),
        ({"data__tokenizer": ""}, "config.data.tokenizer is empty"),
        ({"data__threads": -1}, "config.data.threads=-1"),
        ({"data__augment": config.Config({"crop_scale": 3})}, "config.data.augment: augmentation crop_scale"),
        ({"checkpoint__keep_last": 0}, "config.checkpoint.keep_last=0"),
        ({"evals__cats__benchmark": "zero-shot"}, "did you mean 'zeroshot'"),
        ({"evals__cats__examples": -1}, "config.evals.cats.examples=-1"),
        ({"checkpoint__best_metric": "eval/cats/top_5"}, "never measured; did you mean 'eval/cats/top5'"),
        ({"checkpoint__best_metric": "eval/cats/top1", "evals__cats__data": ""}, "needs an entry with data"),
    ],
)
def test_values_that_cannot_be_together(changes, said):
    assert said in refusal(valid(**changes))


def test_a_ranking_metric_that_is_measured_is_accepted():
    config.validate(valid(checkpoint__best_metric="eval/cats/top5"))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("frozen", ("vision_model/(.*",)),
        ("sharding", (("(", ()),)),
        ("optimizer__weight_decay_multipliers", (("[", 0.0),)),
        ("optimizer__learning_rate_multipliers", ((3, 0.0),)),
        ("data__exclude", "*x"),
        ("evals__cats__keep", "+"),
    ],
)
def test_bad_regular_expressions(path, value):
    message = refusal(valid(**{path: value}))
    assert "is not a regular expression" in message and f"config.{path.replace('__', '.')}" in message


@pytest.mark.parametrize(
    ("path", "value", "meaning"),
    [
        ("sharding", ((".*",),), "tuple of mesh axes"),
        ("sharding", ((".*", "fsdp"),), "tuple of mesh axes"),
        ("sharding", (".*",), "tuple of mesh axes"),
        ("optimizer__learning_rate_multipliers", ((".*", "0.1"),), "factor"),
    ],
)
def test_rules_that_are_no_pairs(path, value, meaning):
    assert f"is not a pair (regular expression, {meaning})" in refusal(valid(**{path: value}))


class TestDurations:
    """A length is given once; the command line replaces the recipe's unit."""

    def test_given_twice(self):
        message = refusal(valid(total=config.duration(steps=10, epochs=1.0)))
        assert "config.total is given 2 times ({'steps': 10, 'epochs': 1.0})" in message
        assert "config.checkpoint.every" in refusal(
            valid(checkpoint__every=config.duration(steps=1, examples=9))
        )

    def test_not_given(self):
        assert "config.total is not given" in refusal(valid(total=config.duration()))

    @pytest.mark.parametrize("value", [0, -5])
    def test_not_positive(self, value):
        assert f"config.total.steps={value}" in refusal(valid(total__steps=value))
        assert "config.eval_every.steps" in refusal(valid(eval_every__steps=value))

    def test_no_end(self):
        assert "config.total.epochs=inf" in refusal(valid(total=config.duration(epochs=float("inf"))))

    def test_no_warmup_is_allowed(self):
        config.validate(valid(optimizer__warmup=config.duration(steps=0)))

    def test_the_command_line_replaces_the_unit(self):
        c = valid()
        c.total.epochs = 3.0  # as absl sets --config.total.epochs=3
        c.optimizer.warmup = config.duration(examples=50)
        c.optimizer.warmup.steps = 4
        assert "given 2 times" in refusal(c)
        checked = config.validate(c, overrides=["total.epochs", "optimizer.warmup.steps", "batch_size"])
        assert checked.total.to_dict() == {"steps": None, "examples": None, "epochs": 3.0}
        assert checked.optimizer.warmup.to_dict() == {"steps": 4, "examples": None, "epochs": None}

    @pytest.mark.parametrize(
        ("given", "steps"),
        [
            ({"steps": 7}, 7),
            ({"examples": 320}, 10),
            ({"examples": 335}, 10),
            ({"examples": 337}, 11),
            ({"examples": 1}, 1),
            ({"epochs": 2}, 6),
            ({"epochs": 0.5}, 2),
            ({"epochs": 0.0}, 0),
            ({}, None),
        ],
    )
    def test_in_steps(self, given, steps):
        assert config.steps_of(config.duration(**given), batch_size=32, examples=100) == steps


def test_an_augmentation_starts_from_every_default_and_names_what_it_does_not_know():
    found = config.augmentation(rotate=5, jitter=(0.1, 0.2, 0.3, 0.0))
    assert found.rotate == 5.0 and tuple(found.jitter) == (0.1, 0.2, 0.3, 0.0)
    assert set(found) == {field.name for field in dataclasses.fields(Augmentation)}
    with pytest.raises(RecipeError, match="'rotat' is unknown; did you mean 'rotate'"):
        config.augmentation(rotat=5)


class TestCommandLine:
    """Misspelt paths are found before absl, whose answer would be a traceback."""

    @pytest.mark.parametrize(
        "argument",
        [
            "--config.batch_size=1",
            "-config.model.image.width=3",
            "--config.evals.new.data=x",
            "--config.data.augment.rotate=3.0",
            "--config=configs/clip_vitl.py",
            "--workdir=x",
        ],
    )
    def test_good(self, argument):
        config.check_overrides([argument])

    @pytest.mark.parametrize(
        ("argument", "said"),
        [
            ("--config.batchsize=1", "config has no key 'batchsize'; did you mean 'batch_size'?"),
            ("--config.evals.new.dta=x", "config.evals.new has no key 'dta'; did you mean 'data'?"),
            (
                "--config.data.augment.rotat=1",
                "config.data.augment has no key 'rotat'; did you mean 'rotate'?",
            ),
            ("--config.model.image.widht=3", "did you mean 'width'?"),
            ("--config.model.vision.width=3", "config.model has no key 'vision'"),
            ("--config.seed.x=3", "config.seed is a value and has no key 'x'"),
            ("-config.total.step=1", "did you mean 'steps'?"),
        ],
    )
    def test_bad(self, argument, said):
        with pytest.raises(RecipeError, match=re.escape(said)) as caught:
            config.check_overrides([argument])
        assert argument in str(caught.value)


def test_an_evaluation_with_a_misspelt_option():
    with pytest.raises(RecipeError, match="did you mean 'templates'"):
        config.evaluation("zeroshot", "x.tar", template="photo")


def test_an_unknown_form_names_the_nearest():
    with pytest.raises(RecipeError, match="no form 'tini'; did you mean 'tiny'"):
        config.choose(config.recipe(), "tini")
    other = config.choose(config.recipe(), "two", two=lambda c: c.update({"seed": 2}) or c)
    assert other.seed == 2


# Radford et al. 2021, tables 18 and 20; Dosovitskiy et al. 2021, table 1 (mlp = 4 x width).
COMMON = {
    "batch_size": 32_768,
    "optimizer.name": "adamw",
    "optimizer.b1": 0.9,
    "optimizer.b2": 0.98,
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 0.2,
    "optimizer.schedule": "cosine",
    "loss.logit_scale": "capped",
    "loss.logit_scale_init": 1 / 0.07,
    "loss.logit_scale_max": 100.0,
    "loss.positives": "pairs",
    "model.text.max_length": 77,
    "model.text.vocab_size": 49_408,
    "model.image.activation": "quick_gelu",
}
VIT_L = {
    "model.image.width": 1024,
    "model.image.depth": 24,
    "model.image.heads": 16,
    "model.image.mlp_dim": 4096,
    "model.image.patch_size": 14,
    "model.text.width": 768,
    "model.text.depth": 12,
    "model.text.heads": 12,
    "model.text.mlp_dim": 3072,
    "model.projection_dim": 768,
}
VIT_B = {
    "model.image.width": 768,
    "model.image.depth": 12,
    "model.image.heads": 12,
    "model.image.mlp_dim": 3072,
    "model.image.image_size": 224,
    "model.projection_dim": 512,
    "optimizer.learning_rate": 5e-4,
    "optimizer.warmup.steps": 2000,
    "total.epochs": 32.0,
}
CLIP_B_TEXT = {
    "model.text.width": 512,
    "model.text.depth": 12,
    "model.text.heads": 8,
    "model.text.mlp_dim": 2048,
}
EXPECTED = {
    "clip_vitl": COMMON
    | VIT_L
    | {
        "model.image.image_size": 224,
        "total.epochs": 32.0,
        "optimizer.learning_rate": 4e-4,
        "optimizer.warmup.steps": 2000,
        "frozen": (),
        "init_from": "",
    },
    "clip_vitl_336": COMMON
    | VIT_L
    | {
        "model.image.image_size": 336,
        "total.epochs": 1.0,
        "optimizer.learning_rate": 2e-5,
        "init_from": "openai/clip-vit-large-patch14",
    },
    "clip_vitb32": COMMON | VIT_B | CLIP_B_TEXT | {"model.image.patch_size": 32},
    "clip_vitb16": COMMON | VIT_B | CLIP_B_TEXT | {"model.image.patch_size": 16},
    "clip_bert_vitb16": COMMON
    | VIT_B
    | {
        "model.image.patch_size": 16,
        "model.text.kind": "bert",
        "model.text.width": 768,
        "model.text.depth": 12,
        "model.text.heads": 12,
        "model.text.mlp_dim": 3072,
        "model.text.vocab_size": 30_522,
        "model.text.activation": "gelu",
        "model.text.dropout": 0.1,
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_recipes_say_what_the_papers_say(name):
    checked = config.validate(load(name))
    for path, value in EXPECTED[name].items():
        found = checked
        for part in path.split("."):
            found = found[part]
        assert found == value, path


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_valid_in_its_full_and_tiny_form(name):
    full, small = config.validate(load(name)), config.validate(load(name, "tiny"))
    assert small.data.train.startswith("scenes")
    assert small.total.steps <= 100 and not small.init_from
    assert small.model.image.width <= 64 < full.model.image.width
    assert small.model.text.kind == full.model.text.kind
    if small.stage == "contrastive":
        assert {entry.benchmark for entry in small.evals.values()} == {"zeroshot", "retrieval"}


def test_recipes_of_llava_differ_where_the_models_do():
    """Both stages of a size are one model, sizes differ in the language model, adapters in what is trained."""
    loaded = {name: config.validate(load(name)).to_dict() for name in RECIPES if name.startswith("llava")}
    for size in ("llava_7b", "llava15_7b", "llava15_13b"):
        first, second = loaded[f"{size}_stage1"], loaded[f"{size}_stage2"]
        assert first["model"] == second["model"] and second["init_from"] == f"runs/{size}_stage1/hf"
        assert first["frozen"] == ("vision_model/.*", "language_model/.*") and second["frozen"] == (
            "vision_model/.*",
        )
    small, large = loaded["llava15_7b_stage2"], loaded["llava15_13b_stage2"]
    assert {key for key in small if small[key] != large[key]} == {"model", "init_from"}
    changed = loaded["llava15_7b_lora"]
    assert {key for key in small if small[key] != changed[key]} == {"frozen", "lora", "optimizer"}
    assert changed["lora"]["rank"] == 128 and config.validate(load("llava15_7b_lora", "tiny")).lora.rank == 4
    assert config.validate(load("llava15_7b_lora", "tiny")).lora.alpha == 8.0


def test_a_recipe_that_changes_another_names_it_where_it_is_not(tmp_path):
    with pytest.raises(
        RecipeError, match=r"mine.py is a change of .*absent.py, which is not there: copy both"
    ):
        config.beside(str(tmp_path / "mine.py"), "absent.py")


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_of_a_paper_cites_it(name):
    """In the recipes that follow a paper, model and optimizer lines name a table, a section, or another source."""
    text = (ROOT / "configs" / f"{name}.py").read_text()
    if name not in EXPECTED:
        return
    for line in text.splitlines():
        if re.match(r"\s+c\.(optimizer\.(learning_rate|warmup)|batch_size|total)", line):
            assert "#" in line, line


def test_benchmarks_belong_to_stages():
    """Answers are written, the others compare; what is of vqa alone is refused elsewhere."""
    for stage, benchmark in (
        ("contrastive", "vqa"),
        ("contrastive", "matching"),
        ("generative", "zeroshot"),
        ("blip", "vqa"),
    ):
        c = config.tiny(config.recipe())
        c.stage, c.evals = stage, config.Config({"x": config.evaluation(benchmark, "scenes")})
        c.data.max_length = 512
        with pytest.raises(
            RecipeError, match=f"config.evals.x.benchmark='{benchmark}' is not for stage '{stage}'"
        ):
            config.validate(c)
    for name, key, value, message in (
        ("retrieval", "rerank", 8, "config.evals.retrieval.rerank=8 is for 'retrieval' by BLIP"),
        ("zeroshot", "answers", "a.txt", "config.evals.zeroshot.answers='a.txt' is for stage 'blip_vqa'"),
    ):
        c = config.tiny(config.recipe())
        c.evals[name][key] = value
        with pytest.raises(RecipeError, match=message):
            config.validate(c)
    c = config.tiny(config.recipe())
    for key, value, told in (
        ("num_beams", 0, "config.evals.zeroshot.num_beams=0"),
        ("min_new_tokens", 17, "config.evals.zeroshot.min_new_tokens=17 is above max_new_tokens=16"),
    ):
        c.evals.zeroshot = config.evaluation("zeroshot", "scenes", **{key: value})
        with pytest.raises(RecipeError, match=told):
            config.validate(c)
    c.evals.zeroshot = config.evaluation("zeroshot", "scenes", blind=True)
    with pytest.raises(RecipeError, match="config.evals.zeroshot.blind=True is for 'vqa'"):
        config.validate(c)
