"""What is planned: the train step of a recipe, or the loss alone, as a jitted function with abstract arguments."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vlmjax.config import Config
from vlmjax.config_checks import BLIP_STAGES
from vlmjax.data import recipe as data_recipe
from vlmjax.data import text
from vlmjax.data.conversation import MARK
from vlmjax.data.recipe import DEC, ENC
from vlmjax.errors import DataError, RecipeError, UserError
from vlmjax.losses.choice import choose
from vlmjax.losses.contrastive import info_nce
from vlmjax.sharding.mesh import batch_sharding, batch_shards, check_batch_size, make_mesh, replicated
from vlmjax.training import build
from vlmjax.training.compile import compiler_options, make_program
from vlmjax.training.durations import Durations
from vlmjax.training.optimizer import make_schedule
from vlmjax.training.state import count

STEP_FORMULA = (
    "3 x forward matrix products (frozen parts 1 x, 2 x where gradients pass through), no recomputation"
)
LOSS_FORMULA = "8 N^2 D: similarities once forward and once backward, and the gradients of both sides"


class Subject(NamedTuple):
    """A program to plan. Sizes are of the whole program, over all devices."""

    title: str
    step: Any  # jitted
    arguments: tuple
    mesh: Mesh
    batch_size: int
    unit: int  # batch sizes are multiples of it
    flops: int  # model FLOPs of one call
    formula: str
    splits: bool = True  # whether a batch may be gone through in parts
    parameters: int = 0
    trainable: int = 0
    steps: int | None = None  # of the whole run
    why_no_steps: str = ""


class Vocabulary(text.Tokenizer):
    """As much of a tokenizer as the shapes of a model depend on: how many tokens there are, the last one ends."""

    def __init__(self, vocab_size: int, **special: int):
        """Ids in the order of CLIP's vocabulary; `special` are those of the tokens that a stage adds, by their text."""
        self.vocab_size, self.bos_token_id = vocab_size, vocab_size - 2
        self.eos_token_id = self.pad_token_id = vocab_size - 1
        self._special = special

    def token_id(self, token: str) -> int | None:
        """Of a special token; no other is known."""
        return self._special.get(token)

    def encode(self, text: str) -> list[int]:
        """A text without words."""
        return [self.bos_token_id, self.eos_token_id]


def train_subject(recipe: Config, devices: Sequence[Any], title: str, examples: int | None = None) -> Subject:
    """The train step of a validated recipe on some devices, through the function that training uses.

    Neither data nor tokenizer need be there. `examples` is the size of the data where it cannot be opened.

    Raises:
      RecipeError: what training itself would say about recipe and devices.
    """
    recipe = for_platform(recipe, devices[0].platform)
    recipe, missing = without_missing_parts(recipe)
    title += missing
    mesh = make_mesh(**recipe.mesh.to_dict(), devices=devices)
    check_batch_size(recipe.batch_size, mesh, recipe.micro_batches)
    lengths, why = _lengths(recipe, examples)
    optimizer = recipe.optimizer
    if lengths:
        schedule = make_schedule(optimizer, lengths.total, lengths.warmup, lengths.cooldown)
    else:  # its numbers are constants of the program, and do not change what it needs
        schedule = optax.constant_schedule(optimizer.learning_rate)
    model = build.make_model(recipe, vocabulary(recipe))
    program = make_program(recipe, model, mesh, schedule)
    params = program.state.params
    return Subject(
        title=title,
        step=program.step,
        arguments=(program.state, program.batch),
        mesh=mesh,
        batch_size=recipe.batch_size,
        unit=batch_shards(mesh) * recipe.micro_batches,
        flops=program.stage.train_flops(program.batch, params),
        formula=STEP_FORMULA,
        splits=program.stage.splits,
        parameters=count(params) + count(program.state.frozen),
        trainable=count(params),
        steps=lengths.total if lengths else None,
        why_no_steps=why,
    )


def for_platform(recipe: Config, platform: str) -> Config:
    """The recipe with what depends on the backend resolved for the devices planned for, not for this machine."""
    copy = Config(recipe.to_dict())
    copy.model.dtype = build.compute_dtype(recipe, platform)
    return copy.lock()


def without_missing_parts(recipe: Config) -> tuple[Config, str]:
    """A recipe of several parts whose imported ones can all be read here; and what is said of the others.

    In place of a folder that is not at hand, such as the one that an earlier stage will write, stand the recipe's own
    sizes.
    """
    words = {"generative": ["language_from"], "classification": []}
    words |= dict.fromkeys(BLIP_STAGES, ["text_from"])
    if recipe.stage not in words:
        return recipe, ""
    from vlmjax import hub

    copy, missing = Config(recipe.to_dict()), []
    image = "image" if recipe.stage == "generative" else None
    for holder, key, part in (
        (copy, "init_from", None),
        (copy.model, "image_from", image),
        *[(copy.model, key, None) for key in words[recipe.stage]],
    ):
        if holder[key]:
            try:
                hub.load_model(holder[key], part=part)
            except UserError:
                missing.append(holder[key])
                holder[key] = ""
    if missing:
        copy.data.tokenizer, copy.model.head_from = "bpe:514", ""
    said = f"; in sizes of the recipe, without {', '.join(missing)}" if missing else ""
    return copy.lock(), said


