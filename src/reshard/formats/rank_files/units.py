"""Which parameters FSDP1 laid end to end in which flat tensor, from their lengths alone.

    parameters    embed   a.q a.up   b.q b.up   norm
    wrapped               |-- a --|  |-- b --|
    flat tensors  0: embed norm    1: a.q a.up    2: b.q b.up

The root's flat tensor comes first and has what no wrapped module has; the others follow in the
model's order. Each is padded by less than the number of its parts. Modules wrapped within wrapped
ones, as policies for LoRA make them, are not looked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

_Span = tuple[int, int]


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
            rest = [at for at in range(len(names)) if not any(a <= at < b for a, b in choice)]
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
    spans = _modules(names)
    fitting: dict[int, list[_Span]] = {}
    for size in {*sizes}:
        fitting[size] = [s for s in spans if _fits(sum(numels[slice(*s)]), size, parts)]

    @cache
    def count(unit: int, start: int) -> int:
        """How many ways there are for the units from `unit` on, of two at most."""
        if unit == len(sizes):
            return 1
        found = 0
        for span in fitting[sizes[unit]]:
            found += count(unit + 1, span[1]) if span[0] >= start else 0
            if found > 1:
                return 2
        return found

    # From the last unit on: the depth of a call is then one.
    for unit in reversed(range(len(sizes))):
        for start in {0, *(span[1] for span in spans)}:
            count(unit, start)
    total = count(0, 0)
    if total != 1:
        return [] if total == 0 else None
    way: list[_Span] = []
    for unit, size in enumerate(sizes):
        start = way[-1][1] if way else 0
        way += [s for s in fitting[size] if s[0] >= start and count(unit + 1, s[1])]
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
