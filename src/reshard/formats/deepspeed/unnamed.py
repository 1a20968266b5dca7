"""The optimizer of a save without ZeRO: shaped tensors without names, in the model file.

    optimizer                   fp32: torch's own state dict; the module's weights are the masters
    optimizer
      optimizer_state_dict      bf16, fp16 (FP16_UnfusedOptimizer): the same
      fp32_groups[g][k]         the master of the k-th parameter of group g
      cur_scale, ..             the loss scaler
    optimizer
      fp32_groups_flat[g]       bf16, fp16 of a fused optimizer (FP16_Optimizer): the masters of
                                group g end to end; moments alike

The file does not say which parameter a tensor belongs to. Masters round to what the module holds,
so their values identify them, and cut them out of flat tensors; without masters only shapes and
order do, see `reshard.naming.order`. If these do not suffice, the state is refused. DeepSpeed
0.19.8: runtime/fp16/unfused_optimizer.py, fused_optimizer.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from msgspec.structs import replace

from reshard.containers.torch import Opaque, TensorRef
from reshard.containers.torch.optimizer import Key, OptimizerDict, ParamState, parse
from reshard.containers.torch.plain import PlainData
from reshard.core.catalog import Catalog
from reshard.core.dtypes import DType
from reshard.core.findings import state_named_by_order
from reshard.core.state import Group, TrainingState
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import FormatError, UnsupportedError
from reshard.formats.deepspeed.aliases import other_names
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.flat import flat_entry, stored_entry
from reshard.formats.deepspeed.parse import ModelFile
from reshard.formats.deepspeed.wrapped import refuse_sharded, scaling
from reshard.formats.optimizer_file import shape_of
from reshard.naming.order import groups_in_order
from reshard.storage.local import Sources

_T = TypeVar("_T")
# Elements of a tensor that stand for it: so many from its start, and from its middle.
_SAMPLE = 64


def masters(saved: Saved, sources: Sources) -> dict[str, Entry] | None:
    """The masters of a 16-bit run, identified by their values; None where the values do not
    suffice."""
    model = _cut(saved, sources)
    names = None if model is None else _by_values(model, saved, sources)
    if model is None or names is None:
        return None
    found = {}
    for name, tensor in zip(_flattened(names), _flattened(model.masters), strict=True):
        found[name] = flat_entry(TensorSpec(name, tensor.dtype, tensor.shape), tensor)
    return found


def read(
    saved: Sequence[Saved], top: Mapping[str, object], catalog: Catalog, plain: PlainData
) -> TrainingState:
    """The state in `top`, the keys of the model file, under the names of the model's parameters.

    Raises `UnsupportedError` where no file states which parameters they belong to.
    """
    model = saved[0].model[0]
    if len(saved) > 1:
        raise _no_names(model, "tensor parallel ranks hold it")
    if saved[0].experts:
        raise _no_names(model, "that of the experts lies in other files")
    optimizer = top["optimizer"]
    if not isinstance(optimizer, dict):
        raise FormatError("its optimizer is not a dict.", path=model.path)
    wrapped = "optimizer_state_dict" in optimizer
    inner = parse(optimizer["optimizer_state_dict"] if wrapped else optimizer, plain, model.path)
    if model.flat_masters:
        shaped = _cut(saved[0], plain.sources)
        if shaped is None:
            raise _no_names(model, "the values of its flat masters are not those of the module")
        inner, model = _unflattened(inner, shaped), shaped
    if wrapped and [len(g) for g in model.masters] != [len(g.params) for g in inner.groups]:
        raise FormatError("it does not have a master for each parameter.", path=model.path)
    names = (
        _by_values(model, saved[0], plain.sources)
        if wrapped
        else groups_in_order(
            [[shape_of(inner, key) for key in group.params] for group in inner.groups],
            [(name, tensor.shape) for name, tensor in _module(saved[0]).items()],
        )
    )
    if names is None:
        by = "the order and the values" if wrapped else "the order and the shapes"
        raise _no_names(model, f"{by} of its parameters fit none of the model's or several ways")
    groups = [
        Group(tuple(of), group.hyperparameters)
        for of, group in zip(names, inner.groups, strict=True)
    ]
    named = {
        name: state
        for of, group in zip(names, inner.groups, strict=True)
        for name, key in zip(of, group.params, strict=True)
        if (state := inner.states.get(key)) is not None
    }
    moments: dict[str, dict[str, Entry]] = {}
    for name, state in named.items():
        for kind, tensor in refuse_sharded(state, model.path, name).items():
            entry = stored_entry(name, tensor, "parameter")
            if entry.spec.shape != catalog.entries[name].spec.shape:
                raise FormatError(
                    f"its {kind} is of shape {entry.spec.shape}.", path=model.path, tensor=name
                )
            moments.setdefault(kind, {})[name] = entry
    return TrainingState(
        moments=moments,
        masters={name: catalog.entries[name] for name in _flattened(names)} if wrapped else {},
        steps={name: state.step for name, state in named.items() if state.step is not None},
        groups=tuple(groups),
        scaler=scaling(optimizer, plain),
        records=model.records,
        findings=() if wrapped else (state_named_by_order(len(named)),),
        source="no ZeRO",
    )


def _cut(saved: Saved, sources: Sources) -> ModelFile | None:
    """The model file with flat masters cut into those of single parameters, where each begins with
    the values of the module's parameters of one shape; None where one does not."""
    model = saved.model[0]
    if not model.flat_masters:
        return model
    module = _module(saved)
    dtypes = {tensor.dtype.name: tensor.dtype for tensor in module.values()}
    if len(dtypes) != 1:
        return None
    (dtype,) = dtypes.values()
    looks = {_look(tensor, dtype, sources) for tensor in module.values()}
    shapes = sorted({tensor.shape for tensor in module.values()})
    groups = []
    for whole in model.flat_masters:
        at, pieces = 0, []
        while at < whole.shape[0]:
            every = [_piece(whole, at, shape) for shape in shapes]
            found = [t for t in every if t is not None and _look(t, dtype, sources) in looks]
            if len(found) != 1:
                return None
            pieces.append(found[0])
            at += math.prod(found[0].shape)
        groups.append(tuple(pieces))
    return replace(model, masters=tuple(groups))


