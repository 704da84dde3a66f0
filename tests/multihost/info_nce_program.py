"""InfoNCE with its gradients on a fixed batch, by any number of processes; process 0 writes the result."""

import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmjax.losses.contrastive import Teacher, info_nce
from vlmjax.sharding import distributed
from vlmjax.sharding.mesh import local_rows, make_mesh, replicated, to_global

BATCH, WIDTH = 32, 12


def global_batch():
    """The whole batch in numpy, with invalid rows, repeated ids and a teacher."""
    rng = np.random.default_rng(0)
    names = ("images", "texts", "teacher_images", "teacher_texts")
    batch = {name: rng.normal(size=(BATCH, WIDTH)).astype(np.float32) for name in names}
    batch = {name: x / np.linalg.norm(x, axis=1, keepdims=True) for name, x in batch.items()}
    return batch | {"valid": rng.random(BATCH) < 0.9, "ids": rng.integers(0, 25, BATCH).astype(np.uint32)}


def compute(mesh):
    """Loss, accuracies and gradients as numpy arrays, each process supplying its own rows."""
    rows = local_rows(mesh, BATCH)
    local = {name: value[rows.start : rows.stop] for name, value in global_batch().items()}
    batch = to_global(local, mesh, BATCH)

    def loss(images, texts, scale, batch):
        teacher = Teacher(batch["teacher_images"], batch["teacher_texts"], 0.5, 0.3)
        return info_nce(
            images,
            texts,
            scale,
            mesh=mesh,
            valid=batch["valid"],
            positive_ids=batch["ids"],
            label_smoothing=0.1,
            teacher=teacher,
        )

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    scale = jax.device_put(np.float32(8), replicated(mesh))
    (value, metrics), gradients = step(batch["images"], batch["texts"], scale, batch)
    names = ("d_images", "d_texts", "d_scale")
    result = {"loss": value, **metrics, **dict(zip(names, gradients, strict=True))}
    return {name: np.asarray(multihost_utils.process_allgather(x, tiled=True)) for name, x in result.items()}


if __name__ == "__main__":
    distributed.initialize()
    found = compute(make_mesh(fsdp=2))
    print(
        "processes",
        jax.process_count(),
        "devices",
        jax.device_count(),
        "rows",
        local_rows(make_mesh(), BATCH),
    )
    if jax.process_index() == 0:
        np.savez(sys.argv[1], **found)
