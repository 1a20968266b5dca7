"""One rank that saves random weights as FSDP2 shards them, by DCP.

torchrun --standalone --nproc-per-node 2 -m benchmarks.dcp_ranks CHECKPOINT GB
"""

from __future__ import annotations

import math
import sys

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from benchmarks.shapes import model, random_values


def main(checkpoint: str, gb: float) -> None:
    distributed.init_process_group("gloo")
    world, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    state = {}
    for name, shape in model(gb).shapes():
        rows = -(-shape[0] // world)  # as torch.chunk cuts
        mine = min(rows, max(shape[0] - rank * rows, 0))
        local = random_values(mine * math.prod(shape[1:]), torch.float32)
        state[name] = DTensor.from_local(
            local.add_(rank).reshape(mine, *shape[1:]), mesh, [Shard(0)], run_check=False
        )
    dcp.save({"model": state}, checkpoint_id=checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], float(sys.argv[2]))
