"""The other names of a save's weights, below stage 3."""

from __future__ import annotations

from collections.abc import Mapping

from reshard.containers.torch import TensorRef
from reshard.core.tensors import Entry
from reshard.formats.deepspeed.parse import ModelFile


def other_names(model: ModelFile, entries: Mapping[str, Entry]) -> dict[str, str]:
    """Other names of stored weights: alias -> stored name.

    Stated since DeepSpeed 0.9.2. Before, two names of one place in the module's storage. Before
    0.19.6 empty parameters were stated to be tied to one another: those are not.
    """
    module = model.module
    if model.shared is not None:
        return {
            alias: stored
            for alias, stored in model.shared.items()
            if alias not in entries and not (alias in module and _empty(module[alias]))
        }
    places: dict[tuple[object, ...], str] = {}
    for name in [*(name for name in module if name in entries), *module]:
        tensor = module[name]
        if not _empty(tensor):
            places.setdefault(_place(tensor), name)
    return {
        name: places[_place(tensor)]
        for name, tensor in module.items()
        if places.get(_place(tensor), name) != name and name not in entries
    }


def _empty(tensor: TensorRef) -> bool:
    return 0 in tensor.shape


def _place(tensor: TensorRef) -> tuple[object, ...]:
    """Where it lies: a storage's number counts within its file."""
    return tensor.extent.file, tensor.storage, tensor.dtype, tensor.shape, tensor.strides
