"""Run by the tests in a process of its own: what an export looks like that forgot to gather.

    python -m tests.doctor.zero3 BASE OUT

Trains BASE for two steps with the real DeepSpeed, ZeRO-3, and writes into OUT, as the Trainer of
transformers does into `checkpoint-N`: DeepSpeed's own checkpoint, and beside it the module's
`save_pretrained`, whose tensors are placeholders. OUT.safetensors gets the gathered weights.
"""

from __future__ import annotations

import os
import socket
import sys


def main(base: str, out: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=port, DS_ACCELERATOR="cpu")  # fmt: skip
    import deepspeed
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from tests.oracle.worker import without_shm_op

    without_shm_op()
    deepspeed.init_distributed("gloo")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = {
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 0.1}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, config=config, model_parameters=model.parameters()
    )
    ids = torch.arange(8).reshape(1, 8)
    for _ in range(2):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(out, tag="global_step2")
    engine.module.save_pretrained(out)
    parameters = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        gathered = {name: p.detach().clone().contiguous() for name, p in parameters.items()}
    save_file(gathered, f"{out}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