def _piece(whole: TensorRef, start: int, shape: tuple[int, ...]) -> TensorRef | None:
    """The elements of a flat tensor from `start` on as a tensor; None where they are too few."""
    numel, size = math.prod(shape), whole.dtype.itemsize
    if not numel or start + numel > whole.shape[0]:
        return None
    offset = whole.extent.offset + start * size
    extent = replace(whole.extent, offset=offset, nbytes=numel * size)
    storage = (whole.storage[0], whole.storage[1] + start * size)
    return replace(whole, shape=shape, extent=extent, storage=storage)


def _unflattened(optimizer: OptimizerDict, model: ModelFile) -> OptimizerDict:
    """The optimizer of flat tensors as one of the parameters that were cut out of its masters."""
    states: dict[Key, ParamState] = {}
    groups = []
    for group, pieces, flats in zip(
        optimizer.groups, model.masters, model.flat_masters, strict=True
    ):
        numbers = range(len(states), len(states) + len(pieces))
        held = optimizer.states.get(group.params[0]) if len(group.params) == 1 else None
        if held is None:
            raise FormatError("its groups are not of one flat tensor each.", path=model.path)
        at = 0
        for number, piece in zip(numbers, pieces, strict=True):
            moments: dict[str, TensorRef | Opaque] = {}
            for kind, tensor in refuse_sharded(held, model.path, f"group {number}").items():
                cut = _piece(tensor, at, piece.shape) if tensor.shape == flats.shape else None
                if cut is None:
                    raise FormatError(f"its {kind} is not as long as its masters.", path=model.path)
                moments[kind] = cut
            states[number] = ParamState(moments, held.step)
            at += math.prod(piece.shape)
        groups.append(replace(group, params=tuple(numbers)))
    return OptimizerDict(states, tuple(groups))


def _flattened(groups: Iterable[Iterable[_T]]) -> list[_T]:
    return [item for group in groups for item in group]


def _module(saved: Saved) -> dict[str, TensorRef]:
    """The model's parameters, frozen ones too, each once, in the model's order."""
    model = saved.model[0]
    aliases = other_names(model, {})
    return {
        name: tensor
        for name, tensor in saved.module.items()
        if name not in aliases and name not in model.buffers
    }


def _by_values(model: ModelFile, saved: Saved, sources: Sources) -> list[list[str]] | None:
    """The parameter of each master: in the model's order, or in any order if no two look alike."""
    module = _module(saved)
    dtypes = {tensor.dtype.name: tensor.dtype for tensor in module.values()}
    if len(dtypes) != 1 or any(t.strides is not None for t in _flattened(model.masters)):
        return None
    (dtype,) = dtypes.values()
    looks = [[_look(master, dtype, sources) for master in group] for group in model.masters]
    held = [(name, _look(tensor, dtype, sources)) for name, tensor in module.items()]
    return groups_in_order(looks, held) or _in_any_order(looks, held)


def _in_any_order(
    looks: Sequence[Sequence[Hashable]], parts: Sequence[tuple[str, Hashable]]
) -> list[list[str]] | None:
    """The parameters in any order, if no two look alike."""
    owners: dict[Hashable, list[str]] = {}
    for name, look in parts:
        owners.setdefault(look, []).append(name)
    found = [[owners.get(look, []) for look in group] for group in looks]
    every = [name for group in found for names in group for name in names]
    if any(len(names) != 1 for group in found for names in group) or len(set(every)) != len(every):
        return None
    return [[names[0] for names in group] for group in found]


def _look(tensor: TensorRef, dtype: DType, sources: Sources) -> Hashable:
    """A tensor's shape, and some of its values in the precision of the module."""
    size = tensor.dtype.itemsize
    numel = tensor.extent.nbytes // size
    count = min(_SAMPLE, numel)
    values = []
    # Tensors that are not contiguous have no values here; only their shapes identify them.
    for start in (0, (numel - count) // 2) if tensor.strides is None else ():
        at = tensor.extent.offset + start * size
        data = sources.open(tensor.extent.file).read(at, count * size)
        values.append(np.frombuffer(data, tensor.dtype.numpy).astype(dtype.numpy).tobytes())
    return (tensor.shape, *values)


def _no_names(model: ModelFile, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"without ZeRO the optimizer's state is stored without names, and {why}: no file states "
        "which parameters it belongs to.",
        path=model.path,
        hint="Resume the run once with ZeRO stage 1 and save, or convert the weights alone.",
    )
