"""Flat tensors laid end to end, and the entries that are cut out of them."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from msgspec.structs import replace

from reshard.containers.torch import TensorRef
from reshard.core.tensors import Entry, Extent, Fragment, TensorKind, TensorSpec, flat
from reshard.core.tiling import proven
from reshard.errors import FormatError


class FlatSpace:
    """One-dimensional tensors as one run of elements, in the order given."""

    def __init__(self, parts: Sequence[TensorRef]) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(part.shape[0] for part in parts)]

    @property
    def numel(self) -> int:
        return self._starts[-1]

    def fragments(self, start: int, length: int, numel: int, at: int) -> list[Fragment]:
        """Elements `[start, start + length)` as the elements from `at` on of a tensor of `numel`.

        One fragment for each part that the range touches. The range must lie inside the space.
        """
        found = []
        index = bisect.bisect_right(self._starts, start) - 1
        stop = start + length
        while start < stop:
            part = self._parts[index]
            end = min(stop, self._starts[index + 1])
            if end > start:
                itemsize = part.dtype.itemsize
                skip = (start - self._starts[index]) * itemsize
                extent = Extent(
                    part.extent.file, part.extent.offset + skip, (end - start) * itemsize
                )
                found.append(Fragment(flat(numel, at, end - start), extent, part.dtype))
                at += end - start
                start = end
            index += 1
        return found


def stored_entry(name: str, tensor: TensorRef, kind: TensorKind) -> Entry:
    """An entry of a tensor that a file holds whole."""
    spec = TensorSpec(name, tensor.dtype, tensor.shape)
    return proven(spec, (tensor.fragment(),) if spec.numel else (), kind)


def flat_entry(spec: TensorSpec, tensor: TensorRef) -> Entry:
    """A parameter whose elements a tensor holds in row-major order, whatever its own shape."""
    return proven(spec, [tensor.fragment(flat(spec.numel, 0, spec.numel))], "parameter")


def in_module_order(
    entries: Mapping[str, Entry], aliases: Mapping[str, str], order: Iterable[str]
) -> dict[str, Entry]:
    """The entries in the order of the module's state dict, with their other names.

    Raises `FormatError` where an alias names a tensor that is not there.
    """
    names: dict[str, list[str]] = {}
    for alias, stored in aliases.items():
        if stored not in entries:
            raise FormatError(f"it is tied to {stored!r}, which is missing.", tensor=alias)
        names.setdefault(stored, []).append(alias)
    position = {name: number for number, name in enumerate(order)}
    ordered = sorted(entries, key=lambda name: position.get(name, len(position)))
    return {name: replace(entries[name], aliases=tuple(names.get(name, ()))) for name in ordered}
