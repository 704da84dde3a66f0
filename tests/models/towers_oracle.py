"""The towers written out in numpy: float64, one layer after the other, one head at a time, no batching tricks."""

import math

import numpy as np

ACTIVATIONS = {
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


def doubles(tree):
    """A parameter tree as float64 numpy arrays."""
    if isinstance(tree, dict):
        return {name: doubles(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)


def layer(tree, index):
    """One layer's parameters out of the stacked ones."""
    if isinstance(tree, dict):
        return {name: layer(value, index) for name, value in tree.items()}
    return tree[index]


def norm(p, x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attend(q, k, v, heads, allowed):
    """Attention of one example: q, k, v [tokens, width], allowed [queries, keys]; nothing allowed gives zeros."""
    out, dim = np.zeros_like(q), q.shape[1] // heads
    for head in range(heads):
        part = slice(head * dim, (head + 1) * dim)
        for i in range(len(q)):
            seen = np.flatnonzero(allowed[i])
            if len(seen):
                scores = k[seen, part] @ q[i, part] / math.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[i, part] = weights @ v[seen, part] / weights.sum()
    return out


def pre_norm_block(p, x, cfg, allowed):
    y, a = norm(p["layer_norm1"], x, cfg.layer_norm_eps), p["self_attn"]
    mixed = attend(*(dense(a[n], y) for n in ("q_proj", "k_proj", "v_proj")), cfg.heads, allowed)
    x = x + dense(a["out_proj"], mixed)
    y = norm(p["layer_norm2"], x, cfg.layer_norm_eps)
    return x + dense(p["mlp"]["fc2"], ACTIVATIONS[cfg.activation](dense(p["mlp"]["fc1"], y)))


def vit(p, cfg, image):
    """(last hidden state, pooled) of one image at the configured size."""
    emb, size, tokens = p["embeddings"], cfg.patch_size, []
    rows, columns = cfg.grid
    for r in range(rows):
        for c in range(columns):
            patch = image[r * size : (r + 1) * size, c * size : (c + 1) * size]
            tokens.append(patch.reshape(-1) @ emb["patch_embedding"]["kernel"])
    x = np.stack([emb["class_embedding"], *tokens]) + emb["position_embedding"]
    x = norm(p["pre_layernorm"], x, cfg.layer_norm_eps)
    for index in range(cfg.depth):
        x = pre_norm_block(layer(p["encoder"]["layers"], index), x, cfg, np.ones((len(x), len(x)), bool))
    return x, norm(p["post_layernorm"], x[0], cfg.layer_norm_eps)


def text(p, cfg, ids, kept):
    """Last hidden state of one text; `kept` is its attention mask."""
    x = p["embeddings"]["token_embedding"][ids] + p["embeddings"]["position_embedding"][: len(ids)]
    allowed = np.tril(np.ones((len(ids), len(ids)), bool)) & (kept[None, :] != 0)
    for index in range(cfg.depth):
        x = pre_norm_block(layer(p["encoder"]["layers"], index), x, cfg, allowed)
    return norm(p["final_layer_norm"], x, cfg.layer_norm_eps)


def bert(p, cfg, ids, kept, types):
    """(last hidden state, pooled) of one text."""
    emb, eps = p["embeddings"], cfg.layer_norm_eps
    x = (
        emb["word_embeddings"][ids]
        + emb["position_embeddings"][: len(ids)]
        + emb["token_type_embeddings"][types]
    )
    x = norm(emb["LayerNorm"], x, eps)
    allowed = np.broadcast_to(kept[None, :] != 0, (len(ids), len(ids)))
    for index in range(cfg.depth):
        q = layer(p["encoder"]["layer"], index)
        own, end = q["attention"]["self"], q["attention"]["output"]
        mixed = attend(*(dense(own[n], x) for n in ("query", "key", "value")), cfg.heads, allowed)
        x = norm(end["LayerNorm"], dense(end["dense"], mixed) + x, eps)
        hidden = ACTIVATIONS[cfg.activation](dense(q["intermediate"]["dense"], x))
        x = norm(q["output"]["LayerNorm"], dense(q["output"]["dense"], hidden) + x, eps)
    return x, np.tanh(dense(p["pooler"]["dense"], x[0]))
