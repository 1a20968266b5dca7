"""One rank of the run that writes a benchmark checkpoint: one step of the real DeepSpeed.

torchrun --standalone --nproc-per-node 2 -m benchmarks.train BASE STAGE CHECKPOINTS
"""

from __future__ import annotations

import importlib
import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(base: str, stage: int, checkpoints: str) -> None:
    # DeepSpeed would first compile its shared-memory operator for the CPU.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": stage, "reduce_bucket_size": 10_000_000},
            "steps_per_print": 1_000_000,
        },
    )
    ids = torch.arange(8).reshape(1, 8)  # the step is there to give Adam its moments
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(checkpoints)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
