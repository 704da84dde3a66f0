"""`python -m vlmjax.hub.llama2c MODEL.bin TOKENIZER.bin OUT`: a checkpoint of karpathy/llama2.c as an HF folder.

Its models are trained Llamas small enough for a laptop (260 thousand to 110 million parameters). Format: the functions
that read and write it in llama2.c (run.c, export.py legacy_export, tokenizer.py export), all numbers little-endian.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from vlmjax.errors import HubError, UserError

_FIELDS = ("width", "mlp_dim", "depth", "heads", "kv_heads", "vocab_size", "max_length")
BOS, EOS = 1, 2


def read_model(file: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Sizes, and arrays by their names there: [layers, out, in] for matrices. Raises HubError for another file."""
    data = file.read_bytes()
    if len(data) < 4 * len(_FIELDS):
        raise HubError(f"{file}: {len(data)} bytes are too few for a llama2.c checkpoint")
    sizes = dict(zip(_FIELDS, np.frombuffer(data, "<i4", len(_FIELDS)).tolist(), strict=True))
    tied, sizes["vocab_size"] = sizes["vocab_size"] > 0, abs(sizes["vocab_size"])
    d, m, n, v = sizes["width"], sizes["mlp_dim"], sizes["depth"], sizes["vocab_size"]
    if min(sizes.values()) < 1 or d % sizes["heads"] or sizes["heads"] % sizes["kv_heads"]:
        raise HubError(
            f"{file}: begins with {tuple(sizes.values())}, which are no sizes of a Llama in llama2.c's form"
        )
    head = d // sizes["heads"]
    kv = head * sizes["kv_heads"]
    shapes = {
        "tok_emb": (v, d), "rms_att": (n, d), "wq": (n, d, d), "wk": (n, kv, d), "wv": (n, kv, d), "wo": (n, d, d),
        "rms_ffn": (n, d), "w1": (n, m, d), "w2": (n, d, m), "w3": (n, m, d), "rms_final": (d,),
        "freqs": (2, sizes["max_length"], head // 2),
    } | ({} if tied else {"head": (v, d)})  # fmt: skip
    numbers = np.frombuffer(data[: len(data) // 4 * 4], "<f4", offset=4 * len(_FIELDS))
    wanted = sum(int(np.prod(shape)) for shape in shapes.values())
    if len(numbers) != wanted or len(data) % 4:
        raise HubError(
            f"{file}: holds {len(numbers)} numbers after its sizes {tuple(sizes.values())}, expected {wanted}"
        )
    arrays, at = {}, 0
    for name, shape in shapes.items():
        count = int(np.prod(shape))
        arrays[name] = numbers[at : at + count].reshape(shape)
        at += count
    return sizes, arrays


def half_split(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of [layers, out, in] from neighbours that turn together to the halves of a head that do in our Rope."""
    layers, rows, width = matrix.shape
    pairs = matrix.reshape(layers, heads, rows // heads // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(layers, rows, width)


def to_params(sizes: dict[str, int], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of our Decoder."""

    def kernel(name: str, heads: int = 0) -> dict[str, np.ndarray]:
        matrix = half_split(arrays[name], heads) if heads else arrays[name]
        return {"kernel": matrix.swapaxes(1, 2)}

    params = {
        "token_embedding": arrays["tok_emb"],
        "norm": {"scale": arrays["rms_final"]},
        "layers": {
            "attention_norm": {"scale": arrays["rms_att"]},
            "mlp_norm": {"scale": arrays["rms_ffn"]},
            "self_attn": {
                "q_proj": kernel("wq", sizes["heads"]),
                "k_proj": kernel("wk", sizes["kv_heads"]),
                "v_proj": kernel("wv"),
                "o_proj": kernel("wo"),
            },
            "mlp": {"gate_proj": kernel("w1"), "up_proj": kernel("w3"), "down_proj": kernel("w2")},
        },
    }
    return params if "head" not in arrays else {**params, "lm_head": arrays["head"]}


def read_vocabulary(file: Path) -> tuple[list[str], list[float]]:
    """Pieces, with a mark for a space, and their scores. Raises HubError for another file."""
    data, at, pieces, scores = file.read_bytes(), 4, [], []
    while at < len(data):
        if at + 8 > len(data):
            raise HubError(f"{file}: ends within a token; expected a tokenizer of llama2.c")
        scores.append(float(np.frombuffer(data, "<f4", 1, at)[0]))
        length = int(np.frombuffer(data, "<i4", 1, at + 4)[0])
        if length < 0 or at + 8 + length > len(data):
            raise HubError(
                f"{file}: token {len(pieces)} has a length of {length} bytes; it is no tokenizer of llama2.c"
            )
        pieces.append(data[at + 8 : at + 8 + length].decode("utf-8", "replace").replace(" ", "▁"))
        at += 8 + length
    if len(pieces) < 259:
        raise HubError(f"{file}: has {len(pieces)} tokens; three special ones and 256 bytes are the least")
    return pieces, scores


def to_tokenizer(pieces: list[str], scores: list[float]) -> Any:
    """The same as a `tokenizers` BPE: pairs are joined in the order of the scores of what they make."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    pieces = ["<unk>", "<s>", "</s>", *pieces[3:]]
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i in range(259, len(pieces)):
        splits = ((pieces[i][:cut], pieces[i][cut:]) for cut in range(1, len(pieces[i])))
        merges += [(scores[i], pair) for pair in splits if pair[0] in ids and pair[1] in ids]
    merges.sort(key=lambda merge: -merge[0])
    tokenizer = Tokenizer(
        models.BPE(ids, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", BOS)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def convert(model: Path, tokenizer: Path, out: Path) -> None:
    """Write a folder that vlmjax and transformers load. Raises HubError for files that are something else."""
    from vlmjax import hub
    from vlmjax.models.decoder import Decoder, DecoderConfig
    from vlmjax.ops.rotary import Rope

    sizes, arrays = read_model(model)
    pieces, scores = read_vocabulary(tokenizer)
    if len(pieces) != sizes["vocab_size"]:
        raise HubError(
            f"{tokenizer} has {len(pieces)} tokens, {model} embeds {sizes['vocab_size']}: they do not belong together"
        )
    config = DecoderConfig(
        **sizes,
        head_dim=sizes["width"] // sizes["heads"],
        rope=Rope(10000.0),
        tied="head" not in arrays,
        bos_token_id=BOS,
        eos_token_ids=(EOS,),
    )
    hub.save(Decoder(config), to_params(sizes, arrays), out)
    to_tokenizer(pieces, scores).save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": sizes["max_length"],
    }
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """The command; user errors end as one line."""
    parser = argparse.ArgumentParser("python -m vlmjax.hub.llama2c", description=__doc__)
    for name in ("model", "tokenizer", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    try:
        for file in (options.model, options.tokenizer):
            if not file.is_file():
                raise HubError(f"{file}: no such file")
        convert(options.model, options.tokenizer, options.out)
        print(f"wrote {options.out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
