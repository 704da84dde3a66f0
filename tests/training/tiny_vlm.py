"""A vision-language model of width 16, rows of conversations for it, and one step of its training."""

import math

import jax
import numpy as np
import optax
from training import tiny

from vlmjax.config import VLM_SHARDING, validate
from vlmjax.models.bridges import BridgeConfig
from vlmjax.models.decoder import DecoderConfig
from vlmjax.models.layers import DTYPES
from vlmjax.models.vit import VitConfig
from vlmjax.models.vlm import Vlm, VlmConfig
from vlmjax.sharding.mesh import make_mesh, to_global
from vlmjax.stages.generative import Generative
from vlmjax.training.compile import init_params
from vlmjax.training.state import make_state, merge, state_shardings
from vlmjax.training.step import make_train_step

IMAGE, VOCAB, LENGTH, SLOTS, ROWS = 5, 48, 24, 2, 16
ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def model(dtype="float32", remat="none"):
    """Two heads and an even width everywhere, so that meshes of two by two can cut it; 4 tokens an image."""
    compute = {"dtype": dtype, "remat": remat}
    words = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 32}
    return Vlm(
        VlmConfig(
            image=VitConfig(width=16, depth=2, heads=2, mlp_dim=32, image_size=16, patch_size=8, **compute),
            text=DecoderConfig(**words, vocab_size=VOCAB, max_length=64, **compute),
            bridge=BridgeConfig("mlp", 2, dtype=dtype),
            image_token_id=IMAGE,
        )
    )


def recipe(**changes):
    """A recipe of the stage that this model fits; see `tiny.recipe` for the changes."""
    sizes = {
        "stage": "generative",
        "batch_size": ROWS,
        "data__max_length": LENGTH,
        "data__images_per_row": SLOTS,
        "sharding": VLM_SHARDING,
    }
    return validate(tiny.recipe(**{**sizes, **changes}))


def random_params(of=None, seed=1):
    """Parameters on the host, none at zero, drawn anew so that no initialiser hides anything."""
    shapes = jax.eval_shape(lambda: init_params(of or model(), 0))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        spread = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return ((path[-1].key == "scale") + spread * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def document(rng, words, image):
    """(ids, which of them are learned) of a question and an answer, with an image before it or without."""
    ids = [IMAGE] * 4 * image + rng.integers(6, VOCAB, words).tolist()
    return ids, [0] * (len(ids) - words // 2) + [1] * (words // 2)


def rows(seed=0, count=ROWS):
    """Lists of documents: (ids, learned, image or None). Long and short answers, with and without images, one empty."""
    rng = np.random.default_rng(seed)
    kinds = ([(9, 1)], [(5, 0)], [(4, 1), (5, 1)], [(3, 1), (7, 0), (4, 0)], [(18, 0)], [(2, 1)], [])
    made = []
    for i in range(count):
        row = []
        for words, image in kinds[i % len(kinds)]:
            pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) if image else None
            row.append((*document(rng, words, image), pixels))
        made.append(row)
    return made


def batch_of(rows):
    """The arrays of data/generative.py, packed by hand."""
    shape = (len(rows), LENGTH)
    ints = {
        name: np.zeros(shape, np.int32) for name in ("input_ids", "targets", "position_ids", "segment_ids")
    }
    batch = {
        **ints,
        "target_weights": np.zeros(shape, np.float32),
        "image_index": np.full(shape, -1, np.int32),
        "pixel_values": np.zeros((len(rows), SLOTS, 16, 16, 3), np.uint8),
        "image_valid": np.zeros((len(rows), SLOTS), bool),
        "valid": np.array([bool(row) for row in rows]),
    }
    for i, row in enumerate(rows):
        at, slot = 0, 0
        for number, (ids, learned, pixels) in enumerate(row, start=1):
            here = slice(at, at + len(ids))
            batch["input_ids"][i, here] = ids
            batch["targets"][i, at : at + len(ids) - 1] = ids[1:]
            batch["target_weights"][i, at : at + len(ids) - 1] = learned[1:]
            batch["position_ids"][i, here] = range(len(ids))
            batch["segment_ids"][i, here] = number
            if pixels is not None:
                batch["image_index"][i, at : at + 4] = range(4 * slot, 4 * slot + 4)
                batch["pixel_values"][i, slot], batch["image_valid"][i, slot] = pixels, True
                slot += 1
            at += len(ids)
    return batch


def start(params, sizes=ONE, optimizer=None, of=None, **changes):
    """(compiled step, first state, mesh) of a recipe; plain gradient descent at rate 1 unless told otherwise."""
    made, mesh = recipe(**changes), make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    stage, optimizer = Generative(made, of or model(), mesh), optimizer or optax.sgd(1.0)

    def make(params):
        whole = stage.with_own_params(params)
        dtype = DTYPES[stage.frozen_dtype]
        return make_state(whole, (*made.frozen, *stage.frozen), optimizer, False, frozen_dtype=dtype)

    shapes = jax.eval_shape(make, params)
    rules = stage.placement(made.sharding, merge(shapes.params, shapes.frozen))
    state = jax.jit(make, out_shardings=state_shardings(shapes, rules, mesh))(params)
    step = make_train_step(
        stage, optimizer, lambda i: 1.0, mesh, seed=made.seed, micro_batches=made.micro_batches
    )
    return jax.jit(step), state, mesh


def stage_of(of=None, **changes):
    """The stage alone, on one device."""
    return Generative(recipe(**changes), of or model(), make_mesh(**ONE, devices=jax.devices()[:1]))


def host(tree):
    """A tree on the host."""
    return jax.tree.map(np.asarray, tree)


def globals_of(batch, mesh):
    """A batch on the mesh."""
    return to_global(batch, mesh, len(batch["valid"]))
