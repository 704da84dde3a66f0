"""The models of CapFilt: one that writes captions, one that says what fits an image, CLIP to rank; on all devices."""

import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vlmjax.data.captions import cleaned
from vlmjax.data.formats.fields import parse_json
from vlmjax.data.images import decode
from vlmjax.errors import BadRecord, DataError
from vlmjax.evals.embed import text_features
from vlmjax.evals.writing import Writer, until
from vlmjax.models.blip_inputs import caption_prompt
from vlmjax.ops.pixels import normalized
from vlmjax.sharding.activations import on_mesh
from vlmjax.sharding.mesh import batch_shards, make_mesh, replicated, to_global

Pixels = UInt8[np.ndarray, "images height width 3"]


class Opened:
    """A model read from a folder, its parameters on every device of this process."""

    def __init__(self, folder: str, needs: Sequence[str], what: str, batch_size: int):
        """Read it. Raises UserError for a folder that is none, or DataError for a model without the methods `needs`."""
        from vlmjax.evaluate import read_clean, read_model

        self.model, params, self.tokenizer, self.transform = read_model(folder)
        self.clean = read_clean(folder)
        lacking = [name for name in needs if not hasattr(self.model, name)]
        if lacking:
            raise DataError(
                f"--model={folder}: {type(self.model).__name__} has no {lacking[0]}; this step needs {what}"
            )
        if self.tokenizer is None or self.transform is None:
            raise DataError(
                f"--model={folder}: has no tokenizer or no image processor; save the model with both"
            )
        self.mesh = make_mesh()
        shards = batch_shards(self.mesh)
        self.batch_size = -(-batch_size // shards) * shards
        self.params = jax.device_put(params, replicated(self.mesh))

    def pixels(self, image: Any) -> np.ndarray:
        """An image as the model takes it, not normalised yet. Raises BadRecord."""
        return self.transform(decode(image, background=self.transform.background))


class Captioner(Opened):
    """Writes captions, by nucleus sampling or with beams (2201.12086, section 3.3: sampled ones teach more)."""

    def __init__(
        self,
        folder: str,
        *,
        prompt: str = "a picture of ",
        number: int = 1,
        top_p: float = 0.9,
        num_beams: int = 1,
        min_new_tokens: int = 1,
        max_new_tokens: int = 16,
        seed: int = 0,
        batch_size: int = 64,
    ):
        """Read the model. `number` captions of each image are drawn; with beams there is one."""
        super().__init__(folder, ("decode_text",), "a model that writes captions (BLIP)", batch_size)
        if num_beams > 1 and number > 1:
            raise DataError(
                f"--number={number} with --num_beams={num_beams}: beams give one caption; leave one out"
            )
        config = self.model.config
        self._end, self._prompt = config.sep_token_id, caption_prompt(prompt, self.tokenizer, config)
        self._writer = Writer(self.model, self.transform, self.mesh)
        self._number, self._seed, self._beams = number, seed, num_beams > 1
        drawn = {"do_sample": True, "top_p": top_p} if num_beams == 1 else {"num_beams": num_beams}
        self._options = {
            **drawn, "max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "ends": (self._end,),
            "pad": config.text.pad_token_id,
        }  # fmt: skip

    def __call__(self, keys: Sequence[str], pixels: Pixels) -> list[list[str]]:
        """Captions of each image, distinct ones; what is drawn depends on its key and the seed alone."""
        out: list[list[str]] = [[] for _ in keys]
        named = [[f"{self._seed}|{number}|{key}" for number in range(self._number)] for key in keys]
        seeds = np.array([[zlib.crc32(name.encode()) for name in own] for own in named], np.uint32)
        for start in range(0, len(keys), self.batch_size):
            rows = slice(start, start + self.batch_size)
            tokens = self._writer(
                self.params,
                [self._prompt] * self.batch_size,
                len(self._prompt),
                filled(pixels[rows], self.batch_size),
                self.batch_size,
                seeds=None if self._beams else filled(seeds[rows], self.batch_size),
                **self._options,
            )
            for drawn in [tokens] if self._beams else tokens:
                for own, ids in zip(out[rows], drawn[: len(out[rows])], strict=True):
                    text = " ".join(self.tokenizer.decode(until(ids, (self._end,))).split())
                    own += [text] if text and text not in own else []
        return out


class Scorer(Opened):
    """How well texts fit images: BLIP's probability of a match and its cosine, or a dual encoder's cosine alone."""

    def __init__(self, folder: str, *, matching: bool, batch_size: int = 64):
        """Read the model, which has to have a matching head with `matching`."""
        needs = ("encode_image", "encode_text", *(["match"] if matching else []))
        what = "a model with a matching head (BLIP)" if matching else "a dual encoder (CLIP, BLIP)"
        super().__init__(folder, needs, what, batch_size)

        @on_mesh(self.mesh)
        def scores(params: Any, pixels: Array, ids: Array, mask: Array) -> Float[Array, "pairs 2"]:
            def both(module: Any) -> Array:
                states = module.encode_image(normalized(pixels, self.transform.mean, self.transform.std))
                images = module.embed_image(states) if hasattr(module, "embed_image") else states
                cosine = (images * text_features(module, ids, mask)).sum(-1)
                match = jax.nn.softmax(module.match(states, ids, mask))[:, 1] if matching else cosine
                return jnp.stack([match, cosine], axis=-1)

            return self.model.apply({"params": params}, method=both).astype(jnp.float32)

        self._scores = jax.jit(scores, out_shardings=replicated(self.mesh))

    def __call__(self, pixels: Pixels, texts: Sequence[Sequence[str]]) -> list[list[tuple[float, float]]]:
        """(probability of a match, cosine) of each text of each image; twice the cosine without a matching head."""
        pairs = [(image, text) for image, own in enumerate(texts) for text in own]
        found: list[list[tuple[float, float]]] = [[] for _ in texts]
        for start in range(0, len(pairs), self.batch_size):
            part = pairs[start : start + self.batch_size]
            tokens = self.tokenizer([cleaned(text, self.clean) for _, text in part])
            local = {
                "pixels": filled(pixels[[image for image, _ in part]], self.batch_size),
                "ids": filled(tokens["input_ids"], self.batch_size),
                "mask": filled(tokens["attention_mask"], self.batch_size),
            }
            scores = np.asarray(self._scores(self.params, **to_global(local, self.mesh, self.batch_size)))
            for (image, _), (match, cosine) in zip(part, scores[: len(part)].tolist(), strict=True):
                found[image].append((match, cosine))
        return found


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows repeated from the first on up to a whole batch."""
    return rows[np.arange(size) % len(rows)]


def readable(opened: Opened, records: Sequence[Any]) -> tuple[list[int], Pixels, dict[int, BadRecord]]:
    """Which records have an image that can be read, their pixels, and why the others have none."""
    good, pixels, bad = [], [], {}
    for at, record in enumerate(records):
        try:
            if record.parts or "images" in record.extra:
                raise BadRecord("several_images", record.key, "captions are of one image")
            if "json" in record.extra:
                parse_json(record.extra["json"], record.key)
            pixels.append(opened.pixels(record.image))
            good.append(at)
        except BadRecord as error:
            bad[at] = error
    return good, np.stack(pixels) if pixels else np.zeros((0, 1, 1, 3), np.uint8), bad
