"""The dual encoder: outputs by name, either half alone, both text towers, the golden parameter trees."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, CLIP, DUAL, IDS, MASK, TEXT, VIT, change, images, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import Bert
from vlmjax.models.clip import Clip, ClipConfig, ClipText, ClipVision, example_inputs
from vlmjax.models.text import Text, TextConfig
from vlmjax.models.vit import Vit, VitConfig

TREES = Path(__file__).parent / "trees"


@pytest.fixture(scope="module", params=[CLIP, DUAL], ids=["clip", "dual"])
def case(request):
    model = Clip(request.param)
    params = make_params(model, **example_inputs(request.param))
    out = jax.jit(
        lambda p: model.apply({"params": p}, pixel_values=images(), input_ids=IDS, attention_mask=MASK)
    )
    return model, params, out(params)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_embeddings_and_logits_follow_from_the_towers(case):
    model, params, out = case
    tower = Bert(BERT) if model.config is DUAL else Text(TEXT)

    @jax.jit
    def towers(p):
        image = Vit(VIT).apply({"params": p["vision_model"]}, images())
        return image, tower.apply({"params": p["text_model"]}, IDS, MASK)

    image, text = towers(params)
    for got, want in ((out.vision_model_output, image), (out.text_model_output, text)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)
    image_embeds = unit(np.asarray(image.pooler_output) @ np.asarray(params["visual_projection"]["kernel"]))
    text_embeds = unit(np.asarray(text.pooler_output) @ np.asarray(params["text_projection"]["kernel"]))
    np.testing.assert_allclose(out.image_embeds, image_embeds, atol=1e-5)
    np.testing.assert_allclose(out.text_embeds, text_embeds, atol=1e-5)
    logits = np.exp(float(params["logit_scale"])) * image_embeds @ text_embeds.T
    assert out.logits_per_image.shape == (2, 3)
    np.testing.assert_allclose(out.logits_per_image, logits, atol=1e-4)
    np.testing.assert_array_equal(out.logits_per_text, out.logits_per_image.T)


def test_either_half_alone(case):
    model, params, out = case

    @jax.jit
    def halves(p):
        return (
            model.apply({"params": p}, pixel_values=images()),
            model.apply({"params": p}, input_ids=IDS, attention_mask=MASK),
            model.apply({"params": p}, images(), method="encode_image"),
            model.apply({"params": p}, IDS, MASK, method="encode_text"),
        )

    image, text, image_embeds, text_embeds = halves(params)
    assert (
        image.text_embeds
        is image.text_model_output
        is image.logits_per_image
        is image.logits_per_text
        is None
    )
    assert (
        text.image_embeds is text.vision_model_output is text.logits_per_image is text.logits_per_text is None
    )
    np.testing.assert_allclose(image.image_embeds, out.image_embeds, atol=1e-6)
    np.testing.assert_allclose(text.text_embeds, out.text_embeds, atol=1e-6)
    np.testing.assert_allclose(image_embeds, image.image_embeds, atol=1e-6)
    np.testing.assert_allclose(text_embeds, text.text_embeds, atol=1e-6)


@pytest.mark.parametrize("config", [CLIP, DUAL], ids=["clip", "dual"])
def test_embeddings_are_float32_under_bfloat16(config):
    low = change(config, image=change(VIT, dtype="bfloat16"), text=change(config.text, dtype="bfloat16"))
    out = jax.eval_shape(lambda: Clip(low).init_with_output(jax.random.key(0), images(), IDS))[0]
    floats = (out.image_embeds, out.text_embeds, out.logits_per_image, out.text_model_output.pooler_output)
    assert {x.dtype for x in floats} == {jnp.dtype("float32")}
    towers = (out.vision_model_output.last_hidden_state, out.text_model_output.last_hidden_state)
    assert {x.dtype for x in towers} == {jnp.dtype("bfloat16")}


def test_halves_as_models_of_their_own_share_the_tree():
    params = make_params(Clip(CLIP), **example_inputs(CLIP))

    def part(*names):
        return {"params": {name: params[name] for name in names}}

    @jax.jit
    def run():
        return (
            Clip(CLIP).apply({"params": params}, images(), IDS, MASK),
            ClipVision(VIT, 12).apply(part("vision_model", "visual_projection"), images()),
            ClipText(TEXT, 12).apply(part("text_model", "text_projection"), IDS, MASK),
            ClipVision(VIT).apply(part("vision_model"), images()),
            ClipText(TEXT).apply(part("text_model"), IDS, MASK),
        )

    whole, image, text, bare_image, bare_text = run()
    np.testing.assert_allclose(unit(image.image_embeds), whole.image_embeds, atol=1e-6)
    np.testing.assert_allclose(unit(text.text_embeds), whole.text_embeds, atol=1e-6)
    assert np.abs(np.linalg.norm(image.image_embeds, axis=-1) - 1).max() > 0.01
    assert bare_image.image_embeds is bare_text.text_embeds is None
    np.testing.assert_allclose(bare_image.pooler_output, image.pooler_output, atol=1e-6)


def tree(model, *inputs, **named):
    """Path, shape and dtype of every parameter, one per line."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs, **named)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return "".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='/')} {leaf.shape} {leaf.dtype}\n"
        for path, leaf in leaves
    )


