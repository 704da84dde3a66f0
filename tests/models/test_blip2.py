"""BLIP-2's first stage: the golden tree, presets, the closest query, and how it begins with a tower and a BERT."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BERT, IDS, MASK, VIT, change, images, make_params

from vlmjax.errors import RecipeError, UserError
from vlmjax.models.bert import Bert
from vlmjax.models.blip2 import Blip2, Blip2Retriever, best_queries, example_inputs
from vlmjax.models.blip2_config import Blip2Config, blip2_vit
from vlmjax.models.blip2_start import from_towers
from vlmjax.models.clip import ClipVision
from vlmjax.models.med import LanguageHead
from vlmjax.models.qformer import QformerConfig
from vlmjax.models.vit import Vit

TREES = Path(__file__).parent / "trees"
TOWER = blip2_vit("clip-l", (16, 24), width=40, depth=2, heads=5, mlp_dim=56, patch_size=8)
WORDS = change(BERT, depth=3, vocab_size=52, type_vocab_size=None)
CONFIG = Blip2Config(TOWER, QformerConfig(WORDS, queries=4), 12, bos_token_id=51)


def tree(model):
    inputs = example_inputs(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    lines = ["/".join(key.key for key in path) + f" {leaf.shape} {leaf.dtype}" for path, leaf in flat]
    return "\n".join(sorted(lines)) + "\n"


def test_parameter_tree_is_the_golden_one():
    """Checkpoints, placement rules and the hub's tables hang on these paths; change the file only with them."""
    lines = (TREES / "blip2.txt").read_text()
    assert tree(Blip2(CONFIG)) == lines
    kept = [line for line in lines.splitlines(keepends=True) if not line.startswith("head/")]
    assert tree(Blip2Retriever(CONFIG)) == "".join(kept)


def test_presets_are_the_papers():
    """188M parameters in the Q-Former (section 3.1), 1B in ViT-g (table 1 of 2211.07636) less a block."""
    model = Blip2(Blip2Config(blip2_vit()))
    inputs = example_inputs(model)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), **inputs))["params"]
    count = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in shapes.items()}
    assert 185e6 < count["qformer"] < 190e6
    assert 980e6 < count["vision_model"] < 990e6
    assert blip2_vit("clip-l").grid == (16, 16)


def test_an_image_is_as_like_a_text_as_its_closest_query():
    rng = np.random.default_rng(0)
    image, text = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 4, 5), (3, 5)))
    wanted = [[max(float(query @ words) for query in one) for words in text] for one in image]
    np.testing.assert_allclose(best_queries(jnp.asarray(image), jnp.asarray(text)), wanted, atol=1e-6)


@pytest.fixture(scope="module")
def start():
    """Parameters begun with a CLIP of three blocks and a BERT with its head, and those two."""
    fresh = make_params(Blip2(CONFIG), **example_inputs(Blip2(CONFIG)), seed=5)
    tower = make_params(ClipVision(VIT), images(), seed=6)
    words = change(BERT, depth=3)
    bert = make_params(Bert(words), IDS, seed=7)
    head = make_params(LanguageHead(words), jnp.zeros((1, 1, 24)), jnp.zeros((50, 24)), seed=8)
    begun = from_towers(
        Blip2(CONFIG), fresh, image=(VIT, tower), text=(words, bert), head=head, fold_token_type=True
    )
    return fresh, tower, bert, head, begun


def test_texts_are_read_as_bert_reads_them(start):
    _, _, bert, _, begun = start
    texts = {"input_ids": IDS, "attention_mask": MASK}
    expected = Bert(change(BERT, depth=3)).apply({"params": bert}, **texts).last_hidden_state
    found = Blip2(CONFIG).apply({"params": begun}, **texts, method="encode_text")
    np.testing.assert_allclose(np.asarray(found)[MASK == 1], np.asarray(expected)[MASK == 1], atol=2e-5)


def test_the_tower_is_what_the_last_but_one_block_leaves(start):
    _, tower, _, _, begun = start
    vision = Vit(VIT).apply({"params": tower["vision_model"]}, images(), layers=(-2,)).features
    found = Vit(TOWER).apply({"params": begun["vision_model"]}, images()).last_hidden_state
    np.testing.assert_allclose(found, vision, atol=2e-5)


def test_queries_begin_with_the_feed_forward_of_texts_and_the_rest_is_fresh(start):
    fresh, _, _, head, begun = start
    for part in ("groups", "rest"):
        for layer in begun["qformer"][part].values():
            for name in ("intermediate", "output"):
                jax.tree.map(np.testing.assert_array_equal, layer[name], layer[f"{name}_query"])
        crossing = [tree["qformer"][part]["layer_0"]["crossattention"] for tree in (begun, fresh)]
        jax.tree.map(np.testing.assert_array_equal, *crossing)
    for name in ("ln_vision", "vision_proj", "itm_head", "temp"):
        jax.tree.map(np.testing.assert_array_equal, begun[name], fresh[name])
    words = [tree["qformer"]["embeddings"]["word_embeddings"] for tree in (begun, fresh)]
    np.testing.assert_array_equal(words[0][50:], words[1][50:])
    np.testing.assert_array_equal(begun["head"]["bias"][:50], head["bias"])
    np.testing.assert_array_equal(begun["head"]["dense"]["kernel"], head["dense"]["kernel"])


def test_towers_of_another_shape_are_refused(start):
    fresh, tower, bert, _, _ = start
    with pytest.raises(UserError, match="a BERT of 2 layers, expected 3"):
        from_towers(
            Blip2(CONFIG), fresh, text=(BERT, jax.tree.map(lambda x: x[:2] if len(x) == 3 else x, bert))
        )
    other = Blip2(change(CONFIG, image=change(TOWER, depth=4)))
    fresh = make_params(other, **example_inputs(other))
    with pytest.raises(UserError, match=r"layer_norm1/\w+ is \[3, 40\], expected \[4, 40\]"):
        from_towers(other, fresh, image=(VIT, tower))


def test_wrong_use_is_refused():
    for fields, message in (
        ({"image": VIT}, "no tower of BLIP-2"),
        ({"qformer": QformerConfig(WORDS, reads_text=False)}, "reads_text=False"),
        ({"projection_dim": 0}, "projection_dim is 0"),
        ({"bos_token_id": 52}, "bos_token_id is 52"),
    ):
        with pytest.raises(RecipeError, match=message):
            change(CONFIG, **fields)
    with pytest.raises(RecipeError, match="'eva-l' is not known; choose one of eva-g, clip-l"):
        blip2_vit("eva-l")
    with pytest.raises(RecipeError, match="pool 'class'"):
        change(VIT, post_norm=False)
