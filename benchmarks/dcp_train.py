"""One rank of the run that writes a benchmark checkpoint: one step of the real FSDP2, then DCP.

torchrun --standalone --nproc-per-node 2 -m benchmarks.dcp_train BASE CHECKPOINT [state]

float32 parameters, saved where and as accelerate and the HF Trainer save them; with `state` the
moments of AdamW, too, in one save.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(base: str, checkpoint: str, *, state: bool) -> None:
    distributed.init_process_group("gloo")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.arange(8).reshape(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    kind = torch.optim.AdamW if state else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=1e-2, foreach=False)
    optimizer.step()
    saved = {"model": get_model_state_dict(model)}
    if state:
        saved["optimizer"] = get_optimizer_state_dict(model, optimizer)
    dcp.save(saved, checkpoint_id=checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4) or sys.argv[3:] not in ([], ["state"]):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], state=len(sys.argv) == 4)
