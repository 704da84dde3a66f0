"""The small CLIP step compiled for TPU slices that are not there; prints where things lie as JSON."""

import json
import sys

from jax.experimental import topologies
from sharding.small_step import dual_encoder, lowered_step

from vlmjax.sharding.mesh import make_mesh


def slices(chips):
    """The slices that some chips of a mesh belong to."""
    return sorted({chip.slice_index for chip in chips.flat})


def main(name, count, fsdp, tensor):
    """Arguments: a slice such as `v5e:16x16`, how many of them, sizes of fsdp and tensor."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=count).devices
    whole = make_mesh(fsdp=len(chips) // count, devices=chips).devices
    mesh = make_mesh(fsdp=fsdp, tensor=tensor, devices=chips)
    pairs = zip(mesh.devices[..., :-1].flat, mesh.devices[..., 1:].flat, strict=True)
    # Chips one link apart differ by one in one of their coordinates.
    links = {sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True)) for a, b in pairs}
    compiled = lowered_step(dual_encoder(depth=1), mesh, mesh.size).compile()
    found = {
        "shape": dict(mesh.shape),
        "slices along data": [slices(row) for row in mesh.devices],
        "slices along data, fsdp a slice": [slices(row) for row in whole],
        "links along tensor": sorted(links),
        "temp": compiled.memory_analysis().temp_size_in_bytes,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
