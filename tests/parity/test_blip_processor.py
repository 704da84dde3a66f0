"""BLIP's processor: what transformers opens of a folder of ours, and what we open of one of theirs."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import tiny
import tiny_blip
import transformers
from PIL import Image

from vlmjax import decode, hub
from vlmjax.data import text
from vlmjax.data.images import EvalTransform
from vlmjax.errors import HubError

WORDS = ["[PAD]", "a", "picture", "of", "dog", "cat", "red", "[SEP]", "[CLS]", "[UNK]", "[MASK]"]
PLAIN = EvalTransform(size=(20, 20), crop=None)


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    """Our captioner, its parameters, and a folder that it and its processor are written to."""
    path = tmp_path_factory.mktemp("words")
    (path / "vocab.txt").write_text("\n".join([*WORDS, *(f"w{i}" for i in range(47))]) + "\n")
    model, params = hub.load(tiny.folder_of(tiny_blip.captioner(), tmp_path_factory.mktemp("theirs")))
    out = tmp_path_factory.mktemp("ours")
    hub.save(model, params, out, text.load(path, 20), PLAIN)
    return model, params, out


@pytest.fixture(scope="module")
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (33, 41, 3), dtype=np.uint8))


def test_the_processor_is_transformers_own(captioner, image):
    _, _, folder = captioner
    tokenizer, transform = hub.load_processor(folder)
    assert transform == PLAIN
    for cls in (transformers.AutoProcessor, transformers.BlipProcessor):
        processor = cls.from_pretrained(folder)
        assert isinstance(processor, transformers.BlipProcessor)
        found = processor(images=image, text="a picture of", return_tensors="np")
        assert set(found) == {"input_ids", "attention_mask", "pixel_values"}
        assert found["input_ids"].tolist() == [tokenizer.encode("a picture of")] == [[8, 1, 2, 3, 7]]
        ours = transform.normalize(transform(np.asarray(image)))
        np.testing.assert_allclose(found["pixel_values"][0].transpose(1, 2, 0), ours, atol=0.02)


@pytest.mark.slow
def test_the_pipeline_writes_what_we_write(captioner, image):
    model, params, folder = captioner
    pipeline = transformers.pipeline("image-text-to-text", model=str(folder))
    theirs = pipeline(image, text="a picture of", max_new_tokens=4, do_sample=False, num_beams=1)
    tokenizer, transform = hub.load_processor(folder)
    pixels = transform.normalize(transform(np.asarray(image)))[None]
    ids = np.array([tokenizer.encode("a picture of")], np.int32)
    ends = {"eos_token_id": tiny_blip.SEP, "pad_token_id": tiny_blip.PAD}
    found = decode.generate(model, params, pixel_values=pixels, input_ids=ids, max_new_tokens=4, **ends)
    assert theirs[0]["generated_text"] == f"a picture of {tokenizer.decode(np.asarray(found)[0])}"


def test_images_that_would_be_cut_are_refused(captioner, tmp_path):
    model, params, _ = captioner
    for transform in (EvalTransform(size=20, crop=(20, 20)), EvalTransform(size=(30, 30), crop=(20, 20))):
        with pytest.raises(HubError, match="BlipProcessor squeezes whole images"):
            hub.save(model, params, tmp_path, None, transform)


@pytest.mark.parametrize("size", [24, {"height": 24, "width": 24}])
def test_their_files_need_not_say_that_nothing_is_cut(size, tmp_path):
    """Salesforce's own folders do not, and the oldest give one number."""
    settings = {"image_processor_type": "BlipImageProcessor", "size": size, "resample": 3, "do_resize": True}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert hub.load_processor(tmp_path)[1] == EvalTransform(size=(24, 24), crop=None)
