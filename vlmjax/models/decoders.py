"""Language models by name: the shape of each as its own config.json on the Hugging Face hub gives it."""

from vlmjax.models.decoder import DecoderConfig
from vlmjax.ops.rotary import Rope


def _llama2(width: int, depth: int, heads: int, mlp_dim: int) -> DecoderConfig:
    """Llama 2 (arXiv:2307.09288): as many heads of keys as of queries. Vicuna v1.5 is one of these."""
    return DecoderConfig(width, depth, heads, heads, 128, mlp_dim, vocab_size=32000)


def _llama3(rope: Rope, max_length: int) -> DecoderConfig:
    """Llama 3 of 8B (arXiv:2407.21783)."""
    return DecoderConfig(
        *(4096, 32, 32, 8, 128, 14336),
        vocab_size=128256,
        max_length=max_length,
        rope=rope,
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


def _qwen2(width: int, depth: int, heads: tuple[int, int, int], mlp_dim: int, **sizes) -> DecoderConfig:
    """Qwen2 (arXiv:2407.10671): biases on q, k and v alone. `heads` are those of queries, of keys, and their width."""
    return DecoderConfig(
        *(width, depth, *heads, mlp_dim),
        max_length=131072,
        rope=Rope(theta=1e6),
        norm_eps=1e-6,
        qkv_bias=True,
        family="qwen2",
        bos_token_id=151643,
        eos_token_ids=(151643,),
        **sizes,
    )


def _opt(width: int, depth: int, heads: int, **changes) -> DecoderConfig:
    """OPT (arXiv:2205.01068): learned positions, biases everywhere, ReLU, the head tied to the embedding."""
    return DecoderConfig(
        *(width, depth, heads, heads, width // heads, 4 * width),
        vocab_size=50272,
        max_length=2048,
        rope=None,
        norm="layer",
        activation="relu",
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
        bos_token_id=2,
        eos_token_ids=(2,),
        pad_token_id=1,
        family="opt",
        **changes,
    )


DECODERS: dict[str, DecoderConfig] = {
    "llama2-7b": _llama2(4096, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 13824),
    "llama3-8b": _llama3(Rope(theta=5e5), max_length=8192),
    "llama3.1-8b": _llama3(Rope(theta=5e5, scaling="llama3", factor=8.0), max_length=131072),
    "mistral-7b": DecoderConfig(
        *(4096, 32, 32, 8, 128, 14336), vocab_size=32000, max_length=32768, window=4096, family="mistral"
    ),  # v0.1; later versions have no window and theta 1e6
    "qwen2-0.5b": _qwen2(896, 24, (14, 2, 64), 4864, vocab_size=151936, tied=True),
    "qwen2-1.5b": _qwen2(1536, 28, (12, 2, 128), 8960, vocab_size=151936, tied=True),
    "qwen2-7b": _qwen2(3584, 28, (28, 4, 128), 18944, vocab_size=152064),
    "opt-350m": _opt(1024, 24, 16, embed_dim=512, pre_norm=False, final_norm=False),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
}
