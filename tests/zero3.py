"""A ZeRO-3 checkpoint laid out by hand: as large as a test wants it, without a training run.

    FOLDER/zero_pp_rank_R_mp_rank_00_model_states.pt         shapes of the parameters; buffers
    FOLDER/bf16_zero_pp_rank_R_mp_rank_00_optim_states.pt    rank R's part of the fp32 masters

The keys and values that DeepSpeed 0.19.8 writes, less what only a training run needs. The
checkpoints of the real DeepSpeed are those of `tests.oracle`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VERSION = "0.19.8"


def save(folder: Path, tensors: Mapping[str, torch.Tensor], world: int) -> None:
    """Write the tensors; those in float32 that have elements as parameters, others as buffers.

    Adam's moments are there, as large as the masters.
    """
    parameters = {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float32 and tensor.numel()
    }
    for rank in range(world):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        torch.save(_model(tensors, parameters, world), folder / f"{prefix}_model_states.pt")
        parts = [_part(tensor, rank, world) for tensor in parameters.values()]
        flat = torch.cat(parts) if parts else torch.empty(0)
        torch.save(_optimizer(flat, world), folder / f"bf16_{prefix}_optim_states.pt")


def _part(tensor: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """A rank's piece: each parameter is cut into `world` equal pieces, the last one padded."""
    size = -(-tensor.numel() // world)
    padded = torch.zeros(size * world)
    padded[: tensor.numel()] = tensor.reshape(-1)
    return padded[rank * size : (rank + 1) * size].clone()


def _model(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, torch.Tensor], world: int
) -> dict[str, Any]:
    buffers = {name: tensor for name, tensor in tensors.items() if name not in parameters}
    placeholders = {name: torch.empty(0, dtype=torch.bfloat16) for name in parameters}
    return {
        "module": buffers | placeholders,
        "buffer_names": list(buffers),
        "param_shapes": [{name: tensor.shape for name, tensor in parameters.items()}],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": world,
        "mp_world_size": 1,
        "global_steps": 1,
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
        "ds_version": VERSION,
    }


def _optimizer(flat: torch.Tensor, world: int) -> dict[str, Any]:
    moments = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
    return {
        "optimizer_state_dict": {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(1.0), **moments}},
                "param_groups": [{"lr": 0.01, "params": [0]}],
            },
        },
        "ds_version": VERSION,
    }
