"""Write `.metadata` without torch: the pickle that torch's own classes would make.

A pickle names classes and states their fields; only who loads it needs the classes. The fields
are those of torch 2.13 (torch/distributed/checkpoint/metadata.py, filesystem.py); the names are
the same in every torch since 2.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reshard.containers.dcp.metadata import ALIASES, Location, Metadata, StoredTensor
from reshard.containers.torch.pickler import Again, Call, Instance, Name, Pairs, Pickler
from reshard.core.tensors import Shape

_METADATA = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"
# Items between two APPENDS or SETITEMS, as in Python's own pickler: a reader's stack stays small.
_BATCH = 1000


def dump(metadata: Metadata, paths: Mapping[str, tuple[str | int, ...]]) -> bytes:
    """The bytes of a `.metadata` file, which lists each chunk and each object with one copy.

    `paths` are the places of the keys in the nested state dict.
    An alias is one more key with the same chunks, which lie where the tensor's lie; the field
    `ALIASES`, which torch does not look at, says which keys are aliases.
    """
    tensors = {**metadata.tensors}
    tensors.update((alias, tensors[name]) for alias, name in metadata.aliases.items())
    fields: dict[str, object] = {
        "state_dict_metadata": Pairs(_described(tensors, metadata)),
        "planner_data": dict(paths),
        "storage_data": Pairs(_stored(tensors, metadata)),
        "version": _VERSION,
    }
    if metadata.aliases:
        fields[ALIASES] = dict(metadata.aliases)
        # Names that only this file states are written twice, so that a reader notices a flipped
        # bit. Without aliases the file is as torch writes it for a flat state dict: each name once.
        fields["planner_data"] = {
            key: tuple(Again(step) if isinstance(step, str) else step for step in path)
            for key, path in paths.items()
        }
    pickler = Pickler(memo=True, batch=_BATCH)
    pickler.put(_instance("Metadata", **fields))
    return pickler.finish()


def _described(
    tensors: Mapping[str, StoredTensor], metadata: Metadata
) -> Iterator[tuple[str, Instance]]:
    for key, tensor in tensors.items():
        yield key, _tensor(tensor)
    for key in metadata.objects:
        yield key, _instance("BytesStorageMetadata")


def _stored(
    tensors: Mapping[str, StoredTensor], metadata: Metadata
) -> Iterator[tuple[Instance, Instance]]:
    for key, tensor in tensors.items():
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
