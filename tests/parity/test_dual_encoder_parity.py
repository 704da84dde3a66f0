"""VisionTextDualEncoderModel of CLIP's image tower and BERT: outputs, loss and all gradients."""

import pytest

pytest.importorskip("torch")

import numpy as np
import tiny
import torch
import transformers
from compare import check_clip_gradients, check_clip_outputs, close, forward, run_exported

from vlmjax import hub


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    reference = tiny.dual_encoder()
    return reference, *hub.load(tiny.folder_of(reference, tmp_path_factory.mktemp("dual")))


@pytest.fixture(scope="module")
def inputs():
    ids, mask = tiny.texts(5, 18, 83, eos=4)
    words = {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids % 3).astype(np.int32)}
    return {"pixel_values": tiny.pixels(5, 42, 42)} | words


def test_outputs_here_and_of_the_exported_folder(pair, inputs, tmp_path):
    reference, model, params = pair
    with torch.no_grad():
        expected = reference(**tiny.to_torch(inputs))
    ours = forward(model, params, inputs)
    check_clip_outputs(ours, expected)
    hub.save(model, params, tmp_path)
    for cls in (transformers.VisionTextDualEncoderModel, transformers.AutoModel):
        theirs = run_exported(cls, tmp_path, inputs)
        for field in ("image_embeds", "text_embeds", "logits_per_image"):
            close(getattr(theirs, field), getattr(ours, field), 1e-5, field)


def test_loss_and_every_gradient(pair, inputs):
    reference, model, params = pair
    check_clip_gradients(model, params, reference, inputs)
