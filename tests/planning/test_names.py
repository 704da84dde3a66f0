"""Names of device sets: what there is, and one line about what there is not."""

import os
import subprocess
import sys

import pytest

from vlmjax.errors import PlanError
from vlmjax.planning.names import Name, local_name, parse_name, parse_names, prepare_environment


@pytest.mark.parametrize(
    ("text", "platform", "devices"),
    [
        ("v5e:16x16", "tpu", 256),
        ("v5e:2x4", "tpu", 8),
        ("4xv5e:16x16", "tpu", 1024),
        ("v6e:8x8", "tpu", 64),
        ("v5p:8x8x8", "tpu", 512),
        ("v5p:16x20x28", "tpu", 8960),
        ("v4:2x2x1", "tpu", 4),
        ("h100:8x8", "cuda", 64),
        ("h200:1x1", "cuda", 1),
    ],
)
def test_sets_of_devices(text, platform, devices):
    name = parse_name(text)
    assert (name.platform, name.devices, name.text) == (platform, devices, text)


def test_a_list_and_local_devices():
    assert [name.text for name in parse_names("v5e:16x16, h100:8x8,")] == ["v5e:16x16", "h100:8x8"]
    assert parse_names("") == []
    assert local_name(8) == Name("cpu:8", "cpu", (8,)) and local_name(8).platform == "cpu"
    with pytest.raises(PlanError, match="--devices=0"):
        local_name(0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5e", "expected KIND:SHAPE"),
        ("v5e-256", "expected KIND:SHAPE"),
        ("v5litepod:16x16", "unknown device 'v5litepod'"),
        ("v5f:16x16", "did you mean 'v5"),
        (
            "v5e:16x32",
            r"at most 256 chips \(16x16\); several slices are written 2xv5e:16x16",
        ),  # libtpu aborts
        ("v5e:32x32", "at most 256 chips"),
        ("v6e:32x32", "at most 256 chips"),
        ("v5e:3x3", "v5e slices are shaped like"),
        ("v5e:2x2x2", "v5e slices are shaped like"),
        ("v5e:0x2", "sizes are at least 1"),
        ("v5p:8x8", "v5p slices are shaped like"),
        ("v5p:3x4x4", "v5p slices are shaped like"),
        ("v5p:24x24x24", "at most 8960 chips"),
        ("2000xv5e:16x16", "slices at most 1024"),
        ("1024xv5e:16x16", "at most 65536"),
        ("h100:64", "hosts x GPUs"),
        ("h100:1x16", "hosts x GPUs"),
        ("2xh100:1x8", "hosts x GPUs"),
    ],
)
def test_what_there_is_not(text, said):
    with pytest.raises(PlanError, match=said) as caught:
        parse_name(text)
    assert caught.value.exit_code == 78 and "\n" not in str(caught.value) and f"={text}" in str(caught.value)


def test_the_environment_is_set_before_jax(monkeypatch):
    for name in ("JAX_PLATFORMS", "TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_dump_to=x")
    prepare_environment([local_name(6), parse_name("v5e:2x2")])
    assert os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=x --xla_force_host_platform_device_count=6"
    code = "import sys, vlmjax.planning.names; print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "False\n", run.stderr