@pytest.mark.parametrize(
    ("name", "model", "inputs"),
    [
        ("clip", Clip(CLIP), (images(), IDS)),
        ("dual_encoder", Clip(DUAL), (images(), IDS)),
        ("clip_vision", ClipVision(VIT, 12), (images(),)),
        ("clip_text", ClipText(TEXT, 12), (IDS,)),
        ("bert", Bert(BERT), (IDS,)),
    ],
)
def test_parameter_tree_is_the_golden_one(name, model, inputs):
    """Checkpoints, placement rules and the hub's tables hang on these paths; change the file only with them."""
    assert tree(model, *inputs) == (TREES / f"{name}.txt").read_text()


def test_example_inputs_make_every_parameter():
    for config, name in ((CLIP, "clip"), (DUAL, "dual_encoder")):
        assert tree(Clip(config), **example_inputs(config)) == (TREES / f"{name}.txt").read_text()


@pytest.mark.slow
def test_initial_spread_is_openai_clips():
    image = VitConfig(width=128, depth=3, heads=4, mlp_dim=512, image_size=64, patch_size=8)
    words = TextConfig(width=96, depth=4, heads=4, mlp_dim=384, vocab_size=300, max_length=64)
    config = ClipConfig(image, words, projection_dim=112, logit_scale_init=1.5)
    params = jax.jit(Clip(config).init)(jax.random.key(0), **example_inputs(config))["params"]
    vision, text = params["vision_model"], params["text_model"]
    vit, writing = vision["encoder"]["layers"], 96**-0.5 * 8**-0.5
    layers = text["encoder"]["layers"]
    expected = {
        "image positions": (vision["embeddings"]["position_embedding"], 128**-0.5),
        "patches": (vision["embeddings"]["patch_embedding"]["kernel"], (3 * 192) ** -0.5),
        "image q": (vit["self_attn"]["q_proj"]["kernel"], (2 * 128) ** -0.5),
        "image out": (vit["self_attn"]["out_proj"]["kernel"], (3 * 128) ** -0.5),
        "image fc1": (vit["mlp"]["fc1"]["kernel"], (3 * 128) ** -0.5),
        "image fc2": (vit["mlp"]["fc2"]["kernel"], (3 * 512) ** -0.5),
        "tokens": (text["embeddings"]["token_embedding"], 0.02),
        "text positions": (text["embeddings"]["position_embedding"], 0.01),
        "text v": (layers["self_attn"]["v_proj"]["kernel"], 96**-0.5),
        "text out": (layers["self_attn"]["out_proj"]["kernel"], writing),
        "text fc1": (layers["mlp"]["fc1"]["kernel"], 192**-0.5),
        "text fc2": (layers["mlp"]["fc2"]["kernel"], writing),
        "image projection": (params["visual_projection"]["kernel"], 128**-0.5),
        "text projection": (params["text_projection"]["kernel"], 96**-0.5),
    }
    for name, (value, std) in expected.items():
        np.testing.assert_allclose(np.std(value), std, rtol=0.05, err_msg=name)
    assert params["logit_scale"] == 1.5
    assert not layers["mlp"]["fc1"]["bias"].any()
    first, second = layers["mlp"]["fc1"]["kernel"][:2]
    assert np.abs(first - second).max() > 0.01, "every layer is drawn on its own"


def test_wrong_use_is_refused(case):
    model, params, _ = case
    if model.config is CLIP:
        with pytest.raises(UserError, match="token_type_ids"):
            model.apply({"params": params}, None, IDS, MASK, None, np.zeros_like(IDS))
    with pytest.raises(RecipeError, match="projection_dim is 0"):
        ClipConfig(image=VIT, text=TEXT, projection_dim=0)
