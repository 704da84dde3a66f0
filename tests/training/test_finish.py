"""What a run leaves for its report where no evaluation does."""

import jax
import numpy as np
import pytest
from training import tiny

from vlmjax import config
from vlmjax.data import recipe as recipes
from vlmjax.data.formats import folder
from vlmjax.data.scenes import open_scenes
from vlmjax.errors import BadRecord
from vlmjax.sharding.mesh import make_mesh, replicated
from vlmjax.training import build
from vlmjax.training.compile import init_params
from vlmjax.training.finish import Evaluations, evaluated
from vlmjax.training.state import TrainState
from vlmjax.training.workdir import Workdir


class Damaged(folder.Subset):
    """Rows of a source of which the first is not to be read."""

    def __getitem__(self, i):
        if i == 0:
            raise BadRecord("damaged", "first")
        return super().__getitem__(i)


@pytest.mark.parametrize(
    "evals", [{}, {"known": config.evaluation("retrieval", "scenes:heldout", examples=8)}]
)
def test_pairs_of_a_batch_are_compared_where_nothing_else_is(tmp_path, monkeypatch, evals):
    """Cosines of images and captions of the batch given, matching ones on the diagonal, unreadable ones left out."""
    monkeypatch.setattr(recipes, "BPE_CAPTIONS", 100)
    recipe = config.validate(tiny.recipe(evals=config.Config(evals)))
    workdir, mesh = Workdir(str(tmp_path)), make_mesh()
    source = open_scenes("scenes", seed=0, image_size=16)
    tokenizer = build.make_tokenizer(recipe, source, workdir)
    model = build.make_model(recipe, tokenizer)
    params = jax.jit(lambda: init_params(model, 0), out_shardings=replicated(mesh))()
    state = TrainState(step=0, params=params, frozen={}, opt_state=(), ema={}, extra={})
    rows = [1000, 5, 77, 3]
    Evaluations(recipe, model, tokenizer, mesh, workdir).compare(
        state, lambda: Damaged(source, np.array(rows))
    )
    path = tmp_path / "report" / "similarity.npz"
    assert path.exists() is not bool(evals)
    if evals:
        return
    with np.load(path) as file:
        captions, found = list(file["captions"]), file["similarity"]
        assert len(captions) == len(file["images"]) == 3
    transform = build.eval_transform(recipe, (16, 16))
    pixels = np.stack([transform.normalize(transform(source[i].image)) for i in rows[1:]])
    assert [c in source[i].captions for c, i in zip(captions, rows[1:], strict=True)] == [True] * 3
    out = model.apply({"params": evaluated(state, recipe)}, pixels, **tokenizer(captions))
    np.testing.assert_allclose(found, out.image_embeds @ out.text_embeds.T, atol=1e-5)
