"""The `.metadata` of a DCP checkpoint as plain, checked data.

The file is a bare pickle of `torch.distributed.checkpoint.metadata.Metadata` (torch 2.13,
metadata.py and filesystem.py). Nothing of it is executed: the restricted reader gives records of
what was pickled, and `parsing` turns those into the types below, or raises.

    state_dict_metadata   key -> TensorStorageMetadata(properties, size, chunks), or
                                 BytesStorageMetadata: an object that is not a tensor
    planner_data          key -> path in the nested state dict; None where it was not flattened
    storage_data          MetadataIndex(fqn, offset) -> _StorageInfo(relative_path, offset, length)
    version               "1.0.0"; older torch writes none
    reshard_aliases       alias -> key of the same bytes; written by reshard alone

The three tables are compared with each other: the file has no checksum, and one flipped bit must
not lose or rename a tensor. If torch pickles a name once for all tables (a flat state dict), a
flipped bit in the name itself cannot be noticed here; a base model's names show it.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reshard.core.tensors import Shape

Path = tuple[str, ...]
#: The field of `.metadata` that says which keys are other names of a tensor.
ALIASES = "reshard_aliases"


class Location(Struct, frozen=True, gc=False):
    """Where an item lies: bytes `[offset, offset + nbytes)` of the file named `file`.

    `transforms` name what the bytes went through when they were written, the last one first.
    """

    file: str
    offset: int
    nbytes: int
    transforms: tuple[str, ...] = ()


class Chunk(Struct, frozen=True, gc=False):
    """Elements `[offsets, offsets + sizes)` of a tensor, and every copy of them that was saved.

    A checkpoint has one copy of a chunk; several writers without collectives leave one each.
    """

    offsets: Shape
    sizes: Shape
    copies: tuple[Location, ...]


class StoredTensor(Struct, frozen=True):
    """A tensor of the checkpoint. `dtype` is torch's name of the type, known to us or not."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


class Metadata(Struct, frozen=True):
    """What a checkpoint holds.

    `objects` are the keys that are not tensors, each with its copies: where its torch.save stream
    lies. `aliases` are other keys of tensors, and name the key in `tensors`. `paths` has every key.
    `unclaimed` are places (key, offsets) of items that no key has a chunk for. `flattened`: whether
    nested dicts were flattened; else one of `objects` may be a dict of tensors.
    """

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, tuple[Location, ...]]
    paths: Mapping[str, Path]
    version: str | None
    aliases: Mapping[str, str] = {}
    unclaimed: tuple[tuple[str, Shape | None], ...] = ()
    flattened: bool = True
