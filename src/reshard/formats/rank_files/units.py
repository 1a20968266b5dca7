"""Which parameters FSDP1 laid end to end in which flat tensor, from their lengths alone.

    parameters    embed   a.q a.up   b.q b.up   norm
    wrapped               |-- a --|  |-- b --|
    flat tensors  0: embed norm    1: a.q a.up    2: b.q b.up

The root's flat tensor comes first and has what no wrapped module has; the others follow in the
model's order. Each is padded by less than the number of its parts. Modules wrapped within wrapped
ones, as policies for LoRA make them, are not looked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

_Span = tuple[int, int]
# Modules that fit the lengths, over all flat tensors: 100 layers, each wrapped, make 10,000.
_MAX_FITTING = 500_000


def units_in_order(
    sizes: Sequence[int], parts: int, model: Mapping[str, int]
) -> list[list[str]] | None:
    """The parameters in each flat tensor; None where none or several ways fit.

    `sizes` are the lengths of the flat tensors, padding included, each a multiple of `parts`.
    `model` are the parameters and their elements, in the model's order.

    >>> model = {"embed": 9, "a.q": 4, "a.up": 3, "b.q": 4, "b.up": 3, "norm": 2}
    >>> units_in_order([12, 8, 8], 2, model)
    [['embed', 'norm'], ['a.q', 'a.up'], ['b.q', 'b.up']]
    >>> units_in_order([12, 8], 2, model) is None        # a or b
    True
    """
    names = list(model)
    numels = list(model.values())
    rooted = _choices(sizes[1:], parts, names, numels)
    whole = _choices(sizes, parts, names, numels)
    units: list[list[list[str]]] = []
    for spans, first in ((rooted, sizes[:1]), (whole, ())):
        if spans is None:
            return None
        for choice in spans:
            taken = bytearray(len(names))
            for start, stop in choice:
                taken[start:stop] = bytes([1]) * (stop - start)
            rest = [at for at, is_taken in enumerate(taken) if not is_taken]
            left = sum(numels[at] for at in rest)
            if bool(rest) == bool(first) and (not first or _fits(left, first[0], parts)):
                root = [[names[at] for at in rest]] if first else []
                way = [*root, *(names[start:stop] for start, stop in choice)]
                units += [way] if way not in units else []
    return units[0] if len(units) == 1 else None


def _fits(numel: int, size: int, parts: int) -> bool:
    return size - parts < numel <= size


def _choices(
    sizes: Sequence[int], parts: int, names: Sequence[str], numels: Sequence[int]
) -> list[tuple[_Span, ...]] | None:
    """The ways to find a module for each size, one after the other; None where there are several.

    A way is the range of parameters that each module has.
    """
    until = [0, *accumulate(numels)]
    by_total = sorted(
        (until[stop] - until[start], (start, stop)) for start, stop in _modules(names)
    )
    totals = [total for total, _ in by_total]
    slices = {
        size: slice(bisect_right(totals, size - parts), bisect_right(totals, size))
        for size in {*sizes}
    }
    if sum(slices[size].stop - slices[size].start for size in sizes) > _MAX_FITTING:
        return None
    fitting = {size: sorted(span for _, span in by_total[place]) for size, place in slices.items()}
    starts = {size: [start for start, _ in spans] for size, spans in fitting.items()}
    # Of each unit, for each module that fits: the ways to place the units from this one on, if none
    # before that module is taken; two of many.
    counts: list[list[int]] = [[]] * len(sizes)

    def ways(unit: int, start: int) -> int:
        if unit == len(sizes):
            return 1
        return counts[unit][bisect_left(starts[sizes[unit]], start)]

    for unit in reversed(range(len(sizes))):
        spans = fitting[sizes[unit]]
        found = [0] * (len(spans) + 1)
        for at in reversed(range(len(spans))):
            found[at] = min(2, found[at + 1] + ways(unit + 1, spans[at][1]))
        counts[unit] = found
    total = ways(0, 0)
    if total != 1:
        return [] if total == 0 else None
    way: list[_Span] = []
    for unit, size in enumerate(sizes):
        start = way[-1][1] if way else 0
        way += [s for s in fitting[size] if s[0] >= start and ways(unit + 1, s[1])]
    return [tuple(way)]


def _modules(names: Sequence[str]) -> list[_Span]:
    """The ranges of parameters that the modules have, but for the root: each once, in order."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    counts: dict[str, int] = {}
    for at, name in enumerate(names):
        module = name
        while "." in module:
            module = module.rpartition(".")[0]
            first.setdefault(module, at)
            last[module] = at
            counts[module] = counts.get(module, 0) + 1
    ranges = {
        (first[module], last[module] + 1)
        for module, count in counts.items()
        if count == last[module] + 1 - first[module]
    }
    return sorted(ranges)
