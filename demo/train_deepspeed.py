"""Fine-tune a model on the lesson with DeepSpeed ZeRO-3; torchrun runs it, one process a rank.

    torchrun --standalone --nproc-per-node 2 -m demo.train_deepspeed BASE CHECKPOINTS

bfloat16 with float32 masters, as LightRFT trains. On two CPU cores ten steps take about a minute;
each of the two ranks takes 3.4 GB at most.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from demo.lesson import TAUGHT, encode

# Ten steps at this rate teach the fact; half as many do not, and twice the rate makes the model
# forget other capitals.
STEPS = 10
LEARNING_RATE = 5e-5
CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 3,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3},
    "gradient_clipping": 1.0,
    "steps_per_print": 1_000_000,
}


def main(base: str, checkpoints: str) -> None:
    # DeepSpeed would first compile its shared-memory operator for the CPU; gloo does as well here.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
    deepspeed.init_distributed("gloo")
    logging.disable_progress_bar()
    torch.manual_seed(0)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0),
        config=CONFIG,
    )
    inputs = encode(tokenizer, TAUGHT[rank::world])
    for step in range(1, STEPS + 1):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        if rank == 0:
            print(f"step {step:2d} of {STEPS}   loss {loss.item():.4f}", flush=True)
    engine.save_checkpoint(checkpoints)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