def vocabulary(recipe: Config) -> text.Tokenizer | None:
    """A stand-in for the recipe's tokenizer, of its size; None where there are no texts.

    Raises RecipeError where neither the recipe nor a tokenizer at hand says how many tokens there are.
    """
    if recipe.stage == "classification":
        return None
    name = data_recipe.tokenizer_name(recipe)
    if recipe.stage == "generative":
        return _vocabulary_with_images(recipe, name)
    if recipe.stage in BLIP_STAGES:
        return _vocabulary_of_blip(recipe, name)
    if recipe.init_from:
        with data_recipe.naming("init_from"):
            from vlmjax import hub

            config = hub.load_model(recipe.init_from).config.text
        tokenizer = Vocabulary(config.vocab_size)
        end = getattr(config, "eos_token_id", 2)
        tokenizer.eos_token_id = tokenizer.vocab_size - 1 if end == 2 else end
        return tokenizer
    if recipe.model.text.vocab_size:
        return Vocabulary(recipe.model.text.vocab_size)
    size = name.removeprefix("bpe:")
    if name.startswith("bpe:") and size.isdigit() and int(size) >= data_recipe.SMALLEST_BPE:
        return Vocabulary(int(size))
    try:
        return text.load(name, recipe.model.text.max_length)
    except DataError as error:
        raise RecipeError(
            f"config.data.tokenizer={name!r} cannot be read ({error}): plan with the number of its tokens, "
            "--config.model.text.vocab_size=49408"
        ) from None


def _vocabulary_with_images(recipe: Config, name: str) -> text.Tokenizer:
    """The same where texts have images: the placeholder is the last token, or where an imported model has it."""
    from vlmjax import hub

    if recipe.init_from:
        config = hub.load_model(recipe.init_from).config
        return Vocabulary(config.text.vocab_size, **{MARK: config.image_token_id})
    if recipe.model.language_from:
        return _ending_in(hub.load_model(recipe.model.language_from).config.vocab_size + 1, MARK)
    if recipe.model.language.vocab_size:
        return _ending_in(recipe.model.language.vocab_size, MARK)
    if name.startswith("bpe:"):
        return _ending_in(int(name.removeprefix("bpe:")) + 1, MARK)
    with data_recipe.naming("data.tokenizer"):
        return text.with_token(text.load(name, recipe.data.max_length), MARK)


def _vocabulary_of_blip(recipe: Config, name: str) -> text.Tokenizer:
    """The same with the tokens that BLIP's texts begin with at its end, or where an imported model has them."""
    from vlmjax import hub

    if recipe.init_from:
        config = hub.load_model(recipe.init_from).config
        return Vocabulary(config.text.vocab_size, **{DEC: config.bos_token_id, ENC: config.enc_token_id})
    if recipe.model.text.vocab_size:
        return _ending_in(recipe.model.text.vocab_size, DEC, ENC)
    if name.startswith("bpe:"):
        return _ending_in(int(name.removeprefix("bpe:")) + 2, DEC, ENC)
    with data_recipe.naming("data.tokenizer"):
        found = text.load(name, recipe.model.text.max_length)
        return text.with_token(text.with_token(found, DEC), ENC)


def _ending_in(vocab_size: int, *special: str) -> Vocabulary:
    """A stand-in whose last tokens are these."""
    first = vocab_size - len(special)
    return Vocabulary(vocab_size, **{token: first + place for place, token in enumerate(special)})


def _lengths(recipe: Config, examples: int | None) -> tuple[Durations | None, str]:
    """The durations of the run, or why they are not known."""
    if examples is None and _needs_examples(recipe):
        try:
            sources, _ = data_recipe.open_train_sources(recipe)
        except (UserError, OSError):
            return None, f"config.data.train={recipe.data.train!r} cannot be opened here: give --examples=N"
        examples = sum(len(source) for source in sources)
    return Durations(recipe, range(examples or recipe.batch_size)), ""


def _needs_examples(recipe: Config) -> bool:
    optimizer = recipe.optimizer
    return any(d["epochs"] is not None for d in (recipe.total, optimizer.warmup, optimizer.cooldown))


def loss_subject(batch: int, width: int, devices: Sequence[Any], form: str = "auto") -> Subject:
    """InfoNCE alone, with its gradients, from bfloat16 features [batch, width] spread over all devices."""
    square = 2 ** (len(devices).bit_length() // 2)  # of two axes for a hierarchy, the one that is gathered
    mesh = make_mesh(fsdp=square if form == "hierarchical" else 1, devices=devices)
    check_batch_size(batch, mesh)
    rows, scalar = batch_sharding(mesh), replicated(mesh)
    features = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=scalar)

    way = choose(form, batch, width, mesh, dtype=jnp.bfloat16)

    def loss(images, texts, logit_scale):
        return info_nce(images, texts, logit_scale, mesh=mesh, form=form, feature_dtype=jnp.bfloat16)

    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True),
        out_shardings=((scalar, None), (rows, rows, scalar)),
        compiler_options=compiler_options(mesh),
    )
    return Subject(
        title=f"InfoNCE and its gradients, {batch} pairs of width {width}: {way.describe()}",
        step=step,
        arguments=(features, features, scale),
        mesh=mesh,
        batch_size=batch,
        unit=batch_shards(mesh),
        flops=8 * batch**2 * width,
        formula=LOSS_FORMULA,
    )
