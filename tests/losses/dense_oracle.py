"""Contrastive losses from their definitions in float64, every pair written down, gradients by differentiation."""

import jax
import jax.numpy as jnp
import numpy as np


def info_nce_oracle(
    images, texts, scale, *, ids=None, valid=None, smoothing=0.0, teacher=None, hardness=0.0, memory=None
):
    """(loss, accuracies, gradients of images, texts, scale) in float64."""
    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(np.asarray(x, np.float64))  # noqa: E731
        n = len(images)
        ids = np.arange(n) if ids is None else np.asarray(ids, np.int64)
        valid = np.ones(n, bool) if valid is None else np.asarray(valid)
        options = (ids, valid, smoothing, teacher, hardness, memory)
        loss = lambda *a: _symmetric(*a, *options)  # noqa: E731
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        (value, right), gradients = step(wide(images), wide(texts), wide(scale))
        return jax.tree.map(np.asarray, (value, right, gradients))


def _symmetric(images, texts, scale, ids, valid, smoothing, teacher, hardness, memory):
    wide = lambda x: jnp.asarray(np.asarray(x, np.float64))  # noqa: E731
    count, total, right = float(valid.sum()), 0.0, []
    for forth in (True, False):
        queries, keys = (images, texts) if forth else (texts, images)
        key_ids, known = ids, valid
        if teacher is not None:
            query_teacher, key_teacher = teacher[:2] if forth else teacher[1::-1]
        if memory is not None:
            own = (memory.text_keys, memory.text_queue) if forth else (memory.image_keys, memory.image_queue)
            own = (own[0], np.reshape(own[1], (-1, images.shape[1])))
            keys = jnp.concatenate([wide(x) for x in own])
            plain = len(set(ids)) == len(ids)
            queue_ids = (
                -1 - np.arange(len(own[1])) if plain else np.asarray(memory.queue_ids, np.int64).ravel()
            )
            key_ids = np.concatenate([ids, queue_ids])
            known = np.concatenate([valid, np.asarray(memory.queue_valid).ravel()])
            if teacher is not None:
                key_teacher = np.concatenate([key_teacher, own[1]])
        positive = (ids[:, None] == key_ids[None, :]) & known[None, :]
        negative = ~positive & known[None, :]
        scores = scale * queries @ keys.T
        target = (1 - smoothing) * positive / positive.sum(1, keepdims=True).clip(1)
        target = target + smoothing * known[None, :] / known.sum()
        if teacher is not None:
            taught = wide(query_teacher) @ wide(key_teacher).T / teacher[2]
            taught = jax.nn.softmax(jnp.where(known[None, :], taught, -jnp.inf), 1)
            target = (1 - teacher[3]) * target + teacher[3] * taught
        weights = jnp.where(negative, jnp.exp(hardness * (scores - scores.max())), 0.0)
        weights = weights / weights.sum(1, keepdims=True) * negative.sum(1, keepdims=True).astype(float)
        counted = jnp.where(negative, jnp.log(jnp.where(negative, weights, 1.0)) + scores, -jnp.inf)
        counted = jnp.where(positive, scores, counted)
        losses = jax.nn.logsumexp(counted, 1) - (target * scores).sum(1)
        total += jnp.where(valid, losses, 0.0).sum()
        best = [jnp.where(these, scores, -jnp.inf).max(1) for these in (positive, negative)]
        right.append(jnp.where(valid, best[0] > best[1], False).sum().astype(float) / count)
    return total / (2 * count), tuple(right)


def sigmoid_oracle(images, texts, scale, bias, *, ids=None, valid=None):
    """(loss, accuracies, gradients of images, texts, scale, bias) in float64; a row's own pair is its positive."""
    with jax.enable_x64(True):
        n = len(images)
        ids = np.arange(n) if ids is None else np.asarray(ids)
        valid = np.ones(n, bool) if valid is None else np.asarray(valid)
        known = valid[:, None] & valid[None, :]
        positive = ids[:, None] == ids[None, :]

        def loss(images, texts, scale, bias):
            pairs = -jax.nn.log_sigmoid(np.where(positive, 1.0, -1.0) * (scale * images @ texts.T + bias))
            return jnp.where(known, pairs, 0.0).sum() / float(valid.sum())

        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (images, texts, scale, bias)]
        value, gradients = jax.tree.map(np.asarray, jax.value_and_grad(loss, argnums=(0, 1, 2, 3))(*wide))
        scores = np.asarray(images, np.float64) @ np.asarray(texts, np.float64).T
        best = [np.where(known & ~positive, x, -np.inf).max(1) for x in (scores, scores.T)]
        right = tuple((np.diag(scores) > other)[valid].sum() / valid.sum() for other in best)
        return value, right, gradients
