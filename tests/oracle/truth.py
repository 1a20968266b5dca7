"""What a running DeepSpeed engine holds, gathered over its ranks without reading any file.

The master of a parameter is found by memory, not by DeepSpeed's own maps (which `save_checkpoint`
and `safe_get_full_fp32_param` share, and which are wrong with `round_robin_gradients`): the
low-precision parameter the module computes with is a view into the optimizer's flat
low-precision buffer, and the flat fp32 buffer has the same layout, element for element. So the
view's distance from the start of its buffer is the master's offset.

    stage 1, 2     bit16 group   [ param 0 | param 1 .......... | param 2 | padding ]   one, whole
                   fp32 rank 0   [ ................. ]  fp32 rank 1  [ .............. ]  its halves
    stage 3        lp sub-group  [ piece of param 0 | piece of param 1 ]   one for each rank
                   fp32          [ piece of param 0 | piece of param 1 ]   of the same rank
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class Truth:
    """Every tensor of a training run at one moment, in full shape, on every rank.

    `masters`: what the optimizer updates, by name, for every trainable parameter (tied ones
    once). `module`: what the module computes with, by every name of its state dict, aliases and
    persistent buffers included. `frozen` holds, as DeepSpeed counts since 0.19.6, whatever the
    optimizer does not own: also parameters without elements. `groups`: the names of each of the
    optimizer's parameter groups, empty where DeepSpeed made the groups itself (Muon).
    """

    masters: dict[str, Tensor]
    module: dict[str, Tensor]
    buffers: tuple[str, ...]
    frozen: tuple[str, ...]
    tied: dict[str, str]
    groups: tuple[tuple[str, ...], ...]


def is_optimized(parameter: nn.Parameter) -> bool:
    """Whether the optimizer owns a master of `parameter`."""
    numel = getattr(parameter, "ds_numel", parameter.numel())
    return bool(parameter.requires_grad) and numel > 0


def gather(engine: Any, groups: tuple[tuple[str, ...], ...]) -> Truth:
    """The truth of `engine`. A collective: every rank calls it, every rank gets all of it."""
    module: nn.Module = engine.module
    stage = int(engine.zero_optimization_stage())
    parameters = dict(module.named_parameters())
    state = {
        name: _module_value(tensor, stage)
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    first = {id(parameter): name for name, parameter in parameters.items()}
    every = module.named_parameters(remove_duplicate=False)
    tied = {name: first[id(parameter)] for name, parameter in every if name not in parameters}
    trainable = {name: p for name, p in parameters.items() if is_optimized(p)}
    masters = _masters(engine.optimizer, trainable, stage)
    for name, master in masters.items():
        # The optimizer casts its master to the module's type after each step.
        if not torch.equal(master.to(state[name].dtype), state[name]):
            raise RuntimeError(f"{name}: the master gathered is not what the module computes with")
    return Truth(
        masters,
        state,
        tuple(name for name in state if name not in parameters and name not in tied),
        tuple(name for name in parameters if name not in trainable),
        tied,
        groups,
    )


def _module_value(tensor: Tensor, stage: int) -> Tensor:
    if stage < 3 or not hasattr(tensor, "ds_id"):
        return tensor.detach().cpu().clone().contiguous()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().cpu().clone().contiguous()


def _masters(optimizer: Any, trainable: dict[str, nn.Parameter], stage: int) -> dict[str, Tensor]:
    if stage == 3:
        return _masters_stage3(optimizer, trainable)
    if stage in (1, 2):
        if hasattr(optimizer, "bf16_groups_flat"):  # BF16_Optimizer
            lows, highs = optimizer.bf16_groups_flat, optimizer.fp32_groups_flat_partition
        else:
            lows, highs = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        return _masters_stage12(lows, highs, trainable)
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: a list of masters a group
        pairs = zip(_chain(optimizer.fp16_groups), _chain(optimizer.fp32_groups), strict=True)
        by_id = {id(low): high for low, high in pairs}
        return {name: by_id[id(p)].detach().cpu().clone() for name, p in trainable.items()}
    if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer: flat groups, each rank has all
        lows, highs = optimizer.fp16_groups_flat, optimizer.fp32_groups_flat
        return _from_flat([high.detach().cpu() for high in highs], lows, trainable)
    return {name: p.detach().cpu().clone() for name, p in trainable.items()}


def _masters_stage12(
    lows: list[Tensor], highs: list[Tensor], trainable: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """`lows` are whole flat groups; `highs` this rank's equal part of each, padding included."""
    flats = [torch.cat(_all_gather(high.detach().cpu())) for high in highs]
    return _from_flat(flats, lows, trainable)


def _from_flat(
    flats: list[Tensor], lows: list[Tensor], trainable: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """Masters out of whole flat groups, each laid out as its low-precision group is."""
    masters = {}
    for name, parameter in trainable.items():
        group, offset = _locate(parameter.data, lows)
        flat = flats[group]
        if flat.numel() != lows[group].numel():
            raise RuntimeError(f"group {group}: {flat.numel()} masters, {lows[group].numel()} low")
        master = flat[offset : offset + parameter.numel()]
        masters[name] = master.reshape(parameter.shape).clone()
    return masters


def _masters_stage3(optimizer: Any, trainable: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    lows = list(optimizer.fp16_partitioned_groups_flat)
    flats = [_all_gather(high.detach().cpu()) for high in optimizer.fp32_partitioned_groups_flat]
    masters = {}
    for name, parameter in trainable.items():
        group, offset = _locate(parameter.ds_tensor.data, lows)
        pieces = [flat[offset : offset + parameter.ds_tensor.ds_numel] for flat in flats[group]]
        master = torch.cat(pieces)[: parameter.ds_numel]
        masters[name] = master.reshape(parameter.ds_shape).clone()
    return masters


def _locate(view: Tensor, buffers: list[Tensor]) -> tuple[int, int]:
    """The buffer that `view` is a view of, and the view's offset in it, in elements."""
    for index, buffer in enumerate(buffers):
        offset = view.data_ptr() - buffer.data_ptr()
        if 0 <= offset <= (buffer.numel() - view.numel()) * buffer.element_size():
            return index, offset // buffer.element_size()
    raise RuntimeError(f"a tensor of shape {tuple(view.shape)} lies in none of the flat buffers")


def _all_gather(mine: Tensor) -> list[Tensor]:
    theirs = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(theirs, mine)
    return theirs


def _chain(groups: list[list[Tensor]]) -> list[Tensor]:
    return [tensor for group in groups for tensor in group]
