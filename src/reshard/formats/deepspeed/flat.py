"""Flat tensors laid end to end, and the entries that are cut out of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from reshard.containers.torch import TensorRef
from reshard.core.partition import FlatSpace
from reshard.core.tensors import Entry, TensorKind, TensorSpec, flat
from reshard.core.tiling import proven
from reshard.errors import FormatError


def flat_space(parts: Iterable[TensorRef]) -> FlatSpace:
    """One-dimensional tensors as one run of elements, in the order given."""
    return FlatSpace([part.fragment() for part in parts])


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
