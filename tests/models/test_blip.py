"""BLIP: what encoder and decoder share, what each text sees, two images, presets, and how a model begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import towers_oracle as oracle
from tiny_models import IDS, MASK, change, images, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.hub.table import flatten
from vlmjax.models import blip_tasks
from vlmjax.models.bert import Bert, BertConfig
from vlmjax.models.blip import (
    Blip,
    BlipCaptioner,
    BlipRetriever,
    clamp_temperature,
    example_inputs,
)
from vlmjax.models.blip_config import BlipConfig, blip_config
from vlmjax.models.blip_start import from_pretraining, from_towers, momentum_part, resize_images
from vlmjax.models.blip_tasks import BlipNlvr, BlipVqa
from vlmjax.models.clip import ClipVision
from vlmjax.models.med import first_token
from vlmjax.models.vit import Vit, VitConfig, drop_path
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_sharding, make_mesh, replicated

VIT = VitConfig(
    width=40, depth=3, heads=5, mlp_dim=56, image_size=16, patch_size=8, activation="gelu", class_token=True,
    pre_norm=False, patch_bias=True, pool="none", init="normal",
)  # fmt: skip
MED = BertConfig(width=24, depth=4, heads=3, mlp_dim=48, vocab_size=50, max_length=9, type_vocab_size=None)
CONFIG = BlipConfig(VIT, MED, 12, bos_token_id=46, enc_token_id=47, sep_token_id=49)
PIXELS = images(3, 16, 16)


def inputs_of(model):
    return (blip_tasks if isinstance(model, (BlipVqa, BlipNlvr)) else _plain).example_inputs(model)


class _plain:
    example_inputs = staticmethod(example_inputs)


def params_of(model, seed=0):
    return make_params(model, seed=seed, **inputs_of(model))


@pytest.fixture(scope="module")
def params():
    return params_of(Blip(CONFIG))


def itc(module):
    states = module.encode_image(PIXELS)
    return (module.embed_image(states) @ module.embed_text(module.encode_text(IDS, MASK)).T).sum()


def itm(module):
    return module.match(module.encode_image(PIXELS), IDS, MASK)[:, 0].sum()


def lm(module):
    scores = module.logits(module.decode_text(module.encode_image(PIXELS), IDS, MASK))
    return jnp.sin(scores).sum()


LAYER = "text_model/encoder/layer"
EVERYONE = {"vision_model", "text_model/embeddings", f"{LAYER}/intermediate", f"{LAYER}/output"}
CROSS = f"{LAYER}/crossattention"
TOUCHED = {
    itc: EVERYONE | {f"{LAYER}/attention", "vision_proj", "text_proj"},
    itm: EVERYONE | {f"{LAYER}/attention", CROSS, "itm_head"},
    lm: EVERYONE | {f"{LAYER}/decoder_attention", CROSS, "text_model/head"},
}


@pytest.mark.parametrize("objective", list(TOUCHED), ids=lambda f: f.__name__)
def test_what_each_objective_trains(objective, params):
    """Everything but self-attention and its norm is shared (2201.12086, section 3.1)."""
    grads = jax.jit(jax.grad(lambda p: Blip(CONFIG).apply({"params": p}, method=objective)))(params)
    touched = set()
    for path, grad in flatten(grads).items():
        if np.abs(grad).max() > 0:
            depth = 4 if path.startswith(LAYER) else 2 if path.startswith("text_model") else 1
            touched.add("/".join(path.split("/")[:depth]))
    assert touched == TOUCHED[objective]


def test_who_sees_what(params):
    """A later token changes earlier states where a text is read, and not where it is written."""
    changed = IDS.copy()
    changed[:, 3] = 11

    def states(module, ids):
        image = module.encode_image(PIXELS)
        return (
            module.encode_text(ids, MASK),
            module.encode_multimodal(image, ids, MASK),
            module.decode_text(image, ids, MASK),
        )

    run = jax.jit(lambda p, ids: Blip(CONFIG).apply({"params": p}, ids, method=states))
    before, after = run(params, IDS), run(params, changed)
    for name, one, other in zip(("text", "multimodal", "decoder"), before, after, strict=True):
        difference = np.abs(np.asarray(one - other))[:, :3].max()
        assert difference == 0 if name == "decoder" else difference > 1e-3, name


def test_first_tokens():
    ids = np.array([[3, 4, 5, 0], [0, 3, 4, 5]], np.int32)
    mask = np.array([[1, 1, 1, 0], [0, 1, 1, 1]], np.int32)
    np.testing.assert_array_equal(first_token(ids, mask, 9), [[9, 4, 5, 0], [0, 9, 4, 5]])
    np.testing.assert_array_equal(first_token(ids, None, 9)[:, 0], 9)
    np.testing.assert_array_equal(first_token(ids, mask, None), ids)


def test_the_temperature_is_held():
    for value, held in ((0.07, 0.07), (1e-5, 0.001), (3.0, 0.5)):
        assert float(clamp_temperature({"temp": jnp.float32(value)})["temp"]) == pytest.approx(held)


@pytest.mark.parametrize(("size", "whole", "captioner"), [("base", 252e6, 224e6), ("large", 475e6, 446e6)])
def test_sizes_of_the_papers_models(size, whole, captioner):
    """Table 3 of the paper counts 252M with all shared but self-attention, 224M with all shared."""

    def count(model):
        shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **example_inputs(model)))
        return sum(x.size for x in jax.tree.leaves(shapes))

    config = blip_config(size, 224)
    assert count(Blip(config)) == pytest.approx(whole, rel=0.01)
    assert count(BlipCaptioner(config)) == pytest.approx(captioner, rel=0.01)
    assert config.image.drop_path == (0.1 if size == "large" else 0.0)
    with pytest.raises(RecipeError, match="'huge'"):
        blip_config("huge")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_compute_what_one_does(sizes, params):
    mesh = make_mesh(*sizes)
    rows = [np.concatenate([x, x, x])[:8] for x in (images(3, 16, 16), IDS, MASK)]

    def everything(module, pixels, ids, mask):
        states = module.encode_image(pixels)
        written = module.logits(module.decode_text(states, ids, mask))
        return module.match(states, ids, mask), written, module.embed_text(module.encode_text(ids, mask))

    def run(params, *inputs):
        return Blip(CONFIG).apply({"params": params}, *inputs, method=everything)

    expected = jax.jit(run)(params, *rows)
    placed = jax.device_put(rows, batch_sharding(mesh))
    found = jax.jit(on_mesh(mesh)(run))(jax.device_put(params, replicated(mesh)), *placed)
    for one, other in zip(expected, found, strict=True):
        assert not other.is_fully_replicated
        np.testing.assert_allclose(np.asarray(other), np.asarray(one), atol=1e-5)


# ---- stochastic depth


def test_dropped_paths_keep_the_expectation_and_the_first_block():
    x = jnp.ones((4000, 2, 3))
    out = np.asarray(jax.jit(drop_path)(x, jnp.float32(0.25), jax.random.key(0)))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out == out[:, :1, :1]).all()  # an image is dropped whole
    assert out.mean() == pytest.approx(1.0, abs=0.03)
    model = Vit(change(VIT, drop_path=0.9, depth=2))
    params = make_params(model, PIXELS)

    def features(key):
        train = {"train": True, "rngs": {"dropout": key}}
        return model.apply({"params": params}, PIXELS, layers=(1, 2), **train).features

    run = jax.jit(features)
    first, again, second = (np.asarray(run(jax.random.key(seed))) for seed in (0, 0, 1))
    still = np.asarray(jax.jit(lambda: model.apply({"params": params}, PIXELS, layers=(1, 2)).features)())
    np.testing.assert_array_equal(first, again)
    assert (first != second).any()
    np.testing.assert_allclose(
        first[..., :40], still[..., :40], atol=1e-6
    )  # linspace(0, 0.9): none in the first
    assert (np.abs(first[..., 40:] - still[..., 40:]).max(axis=(1, 2)) > 1e-3).any()


# ---- two images


def nlvr_oracle(p, image_states, ids, kept):
    """[ENC]'s last state of one text that looks at two images, in numpy."""
    emb, eps = p["embeddings"], MED.layer_norm_eps
    x = emb["word_embeddings"][ids] + emb["position_embeddings"][: len(ids)]
    x = oracle.norm(emb["LayerNorm"], x, eps)
    allowed = np.broadcast_to(kept[None, :] != 0, (len(ids), len(ids)))
    for index in range(MED.depth):
        name, at = ("averaging", index) if index < 2 else ("merging", index - 2)
        q = oracle.layer(p[name], at)
        own = q["attention"]["self"]
        mixed = oracle.attend(*(oracle.dense(own[n], x) for n in ("query", "key", "value")), 3, allowed)
        end = q["attention"]["output"]
        x = oracle.norm(end["LayerNorm"], oracle.dense(end["dense"], mixed) + x, eps)
        cross, end, seen = q["crossattention"], q["crossattention"]["output"], []
        for i in range(2):
            part, states = cross[f"self{i}"], image_states[i]
            keys, values = oracle.dense(part["key"], states), oracle.dense(part["value"], states)
            everywhere = np.ones((len(ids), len(states)), bool)
            mixed = oracle.attend(oracle.dense(part["query"], x), keys, values, 3, everywhere)
            seen.append(oracle.dense(end[f"dense{i}"], mixed))
        joined = (
            sum(seen) / 2
            if name == "averaging"
            else oracle.dense(end["merge_layer"], np.concatenate(seen, -1))
        )
        x = oracle.norm(end["LayerNorm"], joined + x, eps)
        hidden = oracle.ACTIVATIONS["gelu"](oracle.dense(q["intermediate"]["dense"], x))
        x = oracle.norm(q["output"]["LayerNorm"], oracle.dense(q["output"]["dense"], hidden) + x, eps)
    return x[0]


