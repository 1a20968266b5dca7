"""Write `.metadata` without torch: the pickle that torch's own classes would make.

A pickle names classes and states their fields; only who loads it needs the classes. The fields
are those of torch 2.13 (torch/distributed/checkpoint/metadata.py, filesystem.py); the names are
the same in every torch since 2.4.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from msgspec import Struct

from reshard.containers.dcp.metadata import ALIASES, Location, Metadata, StoredTensor
from reshard.core.tensors import Shape

_METADATA = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"
# Items between two APPENDS or SETITEMS, as in Python's own pickler: a reader's stack stays small.
_BATCH = 1000


class _Name(Struct, frozen=True):
    """A class or function, by module and name."""

    module: str
    name: str


class _Call(Struct, frozen=True):
    """What `function(*args)` gives."""

    function: _Name
    args: tuple[object, ...]


class _Again(Struct, frozen=True):
    """A string that is written in full although it may occur before: a reader compares the two."""

    text: str


# By identity: instances are keys of a dict, and their fields are not hashable.
class _Instance(Struct, frozen=True, eq=False):
    """An instance of `kind` whose `__setstate__` is given, or whose fields are, `state`."""

    kind: _Name
    state: object


def dump(metadata: Metadata, paths: Mapping[str, tuple[str | int, ...]] | None = None) -> bytes:
    """The bytes of a `.metadata` file, which lists each chunk and each object with one copy.

    `paths`, where given, go before the metadata's own, whose steps are all texts.
    An alias is one more key with the same chunks, which lie where the tensor's lie; the field
    `ALIASES`, which torch does not look at, says which keys are aliases.
    """
    tensors = {**metadata.tensors}
    tensors.update((alias, tensors[name]) for alias, name in metadata.aliases.items())
    stored = {
        _instance("MetadataIndex", fqn=key, offset=_size(chunk.offsets), index=index):
            _location(chunk.copies[0])
        for key, tensor in tensors.items()
        for index, chunk in enumerate(tensor.chunks)
    }  # fmt: skip
    stored.update(
        (_instance("MetadataIndex", fqn=key, offset=None, index=None), _location(copies[0]))
        for key, copies in metadata.objects.items()
    )
    described = {key: _tensor(tensor) for key, tensor in tensors.items()}
    described.update((key, _instance("BytesStorageMetadata")) for key in metadata.objects)
    steps: Mapping[str, tuple[str | int, ...]] = metadata.paths if paths is None else paths
    fields: dict[str, object] = {
        "state_dict_metadata": described,
        "planner_data": dict(steps),
        "storage_data": stored,
        "version": _VERSION,
    }
    if metadata.aliases:
        fields[ALIASES] = dict(metadata.aliases)
        # Names that only this file states are written twice, so that a reader notices a flipped
        # bit. Without aliases the file is as torch writes it for a flat state dict: each name once.
        fields["planner_data"] = {
            key: tuple(_Again(step) if isinstance(step, str) else step for step in path)
            for key, path in steps.items()
        }
    pickler = _Pickler()
    pickler.put(_instance("Metadata", **fields))
    return pickler.finish()


def _tensor(tensor: StoredTensor) -> _Instance:
    chunks = [
        _instance("ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes))
        for chunk in tensor.chunks
    ]
    layout = _Call(_Name("torch.serialization", "_get_layout"), ("torch.strided",))
    # The value of _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.
    contiguous = _Call(_Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = _Instance(
        _Name(_METADATA, "TensorProperties"),
        (_Name("torch", tensor.dtype), layout, False, contiguous, False),
    )
    return _instance(
        "TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=chunks
    )


def _location(location: Location) -> _Instance:
    fields = {
        "relative_path": location.file,
        "offset": location.offset,
        "length": location.nbytes,
    }
    return _Instance(_Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)


def _instance(kind: str, **fields: object) -> _Instance:
    return _Instance(_Name(_METADATA, kind), fields)


def _size(shape: Shape) -> _Call:
    return _Call(_Name("torch", "Size"), (shape,))


class _Pickler:
    """Writes values in protocol 2. Names and strings that recur are written once."""

    def __init__(self) -> None:
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[_Name | str, int] = {}

    def finish(self) -> bytes:
        return bytes(self._out + b".")

    def put(self, value: object) -> None:
        if value is None:
            self._out += b"N"
        elif isinstance(value, bool):
            self._out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self._put_integer(value)
        elif isinstance(value, str | _Name):
            self._put_once(value)
        elif isinstance(value, _Again):
            self._put_text(value.text)
        elif isinstance(value, tuple):
            self._out += b"("
            for item in value:
                self.put(item)
            self._out += b"t"
        elif isinstance(value, list):
            self._out += b"]"
            self._put_items([(item,) for item in value], b"e")
        elif isinstance(value, dict):
            self._out += b"}"
            self._put_items(list(value.items()), b"u")
        elif isinstance(value, _Call):
            self.put(value.function)
            self.put(value.args)
            self._out += b"R"
        elif isinstance(value, _Instance):
            self.put(value.kind)
            self._out += b")\x81"
            self.put(value.state)
            self._out += b"b"
        else:
            raise TypeError(f"{type(value).__name__} is not part of a metadata file")

    def _put_integer(self, value: int) -> None:
        if value < 1 << 31:
            self._out += b"J" + struct.pack("<l", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
            self._out += b"\x8a" + bytes([len(raw)]) + raw

    def _put_once(self, value: _Name | str) -> None:
        known = self._memo.get(value)
        if known is not None:
            self._out += b"j" + struct.pack("<L", known)
            return
        if isinstance(value, _Name):
            self._out += f"c{value.module}\n{value.name}\n".encode()
        else:
            self._put_text(value)
        self._out += b"r" + struct.pack("<L", len(self._memo))
        self._memo[value] = len(self._memo)

    def _put_text(self, text: str) -> None:
        raw = text.encode()
        self._out += b"X" + struct.pack("<L", len(raw)) + raw

    def _put_items(self, items: list[tuple[object, ...]], end: bytes) -> None:
        for start in range(0, len(items), _BATCH):
            self._out += b"("
            for item in items[start : start + _BATCH]:
                for value in item:
                    self.put(value)
            self._out += end
