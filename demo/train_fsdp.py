"""Load a DCP checkpoint into an FSDP2 model, fine-tune it on the lesson, and save it by DCP.

    torchrun --standalone --nproc-per-node 2 -m demo.train_fsdp BASE START CHECKPOINT

BASE gives the config and the tokenizer only; the weights come from START, which hf2fsdp wrote.
float32 parameters, as FSDP runs keep them. On two CPU cores ten steps take about a minute.
"""

from __future__ import annotations

import sys

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from demo.lesson import TAUGHT, encode

# Ten steps at this rate teach the fact, as in the DeepSpeed story.
STEPS = 10
LEARNING_RATE = 5e-5


def sharded_model(base: str) -> nn.Module:
    """The base's architecture with random weights, sharded over all ranks."""
    config = AutoConfig.from_pretrained(base)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    # Embedding and head are one tied weight: both belong to the root's group.
    fully_shard(model, mesh=mesh)
    return model


def load(model: nn.Module, start: str) -> None:
    """Fill the model's shards from a DCP checkpoint; each rank reads what it holds."""
    state = get_model_state_dict(model)
    # Tied to the embedding in the model, and therefore not in the base's files.
    state.pop("lm_head.weight")
    # The state dict's tensors are the model's own: loading into them loads the model.
    dcp.load(state, checkpoint_id=start)


def main(base: str, start: str, checkpoint: str) -> None:
    distributed.init_process_group("gloo")
    torch.manual_seed(0)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = sharded_model(base)
    load(model, start)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    inputs = encode(AutoTokenizer.from_pretrained(base), TAUGHT[rank::world])
    for step in range(1, STEPS + 1):
        loss = model(**inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step:2d} of {STEPS}   loss {loss.item():.4f}", flush=True)
    dcp.save(get_model_state_dict(model), checkpoint_id=checkpoint)
    distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