@pytest.mark.slow
def test_two_images_equal_the_numpy_form():
    model = BlipNlvr(CONFIG)
    params, pairs = params_of(model), np.stack([PIXELS, images(6, 16, 16)[3:]], axis=1)
    found = jax.jit(lambda p: model.apply({"params": p}, pairs, IDS, MASK))(params)
    tower = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_image"))
    states = [np.asarray(tower(params, pairs[:, i]), np.float64) for i in range(2)]
    p, ids = oracle.doubles(params), np.array(first_token(IDS, MASK, CONFIG.enc_token_id))
    for row in range(3):
        first = nlvr_oracle(p["text_encoder"], [states[0][row], states[1][row]], ids[row], MASK[row])
        wanted = oracle.dense(p["cls_out"], np.maximum(oracle.dense(p["cls_dense"], first), 0))
        np.testing.assert_allclose(found[row], wanted, atol=5e-5)
    swapped = jax.jit(lambda p: model.apply({"params": p}, pairs[:, ::-1], IDS, MASK))(params)
    assert np.abs(np.asarray(found - swapped)).max() > 1e-3  # the branches are two


# ---- how a model begins


@pytest.mark.parametrize("form", [BlipCaptioner, BlipRetriever, BlipVqa, BlipNlvr])
def test_every_form_begins_with_pretraining(form, params):
    model = form(CONFIG)
    fresh = params_of(model, seed=1)
    start = flatten(from_pretraining(model, fresh, Blip(CONFIG), params))
    old, new = flatten(params), flatten(fresh)
    assert set(start) == set(new)
    for path, value in start.items():
        reads = path.startswith("text_decoder") and "crossattention/self" in path and path.endswith("kernel")
        reads = (
            reads and "query" not in path
        )  # states of a question, which are not as wide as those of an image
        if "merge_layer" in path or path.startswith("cls_") or reads:
            np.testing.assert_array_equal(value, new[path])
            continue
        there = path.replace("text_encoder/", "text_model/").replace("text_decoder/", "text_model/")
        for name, layers in (("averaging", slice(0, 2)), ("merging", slice(2, 4))):
            if f"text_model/{name}/" in there:
                there = there.replace(f"text_model/{name}/", "text_model/encoder/layer/")
                there = there.replace("self0", "self").replace("self1", "self")
                there = there.replace("dense0", "dense").replace("dense1", "dense")
                np.testing.assert_array_equal(value, old[there][layers])
                break
        else:
            np.testing.assert_array_equal(value, old[there])


