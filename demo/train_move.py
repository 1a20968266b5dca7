"""A part of one training run, in DeepSpeed or in FSDP2; torchrun runs it, one process a rank.

    torchrun --standalone --nproc-per-node 2 -m demo.train_move ENGINE FIRST LAST LOSSES [OPTION]...

    ENGINE    zero1, zero2, zero3 or fsdp2
    FIRST LAST    the steps, counted from 1, both included
    LOSSES    a JSON file, to which the loss of each step is written
    --load FOLDER     what the run goes on from: a universal checkpoint, or a DCP save for FSDP2
    --weights-only    load no state of the optimizer
    --save FOLDER --save-at STEP

A small Llama learns the text of this project's licence, byte by byte. The batches of a step are the
same in every engine and at every world size. Nothing here knows reshard: it is an ordinary script.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
# Rows of a global batch: 1, 2 and 3 ranks share them evenly.
ROWS, TOKENS = 12, 64
LEARNING_RATE = 1e-2


def text() -> torch.Tensor:
    """The licence, which stays as it is, as bytes."""
    return torch.frombuffer(bytearray((ROOT / "LICENSE").read_bytes()), dtype=torch.uint8)


def batch(data: torch.Tensor, step: int) -> torch.Tensor:
    """This rank's rows of the step's batch."""
    rank, world = distributed.get_rank(), distributed.get_world_size()
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(0, len(data) - TOKENS, (ROWS,), generator=generator)
    rows = torch.stack([data[start : start + TOKENS] for start in starts.tolist()]).long()
    return rows[rank * ROWS // world : (rank + 1) * ROWS // world]


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999))


class DeepSpeed:
    """ZeRO of one stage."""

    def __init__(self, stage: int) -> None:
        import deepspeed

        # DeepSpeed would first compile its shared-memory operator; gloo does as well here.
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
        deepspeed.init_distributed("gloo")
        model = build()
        config = {
            "train_micro_batch_size_per_gpu": ROWS // distributed.get_world_size(),
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 1.0,
            "steps_per_print": 10**9,
            "checkpoint": {"load_universal": True},
        }
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model), config=config)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.engine(input_ids=ids, labels=ids).loss
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def load(self, folder: str, *, optimizer: bool) -> None:
        self.engine.load_checkpoint(folder)

    def save(self, folder: str) -> None:
        self.engine.save_checkpoint(folder)


class Fsdp2:
    """FSDP2, saved and loaded by torch.distributed.checkpoint as LightRFT does."""

    def __init__(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        self.model = build()
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = adamw(self.model)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def load(self, folder: str, *, optimizer: bool) -> None:
        weights = sd.get_model_state_dict(self.model)
        dcp.load(weights, checkpoint_id=folder)
        sd.set_model_state_dict(self.model, weights)
        if optimizer:
            state = sd.get_optimizer_state_dict(self.model, self.optimizer)
            dcp.load(state, checkpoint_id=f"{folder}/optim_states")
            sd.set_optimizer_state_dict(self.model, self.optimizer, state)

    def save(self, folder: str) -> None:
        dcp.save(sd.get_model_state_dict(self.model), checkpoint_id=folder)
        state = sd.get_optimizer_state_dict(self.model, self.optimizer)
        dcp.save(state, checkpoint_id=f"{folder}/optim_states")


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo.train_move")
    parser.add_argument("engine", choices=("zero1", "zero2", "zero3", "fsdp2"))
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("losses", type=Path)
    parser.add_argument("--load")
    parser.add_argument("--weights-only", action="store_true")
    parser.add_argument("--save")
    parser.add_argument("--save-at", type=int)
    options = parser.parse_args()
    run = Fsdp2() if options.engine == "fsdp2" else DeepSpeed(int(options.engine[-1]))
    if options.load:
        run.load(options.load, optimizer=not options.weights_only)
    data, losses = text(), {}
    for step in range(options.first, options.last + 1):
        loss = run.step(batch(data, step)).detach().double()
        distributed.all_reduce(loss)
        losses[step] = loss.item() / distributed.get_world_size()
        if step == options.save_at:
            run.save(options.save)
        if distributed.get_rank() == 0 and step % 10 == 0:
            print(f"step {step:3d}   loss {losses[step]:.6f}", flush=True)
    if distributed.get_rank() == 0:
        options.losses.parent.mkdir(parents=True, exist_ok=True)
        options.losses.write_text(json.dumps(losses), encoding="utf-8")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
