"""A tiny model with odd sizes, so that every padding occurs, its batches, groups and schedule.

Tied embedding; one frozen matrix; two groups whose learning rates differ, so that an exchange of
their hyperparameters shows in the losses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.state.jobs import Job, Kind

FROZEN = "model.layers.0.mlp.down_proj.weight"
#: Rows of a global batch: 1, 2, 3 and 6 ranks share them evenly.
ROWS, TOKENS, VOCAB = 6, 12, 98


def build(kind: Kind, *, frozen: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    """The model with its first weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    config_of, model_of = (
        (LlamaConfig, LlamaForCausalLM) if kind == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    )
    config = config_of(
        vocab_size=VOCAB,
        hidden_size=18 if kind == "llama" else 17,
        head_dim=10,
        intermediate_size=27,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = model_of(config)
    model.config.use_cache = False
    if kind == "lora":
        return _adapted(model).to(dtype)
    dict(model.named_parameters())[FROZEN].requires_grad_(not frozen)
    return model.to(dtype)


def _adapted(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))


def groups(model: nn.Module, job: Job) -> list[dict[str, Any]]:
    """The trainable parameters by the number of their dimensions; those of LoRA by A and B.

    Names decide, since FSDP1 flattens what a rank holds.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad or job.every}
    if job.groups == 1:
        return [{"params": list(trainable.values()), "weight_decay": 0.1, "lr": 1e-2}]
    second = {n for n in trainable if n.endswith("bias") or "norm" in n or "lora_B" in n}
    return [
        {
            "params": [p for n, p in trainable.items() if n not in second],
            "weight_decay": 0.1,
            "lr": 1e-2,
        },
        {
            "params": [p for n, p in trainable.items() if n in second],
            "weight_decay": 0.0,
            "lr": 5e-3,
        },
    ]


def optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """AdamW; `job.spoilt`: with settings that the checkpoint's must replace."""
    found = groups(model, job)
    if job.spoilt:
        for group in found:
            group.update(weight_decay=0.7)
    betas = (0.5, 0.5) if job.spoilt else (0.9, 0.95)
    return torch.optim.AdamW(found, lr=1e-2, betas=betas, eps=1e-6)


def schedule(inner: torch.optim.Optimizer) -> Any:
    """A rate that falls with every step."""
    return torch.optim.lr_scheduler.LambdaLR(inner, _rate)


def _rate(step: int) -> float:
    return 1.0 / (1 + 0.1 * step)


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """This rank's rows of the step's batch, `[ROWS / world, TOKENS]`."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCAB - 1, (ROWS, TOKENS), generator=generator)
    mine = ROWS // world
    return ids[rank * mine : (rank + 1) * mine]


def spoil(model: nn.Module) -> None:
    """Other weights in everything that a checkpoint must restore; what is frozen stays.

    A universal checkpoint does not restore what is frozen: the script brings it along.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.03)
