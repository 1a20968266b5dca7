"""Checkpoints of runs with more than data parallelism: pipeline stages, experts, tensor parallel.

Two ranks each. There is no truth beside them: a reader refuses them, or reads them where the
format says how. The tensor-parallel runs save before their first step, so the masters, put
together, are the weights of `base/`.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, distributed, nn
from torch.nn import functional

from tests.oracle import models

_CONFIG: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 10**9,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_allow_untested_optimizer": True,
}


def pipeline(folder: Path) -> None:
    """Two stages of two layers, ZeRO-1."""
    layers = [
        LayerSpec(nn.Embedding, models.VOCAB, 6),
        LayerSpec(nn.Linear, 6, 5),
        nn.Tanh(),
        LayerSpec(nn.Linear, 5, models.VOCAB),
    ]
    module = PipelineModule(layers, num_stages=2, loss_fn=_loss, partition_method="uniform")
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={**_CONFIG, "zero_optimization": {"stage": 1}},
    )
    ids = _ids()
    engine.train_batch(iter([(ids, ids)]))
    engine.save_checkpoint(str(folder / "checkpoint"))


class Experts(nn.Module):  # type: ignore[misc]
    """One mixture of two experts, one on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 6)
        self.moe = MoE(6, nn.Linear(6, 6), num_experts=2, ep_size=2, k=1, min_capacity=1)
        self.head = nn.Linear(6, models.VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        mixed, balance, _ = self.moe(self.embed(ids))
        return _loss(self.head(mixed), ids) + 0.01 * balance


def experts(folder: Path) -> None:
    """Expert parallelism of two, ZeRO-1."""
    module = Experts()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(module.parameters()), "name": "all"}
    )
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=groups,
        config={**_CONFIG, "zero_optimization": {"stage": 1}},
    )
    engine.backward(engine(_ids()))
    engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))


def tensor_parallel(folder: Path, stage: int) -> None:
    """AutoTP of two over a Llama whose sizes two divides."""
    module = models.llama(tied=False).to(torch.bfloat16)
    if distributed.get_rank() == 0:
        module.save_pretrained(folder / "base")
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config={
            **_CONFIG,
            "zero_optimization": {"stage": stage},
            "tensor_parallel": {"autotp_size": 2},
        },
    )
    engine.save_checkpoint(str(folder / "checkpoint"))


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def _ids() -> Tensor:
    return torch.randint(models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))


MAKERS: Mapping[str, Callable[[Path], None]] = {
    "pipeline": pipeline,
    "experts": experts,
    "tensor-parallel-zero1": lambda folder: tensor_parallel(folder, 1),
    "tensor-parallel-zero3": lambda folder: tensor_parallel(folder, 3),
}
