"""FSDP1's own optimizer state: flat tensors, of which each rank has a part.

    use_orig_params=False    0: exp_avg [561]   1: exp_avg [824]   ..    one for each wrapped module
    use_orig_params=True     0: exp_avg [562]   7: exp_avg [239]   ..    one for each parameter of
                                                                         which the rank has a slice

`optimizer.state_dict()` numbers what FSDP1 made of the parameters. A wrapped module's are laid end
to end in the module's order, and padded at the end so that each rank has as much. The module's own
come first, then those of the modules in it that are wrapped. No file states which are: the lengths
do, where they fit in one way only (`units`). A parameter's slices follow each other, rank by rank.
torch 2.13: torch/distributed/fsdp/_flat_param.py.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import xxhash
from msgspec import Struct

from reshard.containers.distributed import Local, LocalFragment
from reshard.containers.torch import TensorRef
from reshard.containers.torch.optimizer import Key, OptimizerDict
from reshard.core import rearrange
from reshard.core.dtypes import DType
from reshard.core.state import tensor_name
from reshard.core.tensors import Box, Entry, Shape
from reshard.formats.optimizer_file import names_in_order
from reshard.formats.rank_files import join
from reshard.formats.rank_files.files import Saved
from reshard.formats.rank_files.state import State
from reshard.formats.rank_files.units import units_in_order
from reshard.storage.local import Sources


class Flattened(Struct, frozen=True):
    """The moments by kind and parameter; the parameters that each number stands for; checksums."""

    moments: Mapping[str, Mapping[str, Entry]]
    names: Mapping[Key, tuple[str, ...]]
    table: join.Table


class _Part(Struct, frozen=True):
    """A rank's optimizer, and which of the equal parts of a flat tensor it has."""

    found: OptimizerDict
    state: State
    at: int


def read(
    optimizers: Sequence[OptimizerDict],
    states: Sequence[State],
    model: Sequence[State],
    saved: Saved,
    sources: Sources,
) -> Flattened | None:
    """The moments that the ranks hold together, given what each holds and the model's own files.

    None where lengths and order fit none of the model's parameters, or several ways. Raises
    `FormatError` where ranks that should hold the same do not.
    """
    places = _places(model)
    if places is None:
        return None
    parts = [
        _Part(one, state, places[state.rank]) for one, state in zip(optimizers, states, strict=True)
    ]
    shapes = {
        name: value.shape
        for name, value in model[0].tensors.items()
        if value.dtype.floating and 0 not in value.shape
    }
    lengths = _lengths(parts, max(places.values()) + 1)
    if lengths is None:
        return None
    return _of_units(parts, lengths, shapes, model, saved, sources) or _of_slices(
        parts, lengths, shapes, saved, sources
    )


def _places(model: Sequence[State]) -> dict[int, int] | None:
    """Which of the equal parts each rank has: the ranks that hold the same box of the model's
    tensors have the same. None where no tensor tells all ranks apart that differ."""
    best: list[tuple[int, ...]] = []
    for name, value in model[0].tensors.items():
        if not isinstance(value, Local):
            continue
        offsets = []
        for state in model:
            here = state.tensors[name]
            boxes = [piece.box for piece in here.fragments] if isinstance(here, Local) else []
            offsets.append(boxes[0].offsets if len(boxes) == 1 and boxes[0].numel else None)
        known = [each for each in offsets if each is not None]
        if len(known) == len(model) and len({*known}) > len({*best}):
            best = known
    order = sorted({*best})
    counts = {offset: best.count(offset) for offset in order}
    if not best or len({*counts.values()}) > 1:
        return None
    return {state.rank: order.index(at) for state, at in zip(model, best, strict=True)}


def _lengths(parts: Sequence[_Part], count: int) -> dict[Key, list[int]] | None:
    """For each number, the elements in each part of the flat tensor; numbers without a state are
    left out. None where ranks with the same part differ, or a moment is not a flat tensor."""
    lengths: dict[Key, list[int]] = {}
    for part in parts:
        for key, state in part.found.states.items():
            held = lengths.setdefault(key, [0] * count)
            for tensor in state.moments.values():
                if not isinstance(tensor, TensorRef) or len(tensor.shape) != 1:
                    return None
                if held[part.at] not in (0, tensor.shape[0]) or tensor.strides is not None:
                    return None
                held[part.at] = tensor.shape[0]
    return lengths


