"""Benchmarks run over a small source on eight devices, against the same arithmetic written out in numpy."""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from vlmjax.data.images import EvalTransform
from vlmjax.data.record import Record
from vlmjax.errors import BadRecord, DataError, NonFiniteError
from vlmjax.evals import embed, pictures, retrieval, runner
from vlmjax.evals.benchmark import Benchmark, benchmark_of, select
from vlmjax.evals.table import print_results
from vlmjax.sharding.mesh import make_mesh

TRANSFORM = EvalTransform(size=8, crop=(8, 8))
WIDTH = 12


class Towers(nn.Module):
    """A dual encoder of two matrices, with the methods every dual encoder of the package has."""

    def setup(self):
        self.image = nn.Dense(WIDTH, use_bias=False)
        self.text = nn.Embed(256, WIDTH)

    def encode_image(self, pixel_values):
        out = self.image(pixel_values.reshape(pixel_values.shape[0], -1))
        return out / jnp.linalg.norm(out, axis=-1, keepdims=True)

    def encode_text(self, input_ids, attention_mask):
        out = (self.text(input_ids) * attention_mask[:, :, None].astype(jnp.float32)).sum(1)
        return out / jnp.linalg.norm(out, axis=-1, keepdims=True)

    def __call__(self, pixel_values, input_ids, attention_mask):
        return self.encode_image(pixel_values), self.encode_text(input_ids, attention_mask)


def tokenizer(texts):
    ids = np.zeros((len(texts), 10), np.int32)
    mask = np.zeros_like(ids)
    for row, text in enumerate(texts):
        codes = list(text.encode())[:10]
        ids[row, : len(codes)], mask[row, : len(codes)] = codes, 1
    return {"input_ids": ids, "attention_mask": mask}


class Pictures:
    """Records of random pixels; some cannot be read."""

    name, fingerprint = "pictures", "0"

    def __init__(self, captions, bad=(), extra=None):
        self.captions, self.bad, self.reads = captions, set(bad), 0
        self.extra = extra or [{} for _ in captions]

    def __len__(self):
        return len(self.captions)

    def pixels(self, i):
        return np.random.default_rng(i).integers(0, 256, (9 + i % 3, 11, 3), np.uint8)

    def __getitem__(self, i):
        self.reads += 1
        if i in self.bad:
            raise BadRecord("truncated", f"key{i}", "cut off")
        return Record(f"key{i}", self.pixels(i), tuple(self.captions[i]), self.extra[i])


@pytest.fixture(scope="module")
def model():
    towers = Towers()
    ids = jnp.zeros((1, 10), jnp.int32)
    params = towers.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), ids, ids)["params"]
    return towers, params


def evaluator(model, source, benchmark="retrieval", mesh=None, **options):
    wanted = Benchmark("test", benchmark, "pictures", **options)
    return runner.Evaluator(wanted, model[0], tokenizer, TRANSFORM, mesh or make_mesh(), source=source)


