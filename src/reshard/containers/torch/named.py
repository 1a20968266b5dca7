"""The tensors of one stream as entries: names that share a storage are one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from reshard.containers.torch.records import Opaque, TensorRef
from reshard.core.tensors import Entry, TensorSpec
from reshard.core.tiling import proven

# Dicts in dicts, and lists in lists, that are looked into.
_MAX_DEPTH = 6


def entries_of(tensors: Mapping[str, TensorRef]) -> dict[str, Entry]:
    """Tensors by name, each storage once; later names of the same elements become aliases."""
    entries: dict[str, Entry] = {}
    stored: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.extent.file, tensor.storage, tensor.dtype, tensor.shape, tensor.strides)
        first = stored.setdefault(key, name) if tensor.extent.nbytes else name
        if first != name:
            entries[first] = replace(entries[first], aliases=(*entries[first].aliases, name))
            continue
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        entries[name] = proven(spec, (tensor.fragment(),) if spec.numel else ())
    return entries


def lists_of_tensors(value: object, path: str = "", depth: int = _MAX_DEPTH) -> Iterator[str]:
    """The lists in dicts of dicts that hold tensors, which have no names there, by their own dotted
    names. A step or a loss that is stored as a tensor of one number does not count."""
    for key, inner in value.items() if isinstance(value, dict) and depth else ():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(inner, dict):
            yield from lists_of_tensors(inner, name, depth - 1)
        elif isinstance(inner, list | tuple) and _holds_tensors(inner, _MAX_DEPTH):
            yield name


def _holds_tensors(value: object, depth: int) -> bool:
    if isinstance(value, TensorRef):
        return bool(value.shape)
    if isinstance(value, Opaque):
        return value.is_tensor
    if not isinstance(value, dict | list | tuple) or not depth:
        return False
    inner = value.values() if isinstance(value, dict) else value
    return any(_holds_tensors(one, depth - 1) for one in inner)
