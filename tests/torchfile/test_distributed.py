"""DTensor and ShardedTensor, as FSDP and verl pickle them: records with their tensors within."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reshard.containers.torch import Opaque
from reshard.core.dtypes import FLOAT32
from tests.torchfile.support import read_bytes, same

pytestmark = pytest.mark.heavy

SCRIPT = """
import sys
import pytest
import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import Shard as LocalShard, init_from_local_shards
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",))
weights = distribute_tensor(torch.arange(12.0).reshape(3, 4), mesh, [Shard(0)])
local = LocalShard.from_tensor_and_offsets(torch.ones(2, 3), [0, 0], 0)
torch.save(
    {
        "tensor": weights,
        "parameter": torch.nn.Parameter(weights),
        "sharded": init_from_local_shards([local], [2, 3]),
    },
    sys.argv[1],
)
dist.destroy_process_group()
"""


def test_distributed_tensors(tmp_path: Path) -> None:
    path = tmp_path / "rank_0.pt"
    # A process of its own: a process group changes how torch behaves for every other test.
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, str(path)], check=True)
    content = path.read_bytes()
    file = read_bytes(path, content)
    value: Any = file.value

    for name in ("tensor", "parameter"):
        dtensor = value[name]
        assert isinstance(dtensor, Opaque)
        assert dtensor.name == "torch.distributed.tensor.DTensor"
        assert dtensor.describe() == "a tensor of class torch.distributed.tensor.DTensor"
        _, dtype, shape, stride, *_ = dtensor.args
        assert (dtype, shape, stride) == (FLOAT32, (3, 4), (4, 1))
        slots = value[name].state[1]
        assert same(slots["_local_tensor"], torch.arange(12.0).reshape(3, 4), content)
        assert slots["_spec"].state["placements"][0].name.endswith("placement_types.Shard")

    shards, metadata, group, _, _ = value["sharded"].state
    assert value["sharded"].name.endswith("ShardedTensor")
    assert same(shards[0].state[1]["tensor"], torch.ones(2, 3), content)
    assert metadata.state["size"] == (2, 3)
    # Pickled as getattr(ShardedTensor, "ProcessGroupState").
    assert group.name.endswith("ShardedTensor.ProcessGroupState")
    assert len(file.records) >= 2
