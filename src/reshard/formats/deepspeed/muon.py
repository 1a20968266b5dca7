"""Muon's momentum under ZeRO-1 and 2: a rank keeps that of whole parameters.

    a group, padded      | a        | b               | c    |  |
    partitions           | rank 0          | rank 1           |
    momentum_buffer      rank 0: a, b        rank 1: b, c          each whole, end to end

It needs whole matrices, so a rank keeps the momentum of every parameter of which its partition has
an element; what two ranks keep is the same. With its optimizer offloaded to the CPU, and under
ZeRO-3, Muon keeps its momentum as Adam keeps moments, cut as the masters are. DeepSpeed 0.19.8:
runtime/zero/stage_1_and_2.py (`_muon_momentum_buffer`, `get_partition_info`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

from reshard.core.tensors import Entry, TensorSpec
from reshard.core.tiling import proven
from reshard.formats.deepspeed import proof
from reshard.formats.deepspeed.experts import holds_experts
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.flat import flat_space
from reshard.formats.deepspeed.wrapped import Wrapped
from reshard.storage.local import Sources

#: The kind of moment that Muon keeps.
MOMENTUM = "momentum_buffer"


def of_whole_parameters(
    number: int, saved: Saved, wrapped: Sequence[Wrapped], sources: Sources
) -> dict[str, Entry] | None:
    """The momentum of the parameters of a group, of which each rank holds some whole; None where
    the lengths are not those, as where it is cut as the masters are.

    Raises `FormatError` where two ranks that hold a parameter's momentum differ in it.
    """
    shapes = saved.model[0].groups[number]
    if holds_experts(shapes):
        return None
    held = _held(number, saved)
    spaces = [
        flat_space([one.flat(number, MOMENTUM)] if MOMENTUM in one.kinds(number) else [])
        for one in wrapped
    ]
    lengths = [sum(math.prod(shapes[name]) for name in names) for names in held]
    if [space.numel for space in spaces] != lengths:
        return None
    dtype = wrapped[0].flat(number, MOMENTUM).dtype
    entries: dict[str, Entry] = {}
    for space, names in zip(spaces, held, strict=True):
        at = 0
        for name in names:
            spec = TensorSpec(name, dtype, shapes[name])
            entry = proven(spec, space.fragments(at, spec.numel, spec.numel, 0))
            at += spec.numel
            if name in entries:
                proof.check_replicas(entries[name], entry, sources)
            entries.setdefault(name, entry)
    return {name: entries[name] for name in shapes}


def _held(number: int, saved: Saved) -> list[list[str]]:
    """Of each rank the parameters of a group of which its partition has an element."""
    shapes, optim = saved.model[0].groups[number], saved.optim
    paddings = optim[0].paddings[number] if optim[0].paddings is not None else (0,) * len(shapes)
    sizes = [math.prod(shape) for shape in shapes.values()]
    steps = (size + padding for size, padding in zip(sizes, paddings, strict=True))
    starts = list(accumulate(steps, initial=0))[:-1]
    # Rank 0's is as long as the others' before their padding was dropped, or holds all there is.
    partition = optim[0].flats[number].shape[0]
    return [
        [
            name
            for name, start, size in zip(shapes, starts, sizes, strict=True)
            if start < (rank + 1) * partition and start + size > rank * partition
        ]
        for rank in range(len(optim))
    ]
