"""Write `.metadata` without torch: the pickle that torch's own classes would make.

A pickle names classes and states their fields; only who loads it needs the classes. The fields
are those of torch 2.13 (torch/distributed/checkpoint/metadata.py, filesystem.py); the names are
the same in every torch since 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reshard.containers.dcp.metadata import ALIASES, Location, Metadata, StoredTensor
from reshard.containers.torch.pickler import Again, Call, Instance, Name, Pairs, Pickler
from reshard.core.packed import Packed, Packing
from reshard.core.tensors import Shape

#: Steps in the nested state dict; a number is one of a list's.
StatePath = tuple[str | int, ...]

_METADATA = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"
# Items between two APPENDS or SETITEMS, as in Python's own pickler: a reader's stack stays small.
_BATCH = 1000


def dump(metadata: Metadata, paths: Mapping[str, StatePath]) -> bytes | Packed:
    """The bytes of a `.metadata` file, which lists each chunk and each object with one copy.

    `paths` are the places in the nested state dict of those keys that are not at its top.
    An alias is one more key with the same chunks, which lie where the tensor's lie; the field
    `ALIASES`, which torch does not look at, says which keys are aliases.
    """
    fields: dict[str, object] = {
        "state_dict_metadata": Pairs(_described(metadata)),
        "planner_data": Pairs(_placed(metadata, paths)),
        "storage_data": Pairs(_stored(metadata)),
        "version": _VERSION,
    }
    if metadata.aliases:
        fields[ALIASES] = dict(metadata.aliases)
    packing = Packing()
    pickler = Pickler(memo=True, batch=_BATCH, sink=packing.add)
    pickler.put(_instance("Metadata", **fields))
    packing.add(pickler.finish())
    return packing.done()


def _tensors(metadata: Metadata) -> Iterator[tuple[str, StoredTensor]]:
    """Every tensor, then every alias with its tensor."""
    yield from metadata.tensors.items()
    for alias, name in metadata.aliases.items():
        yield alias, metadata.tensors[name]


def _described(metadata: Metadata) -> Iterator[tuple[str, Instance]]:
    for key, tensor in _tensors(metadata):
        yield key, _tensor(tensor)
    for key in metadata.objects:
        yield key, _instance("BytesStorageMetadata")


def _placed(
    metadata: Metadata, paths: Mapping[str, StatePath]
) -> Iterator[tuple[str, tuple[object, ...]]]:
    """The keys' paths, in the order that torch writes them: aliases before objects."""
    for key in (*metadata.tensors, *metadata.aliases, *metadata.objects):
        path = paths.get(key, (key,))
        # Names that only this file states are written twice, so that a reader notices a flipped
        # bit. Without aliases the file is as torch writes it for a flat state dict: each name once.
        twice = bool(metadata.aliases)
        yield key, tuple(Again(s) if twice and isinstance(s, str) else s for s in path)


def _stored(metadata: Metadata) -> Iterator[tuple[Instance, Instance]]:
    for key, tensor in _tensors(metadata):
        for index, chunk in enumerate(tensor.chunks):
            place = _instance("MetadataIndex", fqn=key, offset=_size(chunk.offsets), index=index)
            yield place, _location(chunk.copies[0])
    for key, copies in metadata.objects.items():
        yield _instance("MetadataIndex", fqn=key, offset=None, index=None), _location(copies[0])


def _tensor(tensor: StoredTensor) -> Instance:
    chunks = [
        _instance("ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes))
        for chunk in tensor.chunks
    ]
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    # The value of _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.
    contiguous = Call(Name(_METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    properties = Instance(
        Name(_METADATA, "TensorProperties"),
        (Name("torch", tensor.dtype), layout, False, contiguous, False),
    )
    return _instance(
        "TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=chunks
    )


def _location(location: Location) -> Instance:
    fields = {
        "relative_path": location.file,
        "offset": location.offset,
        "length": location.nbytes,
    }
    return Instance(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)


def _instance(kind: str, **fields: object) -> Instance:
    return Instance(Name(_METADATA, kind), fields)


def _size(shape: Shape) -> Call:
    return Call(Name("torch", "Size"), (shape,))
