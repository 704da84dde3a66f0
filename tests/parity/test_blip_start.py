"""BLIP begins with transformers' own ViT and BERT: towers, head, and the folders they come in."""

import jax
import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import torch
import transformers
from compare import close, compiled

from vlmjax import hub
from vlmjax.errors import HubError
from vlmjax.hub import vit
from vlmjax.hub.bert_head import load_head
from vlmjax.models.bert import BertConfig
from vlmjax.models.blip import Blip, example_inputs
from vlmjax.models.blip_config import BlipConfig
from vlmjax.models.blip_start import from_towers
from vlmjax.models.med import LanguageHead

VIT = {
    "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 20,
    "patch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("cls", [transformers.ViTModel, transformers.ViTForImageClassification])
def test_the_image_tower(cls, tmp_path):
    """A classifier's folder has a prefix and a head that stays behind."""
    reference = tiny.redraw(cls(transformers.ViTConfig(**VIT)))
    model, params = hub.load(tiny.folder_of(reference, tmp_path / "theirs"), part="image")
    inputs = {"pixel_values": tiny_blip.images(2)}
    tower = getattr(reference, "vit", reference)
    with torch.no_grad():
        expected = tower(**tiny.to_torch(inputs)).last_hidden_state
    found = compiled(lambda p, x: model.apply({"params": p}, **x).last_hidden_state)(params, inputs)
    close(found, expected, 2e-5)
    hub.save(model, params, tmp_path / "ours")
    read = transformers.ViTModel.from_pretrained(tmp_path / "ours", add_pooling_layer=False).eval()
    with torch.no_grad():
        assert torch.equal(read(**tiny.to_torch(inputs)).last_hidden_state, expected)
    theirs = transformers.ViTConfig()
    assert {key: getattr(theirs, key) for key in vit.DEFAULTS} == vit.DEFAULTS


def test_pretraining_begins_with_both(tmp_path):
    bert = tiny.redraw(transformers.BertForPreTraining(transformers.BertConfig(**tiny.BERT)))
    image = tiny.redraw(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    folders = [tiny.folder_of(model, tmp_path / type(model).__name__) for model in (bert, image)]
    (words, text), (tower, pixels) = (hub.load(folder) for folder in folders)
    head = load_head(folders[0])
    sizes = words.config.__dict__ | {"vocab_size": 85, "type_vocab_size": None}
    larger = {**tower.config.__dict__, "image_size": 28}
    config = BlipConfig(type(tower.config)(**larger), BertConfig(**sizes), 10, 83, 84, 7)
    model = Blip(config)
    fresh = model.init(jax.random.key(0), **example_inputs(model))["params"]
    start = from_towers(
        model, fresh, image=(tower.config, pixels), text=(words.config, text), head=head, fold_token_type=True
    )
    ids, mask = tiny.texts(3, 15, 83, eos=4)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        hidden = bert.bert(**tiny.to_torch(inputs)).last_hidden_state
        scores = bert.cls.predictions(hidden)
    found = compiled(lambda p: model.apply({"params": p}, **inputs, method="encode_text"))(start)
    close(np.asarray(found)[mask == 1], hidden.numpy()[mask == 1], 2e-5)
    text = start["text_model"]
    made = LanguageHead(config.text).apply(
        {"params": text["head"]}, jax.numpy.asarray(hidden.numpy()), text["embeddings"]["word_embeddings"]
    )
    close(made[..., :83], scores, 2e-5)
    assert not np.asarray(start["text_model"]["head"]["bias"])[83:].any()  # of [DEC] and [ENC]


def test_a_folder_without_a_head_is_refused(tmp_path):
    with pytest.raises(HubError, match="5 missing: cls.predictions.transform.dense.weight"):
        load_head(tiny.folder_of(tiny.bert(), tmp_path))