def test_a_nlvr_that_begins_with_pretraining_sees_two_equal_images_as_one(params):
    """In layers that take the mean. Those that merge begin with a fresh projection."""
    model, plain = BlipNlvr(CONFIG), Blip(CONFIG)
    start = from_pretraining(model, params_of(model, seed=1), plain, params)
    width = MED.width
    half = np.concatenate([np.eye(width), np.eye(width)]).astype(np.float32) / 2
    merge = start["text_encoder"]["merging"]["crossattention"]["output"]["merge_layer"]
    merge |= {"kernel": jnp.broadcast_to(half, (2, 2 * width, width)), "bias": jnp.zeros((2, width))}

    def two(module):
        states = module.encode_image(PIXELS)
        return module.text_encoder(first_token(IDS, MASK, 47), MASK, jnp.stack([states, states], 1), False)

    def one(module):
        return module.encode_multimodal(module.encode_image(PIXELS), IDS, MASK)

    found = jax.jit(lambda p: model.apply({"params": p}, method=two))(start)
    wanted = jax.jit(lambda p: plain.apply({"params": p}, method=one))(params)
    real = MASK == 1
    np.testing.assert_allclose(np.asarray(found)[real], np.asarray(wanted)[real], atol=2e-5)


def test_what_is_missing_or_of_another_shape_is_an_error(params):
    captioner, half = BlipCaptioner(CONFIG), params_of(BlipRetriever(CONFIG))
    with pytest.raises(
        UserError, match=r"BlipCaptioner cannot begin with BlipRetriever: .*decoder_attention.* is not there"
    ):
        from_pretraining(captioner, params_of(captioner), BlipRetriever(CONFIG), half)
    wide = BlipCaptioner(change(CONFIG, text=change(MED, mlp_dim=50)))
    with pytest.raises(UserError, match=r"intermediate/dense/bias is \[4, 48\], expected \[4, 50\]"):
        from_pretraining(wide, params_of(wide), Blip(CONFIG), params)


