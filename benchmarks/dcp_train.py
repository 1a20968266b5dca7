"""One rank of the run that writes a benchmark checkpoint: one step of the real FSDP2, then DCP.

torchrun --standalone --nproc-per-node 2 -m benchmarks.dcp_train BASE CHECKPOINT

float32 parameters, saved where and as accelerate and the HF Trainer save them.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(base: str, checkpoint: str) -> None:
    distributed.init_process_group("gloo")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(8).reshape(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-2, foreach=False).step()
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
