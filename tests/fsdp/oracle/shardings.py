"""Laying a model's parameters over the ranks, each way that FSDP users do."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from tests.fsdp.oracle import models, ranks
from tests.fsdp.oracle.cases import Case

_TENSOR_PARALLEL = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


def build(case: Case) -> nn.Module:
    """The case's model, its parameters laid over the ranks."""
    model = models.Odd() if case.model == "odd" else models.Decoder(tied=case.model == "tied")
    model.to(ranks.DEVICE, getattr(torch, case.dtype))
    if case.sharding.startswith("fsdp1"):
        return _fsdp1(model, case)
    mesh = _mesh(case)
    if case.sharding == "fsdp-tp":
        for block in model.blocks():
            plan = {name: style() for name, style in _TENSOR_PARALLEL.items()}
            parallelize_module(block, mesh["tp"], plan)
        mesh = mesh["dp"]
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _mesh(case: Case) -> DeviceMesh:
    shapes: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
        "hsdp": ((2, 2), ("replicate", "shard")),
        "fsdp-tp": ((2, 2), ("dp", "tp")),
        "lightrft": ((1, case.world), ("ddp", "fsdp")),
    }
    shape, names = shapes.get(case.sharding, ((case.world,), ("fsdp",)))
    return init_device_mesh(ranks.DEVICE, shape, mesh_dim_names=names)


def _fsdp1(model: nn.Module, case: Case) -> FullyShardedDataParallel:
    # With a mesh FSDP1 gives DTensors, without one ShardedTensors.
    mesh = init_device_mesh(ranks.DEVICE, (case.world,)) if case.sharding == "fsdp1" else None
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({models.Layer}),
        device_id=torch.device(ranks.DEVICE),
        device_mesh=mesh,
        use_orig_params=case.sharding != "fsdp1-flat",
    )


def state(model: nn.Module, case: Case) -> dict[str, Any]:
    """The sharded state dict, by the call that users of this kind of FSDP make."""
    if isinstance(model, FullyShardedDataParallel):
        local = case.sharding in ("fsdp1-local", "fsdp1-flat")
        kind = StateDictType.LOCAL_STATE_DICT if local else StateDictType.SHARDED_STATE_DICT
        with FullyShardedDataParallel.state_dict_type(model, kind):
            return dict(model.state_dict())
    return dict(get_model_state_dict(model))


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The sharded optimizer state, by parameter names."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            return dict(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    return dict(get_optimizer_state_dict(model, optimizer))


def flat_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer state as torchtitan saves it: one level, `state.<name>.exp_avg`."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    return dict(get_optimizer_state_dict(model, optimizer, options=options))


def gather(model: nn.Module) -> dict[str, torch.Tensor]:
    """The truth: the full state dict, gathered from the running ranks."""
    if isinstance(model, FullyShardedDataParallel):
        config = FullStateDictConfig(offload_to_cpu=False, rank0_only=False)
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT, config):
            return {name: value.clone() for name, value in model.state_dict().items()}
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {name: value.clone() for name, value in full.items()}


def every_dtype(world: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Each dtype as sharded rows, sharded columns and a replica, and the truth of it.

    gloo cannot scatter most of these dtypes, so each rank cuts its own part of the whole.
    """
    mesh = init_device_mesh("cpu", (world,))
    rank = distributed.get_rank()
    sharded: dict[str, Any] = {}
    truth: dict[str, torch.Tensor] = {}
    for name, whole in models.every_dtype().items():
        cut = functools.partial(_from_whole, whole, mesh=mesh, rank=rank)
        sharded |= {f"rows.{name}": cut(dim=0), f"columns.{name}": cut(dim=1)}
        sharded |= {f"plain.{name}": whole, f"none.{name}": whole[:0].clone()}
        replica = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
        sharded[f"replica.{name}"] = replica
        for kind in ("rows", "columns", "plain", "replica"):
            truth[f"{kind}.{name}"] = whole.clone()
        truth[f"none.{name}"] = whole[:0].clone()
        if whole.dtype != torch.float4_e2m1fn_x2:  # safetensors counts its halves: none is 0-d
            sharded[f"scalar.{name}"] = truth[f"scalar.{name}"] = whole[0, 0].clone()
    return sharded, truth


def _from_whole(whole: torch.Tensor, *, mesh: DeviceMesh, rank: int, dim: int) -> Any:
    parts = list(whole.view(torch.uint8).chunk(mesh.size(), 0)) if dim == 0 else None
    local = parts[rank].view(whole.dtype) if parts else _columns(whole, mesh.size(), rank)
    return DTensor.from_local(
        local.clone(),
        mesh,
        [Shard(dim)],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


def _columns(whole: torch.Tensor, world: int, rank: int) -> torch.Tensor:
    raw = whole.view(torch.uint8).reshape(*whole.shape, whole.dtype.itemsize)
    return raw.chunk(world, 1)[rank].contiguous().flatten(1).view(whole.dtype)
