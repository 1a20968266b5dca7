"""Persistent ids: how a torch.save pickle names its storages.

    ("storage", <class>, key, location, numel)                          zip
    ("storage", <class>, key, location, numel, view)                    legacy; view as below
    ("module", …)                                                       legacy; refused

`class` is a legacy storage class (`torch.FloatStorage`), whose elements `numel` counts, or
`torch.storage.UntypedStorage`: then it counts bytes. `location` is the device that held the
storage; it does not matter here. `view` is None or `(key, offset, numel)`: the elements of the
storage that a view onto it took, as torch before 0.4 wrote.
"""

from __future__ import annotations

from msgspec import Struct

from reshard.containers.torch.malformed import Malformed, show
from reshard.containers.torch.records import Global
from reshard.core import dtypes
from reshard.core.dtypes import DType

# Bytes an element of the storages whose dtypes reshard does not handle.
_OTHER_CLASSES = {
    "ComplexDoubleStorage": 16,
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
_MODULES = frozenset({"torch", "torch.storage", "torch.cuda"})
_UNTYPED = frozenset({"UntypedStorage", "_UntypedStorage"})
_MAX_NBYTES = 1 << 63
# Characters. Keys are numbers: counted from 0, in the old container addresses.
_MAX_KEY = 64


class StorageId(Struct, frozen=True):
    """A storage as a persistent id names it; `nbytes` is its size.

    `itemsize` is the bytes that one count of `numel` stands for, `view` the bytes
    `(start, nbytes)` of the storage that this id means (None: all of them).
    """

    key: str
    dtype: DType | None
    itemsize: int
    nbytes: int
    view: tuple[int, int] | None
    reason: str | None


def parse_storage_id(value: object) -> StorageId:
    """The storage that a persistent id names. Raises `Malformed`."""
    if not isinstance(value, tuple) or not value:
        raise Malformed("a persistent id is not a tuple")
    if value[0] == "module":
        raise Malformed("it holds a whole module with its source code, which is not supported")
    if value[0] != "storage" or len(value) not in (5, 6):
        raise Malformed(f"a persistent id is not of a storage, but {show(value[0])}")
    _, cls, key, _, numel = value[:5]
    if not isinstance(cls, Global) or not isinstance(key, str) or len(key) > _MAX_KEY:
        raise Malformed("a storage's class or key is not a short text")
    dtype, itemsize, reason = _element(cls.name)
    return StorageId(
        key,
        dtype,
        itemsize,
        _nbytes(numel, itemsize),
        _view(value[5], itemsize) if len(value) == 6 else None,
        reason,
    )


def is_storage_class(name: str) -> bool:
    """Whether a global is the class of a storage that reshard reads."""
    module, _, short = name.rpartition(".")
    return module in _MODULES and (short in _UNTYPED or dtypes.from_storage(short) is not None)


def _element(class_name: str) -> tuple[DType | None, int, str | None]:
    module, _, short = class_name.rpartition(".")
    if module not in _MODULES:
        raise Malformed(f"a storage is of the unknown class {show(class_name)}")
    if short in _UNTYPED:
        return None, 1, None
    dtype = dtypes.from_storage(short)
    if dtype is not None:
        return dtype, dtype.itemsize, None
    if short in _OTHER_CLASSES:
        return None, _OTHER_CLASSES[short], f"a tensor of a {class_name}"
    raise Malformed(f"a storage is of the unknown class {show(class_name)}")


def _nbytes(numel: object, itemsize: int) -> int:
    if type(numel) is not int or not 0 <= numel * itemsize < _MAX_NBYTES:
        raise Malformed(f"a storage has {show(numel)} elements")
    return numel * itemsize


def _view(view: object, itemsize: int) -> tuple[int, int] | None:
    if view is None:
        return None
    if not isinstance(view, tuple) or len(view) != 3:
        raise Malformed("a view of a storage is not a tuple of three")
    _, offset, numel = view
    return _nbytes(offset, itemsize), _nbytes(numel, itemsize)
