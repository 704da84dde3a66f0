"""How much memory opening a large Hugging Face folder takes beyond the parameters themselves.

`python benchmarks/load_memory.py --gigabytes=4`: writes a Llama of zeros as a folder in shards of which no byte lies on
the disk (sparse files), opens it onto eight simulated devices, each with its part, and watches this process. The goal
is a peak below the largest shard and a tenth more.
"""

import argparse
import json
import os
import struct
import tempfile
import threading
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from vlmjax import hub
from vlmjax.config import DECODER_SHARDING
from vlmjax.hub import llama
from vlmjax.hub.folder import abstract_params
from vlmjax.hub.table import write
from vlmjax.models.decoder import Decoder, DecoderConfig
from vlmjax.sharding.mesh import make_mesh
from vlmjax.sharding.rules import shardings

MIB = 2**20
HEADS, HEAD = 16, 128


def config_of(gigabytes: float) -> DecoderConfig:
    """A Llama of width 2048, as deep as makes so many gigabytes of bfloat16."""
    width, mlp = HEADS * HEAD, 5504
    depth = max(1, round(gigabytes * 1e9 / 2 / (4 * width**2 + 3 * width * mlp)))
    return DecoderConfig(width, depth, HEADS, HEADS, HEAD, mlp, vocab_size=32000)


def write_folder(folder: Path, model: Decoder, shards: int) -> int:
    """A folder of zeros whose files have holes for tensors; returns the bytes of the largest shard."""
    params = abstract_params(llama.LLAMA, model)
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), params)
    tensors = {name: one.shape for name, one in write(llama.LLAMA.rows(model), zeros, params).items()}
    names, largest, index = list(tensors), 0, {}
    for i in range(shards):
        file, header, at = f"model-{i + 1:05}-of-{shards:05}.safetensors", {}, 0
        for name in names[i::shards]:
            size = 2 * int(np.prod(tensors[name]))
            header[name] = {"dtype": "BF16", "shape": list(tensors[name]), "data_offsets": [at, at + size]}
            at, index[name] = at + size, file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            out.truncate(8 + len(text) + at)
        largest = max(largest, at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = llama.from_llama(model.config) | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return largest


class Watch(threading.Thread):
    """The largest resident memory seen: of this process's own, and of files it has mapped."""

    def __init__(self):
        """Begin to look, some hundred times a second."""
        super().__init__(daemon=True)
        self.own = self.files = 0
        self.done = threading.Event()

    def run(self) -> None:
        """Look until told."""
        while not self.done.wait(0.005):
            lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.own = max(self.own, int(lines["RssAnon"].split()[0]) * 1024)
            self.files = max(self.files, int(lines["RssFile"].split()[0]) * 1024)


def main() -> None:
    """Write, open, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of parameters in bfloat16 (4)")
    parser.add_argument("--shards", type=int, default=3, help="files (3, as LLaVA 13B has)")
    options = parser.parse_args()
    model, mesh = Decoder(config_of(options.gigabytes)), make_mesh(data=1, fsdp=8)
    with tempfile.TemporaryDirectory() as folder:
        largest = write_folder(Path(folder), model, options.shards)
        jax.block_until_ready(jax.numpy.zeros(8))
        watch = Watch()
        watch.start()
        watch.done.wait(0.1)
        before = watch.own
        _, params = hub.load(
            folder, dtype="bfloat16", shardings=lambda shapes: shardings(DECODER_SHARDING, shapes, mesh)
        )
        jax.block_until_ready(params)
        watch.done.set()
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    more = watch.own - before - held
    print(f"parameters    {held / MIB:9,.0f} MiB on 8 devices; largest shard {largest / MIB:,.0f} MiB")
    print(
        f"beyond them   {more / MIB:9,.0f} MiB at the peak: {more / largest:.2f} of the largest shard (goal 1.10)"
    )
    print(
        f"mapped files  {watch.files / MIB:9,.0f} MiB at the peak, which the system takes back when it needs them"
    )


if __name__ == "__main__":
    main()
