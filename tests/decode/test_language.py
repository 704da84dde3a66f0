"""What generation asks of a model: a composed one with images, and a real trained one that tells a story."""

import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vlmjax import decode
from vlmjax.decode.language import language_of, prefill
from vlmjax.decode.streaming import words
from vlmjax.models.decoder import Decoder, DecoderConfig, text_positions

CONFIG = DecoderConfig(16, 2, 2, 1, 8, 24, 40, init_std=0.5)
IMAGE = 39


class Sees(nn.Module):
    """A decoder whose tokens 39 are projected patches, one after another."""

    def setup(self):
        self.decoder = Decoder(CONFIG)
        self.bridge = nn.Dense(CONFIG.width)

    def prepare(self, input_ids, attention_mask, pixel_values):
        patches = self.bridge(pixel_values)
        place = jnp.maximum(jnp.cumsum(input_ids == IMAGE, axis=1) - 1, 0)
        seen = jnp.take_along_axis(patches, place[:, :, None], axis=1)
        embedded = jnp.where((input_ids == IMAGE)[:, :, None], seen, self.decoder.embed(input_ids))
        return embedded, text_positions(attention_mask), attention_mask

    def whole(self, **inputs):
        embedded, positions, segments = self.prepare(**inputs)
        return self.decoder.logits(self.decoder(embedded, positions=positions, segment_ids=segments)[0])


def batch():
    rng = np.random.default_rng(0)
    ids = rng.integers(3, 30, (2, 6)).astype(np.int32)
    ids[0, 1:3] = ids[1, 3:5] = IMAGE
    mask = np.array([[1] * 6, [0, 0, 1, 1, 1, 1]], np.int32)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": rng.normal(size=(2, 2, 5)).astype(np.float32),
    }


def test_a_model_with_images_needs_no_more_than_prepare_and_a_decoder():
    model, inputs = Sees(), batch()
    params = jax.jit(lambda inputs: model.init(jax.random.key(1), **inputs, method="whole"))(inputs)["params"]
    found = np.asarray(decode.generate(model, params, max_new_tokens=4, **inputs))
    grown = dict(inputs)
    for name, more in (("input_ids", found[:, :-1]), ("attention_mask", np.ones((2, 3), np.int32))):
        grown[name] = np.concatenate([inputs[name], more], axis=1)
    whole = jax.jit(lambda inputs: model.apply({"params": params}, **inputs, method="whole"))
    np.testing.assert_array_equal(np.asarray(whole(grown)).argmax(-1)[:, -4:], found)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert (np.asarray(decode.generate(model, params, max_new_tokens=4, **other)) != found).any()


def test_new_tokens_stand_after_the_largest_position_of_any_axis():
    class Turned(nn.Module):
        """Positions of three axes, as M-RoPE has them: an image's rows and columns count less than its tokens."""

        def setup(self):
            self.decoder = Decoder(CONFIG)

        def prepare(self, input_ids, attention_mask):
            flat = text_positions(attention_mask)
            return (
                self.decoder.embed(input_ids),
                jnp.stack([flat // 2, flat // 3, flat // 5], -1),
                attention_mask,
            )

    class Language(type(language_of(Turned()))):
        def run(self, params, prompt, cache):
            return super().run(params, prompt._replace(positions=prompt.positions[..., 0]), cache)

    inputs = {name: jnp.asarray(batch()[name]) for name in ("input_ids", "attention_mask")}
    model = Turned()
    decoder = Decoder(CONFIG)

    @jax.jit
    def positions(inputs):
        params = decoder.init(jax.random.key(0), input_ids=inputs["input_ids"], method="causal_lm")["params"]
        return prefill(Language(model), {"decoder": params}, inputs, 4).positions

    np.testing.assert_array_equal(positions(inputs), [3, 2])


# ---- a real model: karpathy/tinyllamas' stories260K, in llama2.c's layout


def stories(path):
    data = path.read_bytes()
    width, mlp, depth, heads, kv_heads, vocab, length = struct.unpack("7i", data[:28])
    numbers, at = np.frombuffer(data[28:], np.float32), 0

    def take(*shape):
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].reshape(shape)

    def halves(kernel, count):
        """Rows that turn as neighbours, to rows that turn as halves of a head."""
        split = kernel.reshape(depth, count, -1, 2, width)
        return split.swapaxes(2, 3).reshape(depth, -1, width)

    config = DecoderConfig(width, depth, heads, kv_heads, width // heads, mlp, vocab, length, tied=True)
    embedding, attention_norm, kv = take(vocab, width), take(depth, width), kv_heads * width // heads
    q, k = halves(take(depth, width, width), heads), halves(take(depth, kv, width), kv_heads)
    v, o, mlp_norm = take(depth, kv, width), take(depth, width, width), take(depth, width)
    gate, down, up = take(depth, mlp, width), take(depth, width, mlp), take(depth, mlp, width)
    kernels = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}
    layers = {
        "self_attn": {name: {"kernel": kernel.swapaxes(1, 2)} for name, kernel in kernels.items()},
        "mlp": {
            name: {"kernel": kernel.swapaxes(1, 2)}
            for name, kernel in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))
        },
        "attention_norm": {"scale": attention_norm},
        "mlp_norm": {"scale": mlp_norm},
    }
    params = {"token_embedding": embedding, "norm": {"scale": take(width)}, "layers": layers}
    return Decoder(config), jax.device_put(params)


def vocabulary(path):
    data, at, out = path.read_bytes(), 4, []
    while at < len(data):
        size = struct.unpack("i", data[at + 4 : at + 8])[0]
        out.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return out


def test_a_trained_model_tells_its_story(shared_path):
    model, params = stories(shared_path("data/stories260k/stories260K.bin"))
    pieces = vocabulary(shared_path("data/stories260k/tok512.bin"))
    ids = np.array([[1]], np.int32)
    rows = decode.stream(model, params, max_new_tokens=60, eos_token_id=[1, 2], input_ids=ids)
    text = "".join(
        words((int(row[0]) for row in rows), lambda ids: b"".join(pieces[i] for i in ids).decode(), ["!"])
    )
    assert text.startswith(
        " Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
    start = [403, 407, 261, 378, 432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267]
    whole = decode.generate(model, params, max_new_tokens=19, input_ids=ids)
    assert whole[0].tolist() == start