def test_positions_are_resized_at_the_start(params):
    large = BlipRetriever(change(CONFIG, image=change(VIT, image_size=(24, 32))))
    start = from_pretraining(large, params_of(large, seed=1), Blip(CONFIG), params)
    again, same = resize_images(BlipRetriever(CONFIG), params_of(BlipRetriever(CONFIG)), (24, 32))
    assert again.config == large.config
    pixels = images(2, 24, 32)
    small = jax.jit(lambda p: Vit(VIT).apply({"params": p}, pixels).last_hidden_state)
    tower = jax.jit(lambda p: Vit(large.config.image).apply({"params": p}, pixels).last_hidden_state)
    np.testing.assert_allclose(tower(start["vision_model"]), small(params["vision_model"]), atol=1e-5)
    assert same["vision_model"]["embeddings"]["position_embedding"].shape == (13, 40)


@pytest.mark.parametrize("fold", [False, True])
def test_pretraining_begins_with_a_vit_and_a_bert(fold, params):
    """With the token type folded into the positions, texts are read exactly as BERT reads them."""
    vit, bert = change(VIT, image_size=24), change(MED, type_vocab_size=2, vocab_size=48)
    image, text = make_params(ClipVision(vit), images(1, 24, 24)), make_params(Bert(bert), IDS % 48)
    model = Blip(CONFIG)
    start = from_towers(model, params, image=(vit, image), text=(bert, text), fold_token_type=fold)
    ids = IDS % 48
    read = jax.jit(lambda p: model.apply({"params": p}, ids, MASK, method="encode_text"))(start)
    wanted = jax.jit(lambda p: Bert(bert).apply({"params": p}, ids, MASK).last_hidden_state)(text)
    difference = np.abs(np.asarray(read - wanted))[MASK == 1].max()
    assert difference < 1e-5 if fold else difference > 1e-3
    flat, old, own = flatten(start), flatten(params), flatten(text)
    for path, value in own.items():
        if "/attention/" in path:
            np.testing.assert_array_equal(flat[f"text_model/{path}"], value)
            np.testing.assert_array_equal(
                flat[f"text_model/{path}".replace("attention", "decoder_attention", 1)], value
            )
    words = "text_model/embeddings/word_embeddings"
    np.testing.assert_array_equal(flat[words][:48], own["embeddings/word_embeddings"])
    np.testing.assert_array_equal(flat[words][48:], old[words][48:])
    untouched = [
        path
        for path in flat
        if "crossattention" in path or "head" in path or "proj/" in path.split("layers")[0]
    ]
    assert len(untouched) > 10
    for path in untouched:
        np.testing.assert_array_equal(flat[path], old[path])
    pixels = images(2, 24, 24)
    seen = jax.jit(lambda p: model.apply({"params": p}, pixels, method="encode_image"))(start)
    wanted = jax.jit(lambda p: ClipVision(vit).apply({"params": p}, pixels).last_hidden_state)(image)
    assert seen.shape == wanted.shape


def test_towers_of_another_shape_are_refused(params):
    bert = change(MED, type_vocab_size=2, width=30)
    with pytest.raises(UserError, match=r"Blip cannot begin with the towers: .*expected"):
        from_towers(Blip(CONFIG), params, text=(bert, make_params(Bert(bert), IDS)))


def test_a_momentum_copy_needs_only_its_part(params):
    part = momentum_part(params)
    model = Blip(CONFIG)
    assert len(flatten(part)) < len(flatten(params))
    run = jax.jit(lambda p: model.apply({"params": p}, method=itc))
    assert float(run(part)) == float(run(params))
    assert not any("crossattention" in path or "decoder_attention" in path for path in flatten(part))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": change(VIT, pool="class")}, "no tower of BLIP"),
        ({"text": change(MED, type_vocab_size=2)}, "2 token types"),
        ({"bos_token_id": 50}, "bos_token_id is 50; the vocabulary has 50"),
        ({"projection_dim": 0}, "projection_dim is 0"),
    ],
)
def test_wrong_configs_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        change(CONFIG, **fields)
    with pytest.raises(RecipeError, match=r"drop_path is 1\.0"):
        change(VIT, drop_path=1.0)
    with pytest.raises(RecipeError, match="init is 'xavier'"):
        change(VIT, init="xavier")


def test_features_of_another_mode_are_refused(params):
    model = Blip(CONFIG)
    for mode, given in (("video", {}), ("image", {}), ("multimodal", {"pixel_values": PIXELS})):
        with pytest.raises(RecipeError, match="cannot be made"):
            model.apply({"params": params}, mode, **given, method="features")
