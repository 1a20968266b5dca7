"""The plain data in what a torch.save stream holds: settings, counters, a scheduler's state.

Objects and tensors that are not numbers are left out, each listed by its path.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct, field

from reshard.containers.torch.records import Opaque, TensorRef
from reshard.core.dtypes import DType
from reshard.storage.local import Sources

# Dicts in dicts, and values altogether. A small file can hold a list of two of the list before, a
# hundred times over; what a run keeps beside its tensors has a few hundred values.
_MAX_DEPTH, _MAX_VALUES = 16, 100_000


class PlainData(Struct):
    """Plain data from values, and the paths of everything else."""

    sources: Sources
    left_out: dict[str, None] = field(default_factory=dict)
    seen: int = 0

    def take(self, value: object, path: str = "") -> object:
        """The plain data in a value; None in place of anything else, which is listed.

        A tensor of one element is its number, a tuple stays a tuple. Items of a dict that are not
        plain are not there.
        """
        self.seen = 0
        return self._take(value, path, _MAX_DEPTH)

    def mapping(self, value: object, path: str = "") -> dict[str, object]:
        """The plain data of a dict; empty where the value is not a dict."""
        taken = self.take(value, path) if isinstance(value, Mapping) else {}
        return {str(key): item for key, item in taken.items()} if isinstance(taken, dict) else {}

    def state_dict(self, value: object, path: str) -> dict[str, object] | None:
        """The plain data of a state dict; None if there is none, or an object, which is listed."""
        if value is None or isinstance(value, dict):
            return None if value is None else self.mapping(value, path)
        self.leave(f"{path} (an object)")
        return None

    def leave(self, what: str) -> None:
        """List what is left out; every rank's file holds the same."""
        if what not in self.left_out:
            self.left_out[what] = None

    def _take(self, value: object, path: str, depth: int) -> object:
        self.seen += 1
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if depth == 0 or self.seen > _MAX_VALUES:
            self._leave(path, "nested too deeply or too large")
            return None
        if isinstance(value, dict):
            return {
                key: taken
                for key, item in value.items()
                if isinstance(key, str | int)
                for taken in (self._take(item, _step(path, key), depth - 1),)
                if taken is not None or item is None
            }
        if isinstance(value, list | tuple):
            items = [self._take(item, _step(path, at), depth - 1) for at, item in enumerate(value)]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, TensorRef):
            if value.shape in ((), (1,)):
                return number(value, self.sources)
            self._leave(path, f"a tensor of shape {value.shape}")
        elif isinstance(value, Opaque):
            self._leave(path, value.describe())
        elif isinstance(value, DType):
            self._leave(path, f"the dtype {value.name}")
        else:
            self._leave(path, f"a {type(value).__name__}")
        return None

    def _leave(self, path: str, what: str) -> None:
        # A list of a million objects is one line.
        if len(self.left_out) < _MAX_VALUES:
            self.leave(f"{path} ({what})")


def _step(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def number(tensor: TensorRef, sources: Sources) -> int | float | bool:
    """The only element of a tensor, read from its file."""
    import numpy as np

    extent = tensor.extent
    data = sources.open(extent.file).read(extent.offset, tensor.dtype.itemsize)
    found: int | float | bool = np.frombuffer(data, tensor.dtype.numpy)[0].item()
    return found
