"""How parity tests compare: relative to the largest value, gradients under their Hugging Face names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
import torch

from vlmjax.hub import folder, table
from vlmjax.losses.contrastive import info_nce


def compiled(function: Any) -> Any:
    """Compile once, cheaply: these functions are called once, and compiling is most of what a test costs."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def forward(model: Any, params: Any, inputs: dict[str, np.ndarray]) -> Any:
    """Our model's outputs, compiled as a whole."""
    return compiled(lambda params, inputs: model.apply({"params": params}, **inputs))(params, inputs)


def run_exported(cls: Any, path: Any, inputs: dict[str, np.ndarray]) -> Any:
    """What transformers makes of a folder of ours, which must fit without a word."""
    loaded, info = cls.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return loaded.eval()(**tiny.to_torch(inputs))


def check_clip_outputs(out: Any, expected: Any) -> None:
    """Compare every output of a dual encoder."""
    for tower in ("vision_model_output", "text_model_output"):
        close(getattr(out, tower).last_hidden_state, getattr(expected, tower).last_hidden_state, what=tower)
    for field in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        close(getattr(out, field), getattr(expected, field), what=field)


def check_clip_gradients(model: Any, params: Any, reference: Any, inputs: dict[str, np.ndarray]) -> None:
    """Compare the contrastive loss and the gradient of every parameter."""

    def loss(params: Any) -> Any:
        out = model.apply({"params": params}, **inputs)
        return info_nce(out.image_embeds, out.text_embeds, jnp.exp(params["logit_scale"]))[0]

    value, grads = compiled(jax.value_and_grad(loss))(params)
    reference.zero_grad()
    expected = reference(**tiny.to_torch(inputs), return_loss=True).loss
    expected.backward()
    close(value, expected)
    assert gradients(model, grads, reference) == len(list(reference.parameters()))


def close(ours: Any, theirs: Any, tolerance: float = 1e-4, what: str = "") -> None:
    """Assert that two arrays differ nowhere by more than `tolerance` of the largest expected value."""
    theirs = theirs.detach().numpy() if hasattr(theirs, "detach") else np.asarray(theirs)
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape, f"{what}: {ours.shape} against {theirs.shape}"
    scale = float(np.abs(theirs).max())
    worst = float(np.abs(ours - theirs).max())
    assert worst <= tolerance * scale, f"{what}: off by {worst:.3g} where the largest value is {scale:.3g}"


def gradients(
    model: Any, ours: dict[str, Any], reference: Any, tolerance: float = 1e-4, *, turned: bool = False
) -> int:
    """Compare the gradients of all parameters, mapped through the table; return how many tensors were compared.

    `turned` says that keys are turned by their positions, so that their bias does have a gradient.
    """
    family = folder.family_of(model)
    tensors = table.write(family.rows(model), ours, folder.abstract_params(family, model))
    theirs = dict(reference.named_parameters())
    names = family.names.resolve(list(theirs))
    assert set(names) == set(tensors)
    for name, tensor in tensors.items():
        grad = theirs[names[name]].grad
        if name.endswith(("k_proj.bias", "key.bias")) and not turned:
            # It adds the same to every score of a query, so its true gradient is 0: measure by the query's.
            sibling = names[name.replace("k_proj", "q_proj").replace("key", "query")]
            limit = tolerance * float(theirs[sibling].grad.abs().max())
            assert max(np.abs(tensor.make()).max(), float(grad.abs().max())) <= limit, name
        else:
            assert float(grad.abs().max()) > 1e-7, f"{name}: the reference gradient is zero"
            close(tensor.make(), grad, tolerance, name)
    return len(tensors)
