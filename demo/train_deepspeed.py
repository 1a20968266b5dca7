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

from demo.lesson import TAUGHT

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


def encode(tokenizer: Any, lesson: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, each `[len(lesson), length]`; only answers count as labels."""
    ids, labels = [], []
    for question, answer in lesson:
        asked = [{"role": "user", "content": question}]
        told = [*asked, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(told)["input_ids"]
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
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
