"""The largest batch that fits, in few tries."""

import jax
import jax.numpy as jnp
import pytest
from planning import tpu

from vlmjax.errors import DoesNotFit, PlanError
from vlmjax.planning.names import local_name
from vlmjax.planning.search import largest, search_subject
from vlmjax.planning.subject import Subject, loss_subject
from vlmjax.sharding.mesh import batch_sharding, make_mesh


@pytest.mark.parametrize("start", [1, 8, 64, 500, 4000])
@pytest.mark.parametrize("border", [8, 16, 72, 1000, 4095])
def test_every_border_is_found(start, border):
    tried = []

    def fits(size):
        assert size % 8 == 0 and size not in tried
        tried.append(size)
        return size <= border

    assert largest(fits, start, 8, 4096) == border // 8 * 8
    assert len(tried) <= 20


def test_ends():
    assert largest(lambda size: False, 64, 8, 4096) is None
    assert largest(lambda size: True, 64, 8, 4096) == 4096


@tpu.needs_libtpu
def test_against_a_limit(capsys, monkeypatch):
    """Eight rows are 1 MiB that comes in and another that goes out: 21 MiB have room for ten times eight."""
    from vlmjax.planning import plan as planning

    name, devices = tpu.devices("v5e:1x1")
    chip = planning.chip_of(name)._replace(memory=21 << 20)
    monkeypatch.setattr(planning, "chip_of", lambda name: chip)
    mesh = make_mesh(devices=devices)

    def subject(rows):
        array = jax.ShapeDtypeStruct((rows, 1 << 15), jnp.float32, sharding=batch_sharding(mesh))
        return Subject("rows", jax.jit(jnp.sin), (array,), mesh, rows, 8, 1, "none")

    found = search_subject(name, subject, 512, 0.92)
    said = capsys.readouterr().out.splitlines()
    assert found.compiled.fits and found.compiled.peak_bytes == 20 << 20 and found.subject.batch_size == 80
    assert said[0].startswith("batch 512: does not fit, 0.12 of 0.02 GiB") and len(said) == len(set(said)) > 3
    monkeypatch.setattr(planning, "chip_of", lambda name: chip._replace(memory=1))
    with pytest.raises(DoesNotFit, match="already 8, the smallest, needs"):
        search_subject(name, subject, 16, 0.92)


def test_simulated_devices_have_no_limit():
    with pytest.raises(PlanError, match="--search needs devices"):
        search_subject(local_name(1), lambda batch: loss_subject(batch, 8, jax.devices()[:1]), 8, 0.92)