def features(model, source, used, texts):
    """The same embeddings, one image and one text at a time."""
    towers, params = model
    images = []
    for i in used:
        values = TRANSFORM.normalize(TRANSFORM(source.pixels(i)))[None]
        images.append(np.asarray(towers.apply({"params": params}, values, method="encode_image"))[0])
    tokens = [tokenizer([text]) for text in texts]
    rows = [np.asarray(towers.apply({"params": params}, **t, method="encode_text"))[0] for t in tokens]
    return np.stack(images), np.stack(rows)


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1, "devices": 1}]
)
@pytest.mark.parametrize("batch_size", [8, 64])
def test_retrieval_equals_one_record_at_a_time(model, shape, batch_size):
    shape = dict(shape)
    devices = jax.devices()[: shape.pop("devices", 8)]
    mesh = make_mesh(**shape, devices=devices)
    captions = [[f"{i} a", f"b {i}"][: 1 + i % 2] for i in range(21)]
    source = Pictures(captions, bad=[4, 20])
    result = evaluator(model, source, mesh=mesh, batch_size=batch_size).run(
        jax.device_put(model[1], jax.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    )
    used = [i for i in range(21) if i not in (4, 20)]
    texts = [text for i in used for text in captions[i]]
    images, rows = features(model, source, used, texts)
    owner = [place for place, i in enumerate(used) for _ in captions[i]]
    want = retrieval.recall(images @ rows.T, owner)
    for k in (1, 5, 10):
        assert result.metrics[f"image_to_text_r{k}"] == pytest.approx(want[f"txt_r{k}"] / 100)
        assert result.metrics[f"text_to_image_r{k}"] == pytest.approx(want[f"img_r{k}"] / 100)
    assert result.counts == {"records": 21, "used": 19, "skipped": 2, "images": 19, "texts": len(texts)}
    assert result.skipped_reasons == {"truncated": 2}


def test_features_stand_in_source_order_without_padding_or_bad_records(model):
    source = Pictures([[str(i)] for i in range(19)], bad=[0, 9])
    ready = evaluator(model, source, batch_size=8)
    got = ready.embedder.images(model[1], ready.pictures.batches(), 8)
    used = [i for i in range(19) if i not in (0, 9)]
    images, _ = features(model, source, used, ["x"])
    np.testing.assert_allclose(got.features, images, atol=1e-6)
    assert [note["key"] for note in got.notes] == [f"key{i}" for i in used]
    assert [(row["key"], row["reason"]) for row in got.skipped] == [
        ("key0", "truncated"),
        ("key9", "truncated"),
    ]


def test_texts_are_padded_and_cut_back(model):
    ready = evaluator(model, Pictures([["a"], ["b"]]))
    texts = [f"text {i}" for i in range(11)]
    _, want = features(model, ready.pictures.source, [0], texts)
    for batch_size in (1, 8, 1000):
        np.testing.assert_allclose(ready.embedder.texts(model[1], texts, batch_size), want, atol=1e-6)


def test_zeroshot_with_captions_as_classes(model):
    captions = [[["cat"], ["dog"], ["emu", "ostrich"]][i % 3] for i in range(17)]
    source = Pictures(captions)
    result = evaluator(model, source, "zeroshot").run(model[1])
    images, rows = features(model, source, range(17), ["cat", "dog", "emu", "ostrich"])
    names = np.array(["cat", "dog", "emu", "ostrich"])
    best = names[(images @ rows.T).argmax(1)]
    assert result.metrics["top1"] == pytest.approx(
        np.mean([b in c for b, c in zip(best, captions, strict=True)])
    )
    assert result.metrics["top5"] == 1.0
    assert result.chance["top1"] == pytest.approx(np.mean([len(c) / 4 for c in captions]))
    assert (result.counts["classes"], result.counts["templates"]) == (4, 1)


def test_zeroshot_with_a_classes_file_averages_the_prompts(model, tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("0\tcat\n1\tdog\n2\temu\n")
    source = Pictures([[]] * 16, extra=[{"cls": str(i % 3).encode()} for i in range(16)])
    templates = ["a {}", "the {} x"]
    options = {"classes": str(path), "templates": templates, "canonical": True}
    result = evaluator(model, source, "zeroshot", **options).run(model[1])
    prompts = [t.replace("{}", c) for c in ("cat", "dog", "emu") for t in templates]
    images, rows = features(model, source, range(16), prompts)
    weights = rows.reshape(3, 2, -1).mean(1)
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    assert result.metrics["top1"] == pytest.approx(
        np.mean((images @ weights.T).argmax(1) == np.arange(16) % 3)
    )
    assert result.counts["templates"] == 2


def test_records_without_captions_are_counted(model):
    result = evaluator(model, Pictures([["a"], [], ["b"]])).run(model[1])
    assert result.skipped_reasons == {"no_caption": 1}
    assert result.to_json()["used"] == 2


def test_pictures_are_read_once_and_the_towers_compiled_once(model):
    source = Pictures([[f"{i}"] for i in range(20)])
    ready = evaluator(model, source, batch_size=8)
    ready.run(model[1], details=False)
    reads = source.reads
    ready.run(jax.tree.map(lambda x: x * 2, model[1]), details=False)
    assert source.reads == reads == 20
    assert ready.embedder._images._cache_size() == 1
    assert ready.embedder._texts._cache_size() == 1


def test_a_large_source_is_not_kept_in_memory(model, monkeypatch):
    monkeypatch.setattr(pictures, "CACHE_BYTES", 1000)
    source = Pictures([[f"{i}"] for i in range(20)])
    ready = evaluator(model, source, batch_size=8)
    first = ready.run(model[1], details=False)
    assert ready.run(model[1], details=False).metrics == first.metrics
    assert source.reads == 40


def test_details_show_right_and_wrong(model):
    result = evaluator(model, Pictures([[f"{i % 9} x"] for i in range(18)])).run(model[1])
    queries = result.details["text_to_image"]
    assert len(queries) == 8
    for query in queries:
        rights = [found["right"] for found in query["found"]]
        assert (query["rank"] == rights.index(True)) if any(rights) else query["rank"] >= 5
        assert query["found"][0]["image"].shape == (9, 9, 3) or query["found"][0]["image"].shape[0] in (
            10,
            11,
        )
    assert result.details["similarity"]["similarity"].shape == (9, 9)
    shown = evaluator(model, Pictures([[f"{i % 9} x"] for i in range(18)]), "zeroshot").run(model[1]).details
    assert shown["counts"].sum() + shown["other"].sum() == 18
    assert sum(pair["count"] for pair in shown["pairs"]) <= 18
    assert np.isclose(np.trace(shown["counts"]) / 18, np.average(shown["accuracy"], weights=shown["total"]))


def test_parameters_that_are_not_finite_stop_the_evaluation(model):
    broken = jax.tree.map(lambda x: x * jnp.nan, model[1])
    with pytest.raises(NonFiniteError):
        evaluator(model, Pictures([["a"], ["b"]])).run(broken)


def test_nothing_usable_is_an_error_that_counts(model):
    with pytest.raises(DataError, match="none of 2 records could be used .*'truncated': 2"):
        evaluator(model, Pictures([["a"], ["b"]], bad=[0, 1])).run(model[1])


def test_selection_by_key_and_number():
    source = Pictures([["x"]] * 12)

    def chosen(**options):
        return select(source, Benchmark("b", "retrieval", "d", **options))

    assert chosen(keep="1") == [1, 10, 11]
    assert chosen(keep="1", exclude="0$", examples=2) == [1, 11]
    assert chosen(examples=3) == [0, 1, 2]
    with pytest.raises(DataError, match="no record of d remains of 12"):
        chosen(keep="nothing")
    with pytest.raises(DataError, match="regular expression"):
        chosen(keep="(")


def test_a_benchmark_from_a_recipe_entry():
    from vlmjax.config import evaluation

    entry = evaluation("retrieval", "scenes:heldout", examples=256)
    assert benchmark_of("heldout", entry) == Benchmark("heldout", "retrieval", "scenes:heldout", examples=256)
    with pytest.raises(DataError, match="zeroshot, retrieval"):
        Benchmark("x", "captioning", "y")


def test_rows_of_processes_fall_into_global_order():
    pieces = [[4, [["c", "d"], ["g", "h"]]], [0, [["a", "b"], ["e", "f"]]], [0, [["a", "b"], ["e", "f"]]]]
    assert embed._interleave(pieces) == list("abcdefgh")


def test_the_table_names_metric_result_and_chance(model):
    result = evaluator(model, Pictures([["a"], ["b"], []])).run(model[1], details=False)
    out = io.StringIO()
    print_results([result], console=Console(file=out, width=120))
    text = out.getvalue()
    assert "text → image R@1" in text and "50.00%" in text and "2 (1 skipped)" in text
    assert result.row()["eval/test/text_to_image_r10"] == 1.0


def test_transparent_pixels_show_the_background_of_the_model():
    glass = Record("glass", np.zeros((8, 8, 4), np.uint8), ("nothing",))
    transform = dataclasses.replace(TRANSFORM, background=(10, 20, 30))
    (batch,) = embed.read_batches([glass], [0], range(1), 1, transform, lambda record: {})
    np.testing.assert_array_equal(batch.pixels[0], np.broadcast_to(np.uint8([10, 20, 30]), (8, 8, 3)))
