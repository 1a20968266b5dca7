"""The tensors of one stream as entries: names that share a storage are one tensor."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reshard.containers.torch.records import TensorRef
from reshard.core.tensors import Entry, TensorSpec
from reshard.core.tiling import proven


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
