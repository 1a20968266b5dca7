"""Objects of a checkpoint that was saved without flattening: whole dicts, tensors among them.

With `DefaultSavePlanner(flatten_state_dict=False)` a nested state dict is one item for each key at
its top, `{"model": {"a.b": t}, ..}` one for `model`: a torch.save stream of the dict, written by
one rank (torch 2.13, planner_helpers.py, `_create_write_items`). Of a sharded tensor it holds only
that rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from reshard.containers import torch as torchfile
from reshard.containers.dcp.items import item_at
from reshard.containers.dcp.metadata import Location, Metadata
from reshard.containers.dcp.metadata import Path as StatePath
from reshard.containers.torch import Opaque, TensorRef
from reshard.containers.torch.named import lists_of_tensors
from reshard.containers.torch.plain import PlainData
from reshard.core.tensors import Record
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.storage.local import Sources, child
from reshard.storage.paths import exists
from reshard.storage.source import Source

# Levels of nested dicts that are searched; `{"optimizer": {"state": {0: {"exp_avg": t}}}}` has
# four.
_MAX_STEPS = 8
# Bytes of an object that is compared with others before it is parsed: a setting has 1.2 kB.
_MAX_OBJECT = 1 << 16


class ObjectTensors(Struct, frozen=True):
    """What the objects hold, by paths in the state dict: plain tensors, and distributed ones.

    `unread` are the classes of other objects, `lists` the dotted names of lists that hold tensors.
    """

    tensors: Mapping[StatePath, TensorRef]
    others: Mapping[StatePath, Opaque]
    records: tuple[Record, ...]
    unread: tuple[str, ...]
    lists: tuple[str, ...]


def find(metadata: Metadata, folder: Path, sources: Sources) -> ObjectTensors:
    """The tensors in all objects of a checkpoint.

    Raises `IncompleteError` where a file is missing or short, `UnsupportedError` where an object
    went through a transform, `FormatError` where it is damaged or two tensors have one path.
    """
    tensors: dict[StatePath, TensorRef] = {}
    others: dict[StatePath, Opaque] = {}
    records: list[Record] = []
    unread: set[str] = set()
    lists: list[str] = []
    for key, copies in metadata.objects.items():
        if not copies:
            continue
        file = _read(key, copies[0], folder, sources)
        records += file.records
        unread.update(file.opaque)
        lists += lists_of_tensors({".".join(metadata.paths[key]): file.value})
        for path, value in _walk(metadata.paths[key], file.value):
            if path in tensors or path in others:
                raise FormatError("two of its tensors have this path.", path=folder, tensor=key)
            if isinstance(value, TensorRef):
                tensors[path] = value
            else:
                others[path] = value
    return ObjectTensors(tensors, others, tuple(records), tuple(sorted(unread)), tuple(lists))


def read_object(
    key: str, place: Location, folder: Path, plain: PlainData, known: dict[bytes, object]
) -> object:
    """The plain data of one object, as `plain` takes it. `known` remembers by the item's bytes.

    Raises as `find` does.
    """
    source = _opened(key, place, folder, plain.sources)
    data = source.read(place.offset, min(place.nbytes, _MAX_OBJECT))
    if data not in known:
        with item_at(source, place.offset):
            file = torchfile.read(source, offset=place.offset, nbytes=place.nbytes)
        taken = plain.take(file.value, key)
        if place.nbytes > _MAX_OBJECT:
            return taken
        known[data] = taken
    return known[data]


def _read(key: str, place: Location, folder: Path, sources: Sources) -> torchfile.TorchFile:
    source = _opened(key, place, folder, sources)
    with item_at(source, place.offset):
        return torchfile.read(source, offset=place.offset, nbytes=place.nbytes)


def _opened(key: str, place: Location, folder: Path, sources: Sources) -> Source:
    if place.transforms:
        raise UnsupportedError(
            f"the object was saved with the transforms {', '.join(place.transforms)}.",
            path=folder,
            tensor=key,
            hint="Load it with the extension that wrote it, and save it again without the "
            "transform.",
        )
    path = child(folder, place.file)
    if not exists(path):
        raise IncompleteError(
            "the checkpoint's metadata lists this file, but it is missing.",
            path=path,
            hint="Copy the whole folder again; each rank wrote files of its own.",
        )
    return sources.open(path)


def _walk(path: StatePath, value: object) -> Iterator[tuple[StatePath, TensorRef | Opaque]]:
    """The tensors in a dict of dicts, each with its path; other objects are skipped."""
    if isinstance(value, TensorRef) or (isinstance(value, Opaque) and value.is_tensor):
        yield path, value
    elif isinstance(value, dict) and len(path) < _MAX_STEPS:
        for step, inner in value.items():
            if isinstance(step, str | int):
                yield from _walk((*path, str(step)), inner)