def _of_units(
    parts: Sequence[_Part],
    lengths: Mapping[Key, Sequence[int]],
    shapes: Mapping[str, Shape],
    model: Sequence[State],
    saved: Saved,
    sources: Sources,
) -> Flattened | None:
    """The state as use_orig_params=False makes it: all parts of a flat tensor are equal."""
    groups = parts[0].found.groups
    equal = all(len({*held}) == 1 for held in lengths.values())
    if len(groups) != 1 or not equal or lengths.keys() != {*groups[0].params}:
        return None
    ranks = max(part.at for part in parts) + 1
    sizes = [lengths[key][0] * ranks for key in groups[0].params]
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    units = units_in_order(sizes, ranks, numels)
    if units is None:  # a module's tied parameter is in the file under both names
        copies = _copies(shapes, model, sources)
        alone = {name: numel for name, numel in numels.items() if name not in copies}
        units = units_in_order(sizes, ranks, alone) if copies else None
    if units is None:
        return None
    table = _joined(parts, lengths, saved, sources)
    moments: dict[str, dict[str, Entry]] = {}
    for key, names in zip(groups[0].params, units, strict=True):
        for kind in _kinds(parts, key):
            whole, at = table.entries[tensor_name(kind, str(key))], 0
            for name in names:
                box = Box(whole.spec.shape, (at,), (numels[name],))
                cut = rearrange.reshape(rearrange.crop(whole, box), shapes[name])
                moments.setdefault(kind, {})[name] = cut.renamed(name)
                at += numels[name]
    named = dict(zip(groups[0].params, map(tuple, units), strict=True))
    return Flattened(moments, named, table)


def _of_slices(
    parts: Sequence[_Part],
    lengths: Mapping[Key, Sequence[int]],
    shapes: Mapping[str, Shape],
    saved: Saved,
    sources: Sources,
) -> Flattened | None:
    """The state as use_orig_params=True makes it: a number for each parameter."""

    def numel(key: Key) -> Hashable:
        return sum(lengths[key]) if key in lengths else None

    known = [(name, math.prod(shape)) for name, shape in shapes.items()]
    names = names_in_order(parts[0].found, numel, known)
    if names is None or not lengths.keys() <= names.keys():
        return None
    table = _joined(parts, lengths, saved, sources)
    moments: dict[str, dict[str, Entry]] = {}
    for key in lengths:
        for kind in _kinds(parts, key):
            whole = table.entries[tensor_name(kind, str(key))]
            shaped = rearrange.reshape(whole, shapes[names[key]]).renamed(names[key])
            moments.setdefault(kind, {})[names[key]] = shaped
    return Flattened(moments, {key: (name,) for key, name in names.items()}, table)


def _kinds(parts: Sequence[_Part], key: Key) -> list[str]:
    """The kinds of moments of a number; not every rank has a part of them."""
    held = (part.found.states[key].moments for part in parts if key in part.found.states)
    return list(dict.fromkeys(kind for moments in held for kind in moments))


def _joined(
    parts: Sequence[_Part], lengths: Mapping[Key, Sequence[int]], saved: Saved, sources: Sources
) -> join.Table:
    """The flat tensors whole. Every rank states where its part lies in them."""
    kinds = {key: _kinds(parts, key) for key in lengths}
    states = []
    for part in parts:
        tensors: dict[str, TensorRef | Local] = {}
        for key, held in lengths.items():
            shape = (sum(held),)
            for kind in kinds[key]:
                state = part.found.states.get(key)
                ref = None if state is None else state.moments.get(kind)
                box = Box(shape, (sum(held[: part.at]),), (held[part.at],))
                pieces = (LocalFragment(box, ref),) if isinstance(ref, TensorRef) else ()
                dtype = _dtype(parts, key, kind)
                local = Local("flat tensor", dtype, shape, pieces, ("parts", *held))
                tensors[tensor_name(kind, str(key))] = local
        states.append(State(part.state.path, part.state.rank, tensors, part.state.records))
    return join.joined(states, saved, sources)


def _dtype(parts: Sequence[_Part], key: Key, kind: str) -> DType:
    held = (part.found.states[key].moments.get(kind) for part in parts if key in part.found.states)
    return next(tensor.dtype for tensor in held if isinstance(tensor, TensorRef))


def _copies(
    shapes: Mapping[str, Shape], model: Sequence[State], sources: Sources
) -> frozenset[str]:
    """The names of matrices that equal an earlier one, bit for bit, on every rank."""
    earlier: dict[tuple[Shape, str], list[str]] = {}
    found = []
    for name, shape in shapes.items():
        if len(shape) > 1:
            seen = xxhash.xxh3_128()
            for state in model:
                seen.update(join.beginning(state, state.tensors[name], sources))
            others = earlier.setdefault((shape, seen.hexdigest()), [])
            if any(_same(name, other, model, sources) for other in others):
                found.append(name)
            others.append(name)
    return frozenset(found)


def _same(name: str, other: str, model: Sequence[State], sources: Sources) -> bool:
    return all(
        join.same_parts(state, state.tensors[name], state.tensors[other], sources)
        for state in model
    )
