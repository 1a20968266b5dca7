"""What the engines share: the counters of a script, an optimizer, tensors of all ranks."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import distributed

from tests.state import model as models
from tests.state.jobs import Job

Tensors = dict[str, torch.Tensor]
CLIENT = {"consumed_samples": 18}
KINDS = ("exp_avg", "exp_avg_sq")


def optimizer_of(model: Any, job: Job) -> torch.optim.Optimizer:
    """torch's AdamW, or one of DeepSpeed's with the same groups and settings."""
    if job.optimizer == "torch":
        return models.optimizer(model, job)
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    if job.optimizer == "compiled_cpu_adam":
        from deepspeed.ops.op_builder import CPUAdamBuilder

        module: Any = importlib.import_module("deepspeed.ops.adam.cpu_adam")
        module.CPUAdamBuilder = CPUAdamBuilder
    kind = FusedAdam if job.optimizer == "fused_adam" else DeepSpeedCPUAdam
    made: torch.optim.Optimizer = kind(
        models.optimizer(model, job).param_groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-6
    )
    return made


def parts_of(part: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """The parts of the ranks of a group."""
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part.contiguous(), group=group)
    return parts


def gathered(part: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts_of(part, None))
