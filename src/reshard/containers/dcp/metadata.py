"""The `.metadata` of a DCP checkpoint as plain, checked data.

The file is a bare pickle of `torch.distributed.checkpoint.metadata.Metadata` (torch 2.13,
metadata.py and filesystem.py). Nothing of it is executed: the restricted reader gives records of
what was pickled, and `parse` turns those into the types below, or raises.

    state_dict_metadata   key -> TensorStorageMetadata(properties, size, chunks), or
                                 BytesStorageMetadata: an object that is not a tensor
    planner_data          key -> path in the nested state dict; None where it was not flattened
    storage_data          MetadataIndex(fqn, offset) -> _StorageInfo(relative_path, offset, length)
    version               "1.0.0"; older torch writes none
    reshard_aliases       alias -> key of the same bytes; written by reshard alone

The three tables are compared with each other: the file has no checksum, and one flipped bit must
not lose or rename a tensor. If torch pickles a name once for all tables (a flat state dict), a
flipped bit in the name itself cannot be noticed here; a base model's names show it. Long because
the tables are parsed and compared as one.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from msgspec import Struct

from reshard.containers import torch as torchfile
from reshard.containers.torch import Global, Instance, Opaque
from reshard.containers.torch.limits import MAX_NBYTES
from reshard.containers.torch.machine import paused_gc
from reshard.core.dtypes import DType
from reshard.core.tensors import MAX_DIMS, MAX_NUMEL, Shape
from reshard.errors import FormatError, IncompleteError, brief
from reshard.storage.local import Sources
from reshard.storage.source import Source

Path = tuple[str, ...]
# Steps of a path in the state dict: nested dicts have about five.
MAX_STEPS = 128
#: The field of `.metadata` that says which keys are other names of a tensor.
ALIASES = "reshard_aliases"
# Where an item lies that is not a tensor: its index has no offset.
_WHOLE = None
# The fields of an item's place.
_PLACE = ("relative_path", "offset", "length", "transform_descriptors")
_INT = frozenset({int})
# Bytes by which a file that is not a pickle is refused, before the others are read.
_START_NBYTES = 1 << 16
# Bytes that are read at a time of a file whose end is not needed.
_BLOCK_NBYTES = 16 << 20
# Where each item lies, by its key and offset. Most keys have one item.
_Place = tuple[Shape | None, "Location"]
_Places = dict[str, "_Place | dict[Shape | None, Location]"]


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


def opened(
    path: pathlib.Path, sources: Sources, *, until: bytes | None = None
) -> tuple[Source, bytes]:
    """The file, and its bytes; with `until`, those up to the block in which these bytes occur, or
    the first `MAX_NBYTES` of a file that has more.

    Raises `IncompleteError` where the file is empty, and what the pickle reader raises for a file
    that is too long, or whose first bytes are not those of a pickle.
    """
    source = sources.open(path)
    if source.size == 0:
        raise IncompleteError(
            "the file is empty.", path=path, hint="The save did not finish; use another one."
        )
    start = source.read(0, min(source.size, _START_NBYTES))
    torchfile.check_start(start, source.size, path=str(path))
    if until is None:
        torchfile.check_size(source.size, path=str(path))
        return source, source.read(0, source.size)
    return source, _beginning(source, until)


def _beginning(source: Source, until: bytes) -> bytes:
    """The first bytes of a file, block by block, until `until` is among them."""
    data = bytearray()
    end = min(source.size, MAX_NBYTES)
    while len(data) < end:
        seen = max(0, len(data) - len(until))
        data += source.read(len(data), min(_BLOCK_NBYTES, end - len(data)))
        if data.find(until, seen) >= 0:
            break
    return bytes(data)


def unpickled(data: bytes, path: pathlib.Path) -> Metadata:
    """What the pickle says; raises `FormatError`."""
    with paused_gc():
        found = torchfile.read_pickle(data, path=str(path), repeats=True)
        del data
        return parse(found.value, str(path))


def parse(value: object, path: str) -> Metadata:
    """The metadata that the restricted reader found in the file `path`; `value` is taken apart, so
    that a large one and what is made of it are not held at once.

    Raises `FormatError` where it is not what DCP writes.
    """
    return _Parser(path).metadata(value)


def _taken(places: _Places, key: str, at: Shape | None) -> Location | None:
    """Take the place of an item out of the places; None where there is none."""
    held = places.get(key)
    if isinstance(held, dict):
        return held.pop(at, None)
    if held is None or held[0] != at:
        return None
    del places[key]
    return held[1]


class _Parser:
    """Turns records into types; knows the file's name for the errors."""

    def __init__(self, path: str) -> None:
        self._path = path
        # Chunks of all layers have the same few sizes, which a run of records shares.
        self._shapes: dict[Shape, Shape] = {}
        self._kinds: dict[tuple[str, str], bool] = {}
        # By the fields asked for: of which class and keys, what gets them, whether it has all.
        self._getters: dict[
            tuple[str, ...], tuple[str, tuple[str, ...], itemgetter[Any], bool]
        ] = {}

    def metadata(self, value: object) -> Metadata:
        fields = self._record(value, "Metadata")
        described = self._mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
        stored = self._locations(fields.get("storage_data"))
        tensors: dict[str, StoredTensor] = {}
        objects: dict[str, tuple[Location, ...]] = {}
        for key in [*described]:
            raw = described.pop(key)
            if not isinstance(key, str):
                raise self._broken(f"a key of its state dict is a {type(key).__name__}")
            if isinstance(raw, Opaque) and raw.short_name == "BytesStorageMetadata":
                place = _taken(stored, key, _WHOLE)
                objects[key] = () if place is None else (place,)
            else:
                tensors[key] = self._tensor(key, raw, stored)
        version = fields.get("version")
        if "planner_data" not in fields:  # every torch writes it, as None where nothing is nested
            raise self._broken("it has no planner_data")
        planned = fields["planner_data"]
        paths = self._paths(planned, [*tensors, *objects])
        aliases = self._aliases(fields.get(ALIASES), tensors)
        return Metadata(
            {key: tensor for key, tensor in tensors.items() if key not in aliases},
            objects,
            paths,
            version if isinstance(version, str) else None,
            aliases,
            tuple(
                (key, at)
                for key, held in stored.items()
                for at in (held if isinstance(held, dict) else held[:1])
            ),
            bool(planned),
        )

    def _tensor(self, key: str, raw: object, stored: _Places) -> StoredTensor:
        """One tensor; the places of its chunks are removed from `stored`."""
        fields = self._record(raw, "TensorStorageMetadata", key)
        chunks: dict[Shape, Chunk] = {}
        # Of ranks that hold nothing of the tensor; torch writes an empty item for each.
        empty: set[Shape] = set()
        listed = fields.get("chunks")
        if not isinstance(listed, list):
            raise self._broken("its chunks are not a list", key)
        for part in listed:
            offsets, sizes = self._fields(part, "ChunkStorageMetadata", ("offsets", "sizes"), key)
            offsets = self._shape(offsets, "a chunk's offsets", key)
            sizes = self._shape(sizes, "a chunk's sizes", key)
            if 0 in sizes:
                empty.add(offsets)
                continue
            known = chunks.get(offsets)
            if known is not None and known.sizes != sizes:
                raise self._broken(
                    f"two chunks begin at {offsets}, of sizes {known.sizes} and {sizes}", key
                )
            if known is None:
                location = _taken(stored, key, offsets)
                copies = () if location is None else (location,)
                chunks[offsets] = Chunk(offsets, sizes, copies)
        for offsets in empty:
            _taken(stored, key, offsets)
        shape = self._shape(fields.get("size"), "its size", key)
        return StoredTensor(self._dtype(fields.get("properties"), key), shape, (*chunks.values(),))

    def _locations(self, raw: object) -> _Places:
        """Where each tensor chunk lies; items that are not tensors have no offset in the index."""
        locations: _Places = {}
        places = self._mapping(raw, "storage_data")
        for index in [*places]:
            info = places.pop(index)
            fqn, offset = self._fields(index, "MetadataIndex", ("fqn", "offset"))
            if not isinstance(fqn, str):
                raise self._broken("an index of its storage_data has no name")
            at = None if offset is None else self._shape(offset, "an index's offset", fqn)
            location = self._location(info, fqn)
            known = locations.get(fqn)
            if known is None:
                locations[fqn] = at, location
                continue
            if isinstance(known, tuple):
                known = locations[fqn] = dict([known])
            if at in known:
                raise self._broken("its storage_data has two places for one item", fqn)
            known[at] = location
        return locations

    def _aliases(self, raw: object, tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
        """The keys that are other names of a tensor: their chunks are the very same."""
        aliases: dict[str, str] = {}
        for alias, name in self._mapping({} if raw is None else raw, ALIASES).items():
            if not isinstance(alias, str) or not isinstance(name, str) or alias == name:
                raise self._broken(f"its {ALIASES} do not map names to names")
            if alias not in tensors or tensors.get(name) != tensors[alias]:
                raise self._broken(f"it is not the same tensor as {brief(name)}", alias)
            aliases[alias] = name
        chained = aliases.keys() & set(aliases.values())
        if chained:
            raise self._broken("it is an alias, and has one", min(chained))
        return aliases

    def _location(self, raw: object, key: str) -> Location:
        name, offset, nbytes, transforms = self._fields(raw, "_StorageInfo", _PLACE, key)
        if not isinstance(name, str):
            raise self._broken("a chunk's file has no name", key)
        for number in (offset, nbytes):
            if type(number) is not int or not 0 <= number < MAX_NUMEL:
                self._shape((offset, nbytes), "a place", key)
        if not transforms:
            return Location(name, offset, nbytes)
        if not isinstance(transforms, list | tuple) or set(map(type, transforms)) - {str}:
            raise self._broken("a chunk's transforms are not a list of texts", key)
        return Location(name, offset, nbytes, tuple(transforms))

    def _dtype(self, raw: object, key: str) -> str:
        # TensorProperties pickles itself as (dtype, layout, requires_grad, format, pinned).
        state = raw.state if isinstance(raw, Opaque) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if isinstance(state, dict):
            dtype = state.get("dtype")
        if isinstance(dtype, DType | Global):
            return dtype.name
        raise self._broken("it has no dtype", key)

    def _paths(self, raw: object, keys: list[str]) -> dict[str, Path]:
        """The key's path in the nested state dict, of which the key is made."""
        planned = {} if raw is None else self._mapping(raw, "planner_data")
        if not planned:  # saved without flattening
            return {key: (key,) for key in keys}
        known = set(keys)
        for lost, path in planned.items():
            if lost not in known and isinstance(path, tuple):
                raise self._broken("its planner_data has it, its state dict does not", str(lost))
        paths = {}
        for key in keys:
            path = planned.get(key)
            if path is None:
                raise self._broken("its state dict has it, its planner_data does not", key)
            if not isinstance(path, tuple) or not path or set(map(type, path)) - {str, int}:
                raise self._broken("its path in the state dict is not of names and numbers", key)
            if len(path) > MAX_STEPS:
                raise self._broken(f"its path in the state dict has {len(path)} steps", key)
            named = all(type(step) is str for step in path)
            paths[key] = path if named else tuple(map(str, path))
            if ".".join(paths[key]) != key:
                raise self._broken(f"its path in the state dict is {brief(path)}", key)
        return paths

    def _shape(self, raw: object, what: str, key: str) -> Shape:
        # Hashing what is not of numbers may take for ever: a tuple of two of the tuple before.
        if isinstance(raw, tuple) and len(raw) <= MAX_DIMS and _INT.issuperset(map(type, raw)):
            known: Shape = raw
            if self._shapes.get(known) is known:
                return known
        shape = self._checked(raw, what, key)
        return self._shapes.setdefault(shape, raw if raw == shape else shape)

    def _checked(self, raw: object, what: str, key: str) -> Shape:
        if not isinstance(raw, tuple):
            raise self._broken(f"{what} is a {type(raw).__name__}", key)
        if len(raw) > MAX_DIMS:
            raise self._broken(f"{what} has {len(raw)} dimensions", key)
        numbers = []
        for number in raw:
            if type(number) is not int or not 0 <= number < MAX_NUMEL:
                raise self._broken(f"{what} has {brief(number)}", key)
            numbers.append(number)
        return tuple(numbers)

    def _mapping(self, raw: object, what: str) -> dict[object, object]:
        if not isinstance(raw, dict):
            raise self._broken(f"its {what} is a {type(raw).__name__}")
        return raw

    def _record(self, raw: object, kind: str, key: str | None = None) -> Mapping[str, object]:
        """The fields of an instance of `kind`, whatever module it came from (they moved)."""
        if isinstance(raw, Instance) and self._is(raw, kind):
            return dict(zip(raw.keys, raw.values, strict=True))
        if not isinstance(raw, Opaque) or not raw.short_name.endswith(kind):
            found = raw.name if isinstance(raw, Opaque | Instance) else type(raw).__name__
            raise self._broken(f"it has a {found} where a {kind} belongs", key)
        state = raw.state if raw.state is not None else {}
        if not isinstance(state, dict):
            raise self._broken(f"the fields of a {kind} are a {type(state).__name__}", key)
        return state

    def _is(self, raw: Instance, kind: str) -> bool:
        known = self._kinds.get((raw.name, kind))
        if known is None:
            known = raw.name.rpartition(".")[2].endswith(kind)
            self._kinds[raw.name, kind] = known
        return known

    def _fields(
        self, raw: object, kind: str, names: tuple[str, ...], key: str | None = None
    ) -> tuple[Any, ...]:
        """Some fields of a record, None for those that it lacks."""
        if type(raw) is Instance:
            known = self._getters.get(names)
            # Records of one class share their name and keys; two million are asked.
            if known is None or known[0] is not raw.name or known[1] is not raw.keys:
                known = self._getter(raw, kind, names)
            if known is not None:
                found: tuple[Any, ...] = known[2](raw.values if known[3] else (*raw.values, None))
                return found
        fields = self._record(raw, kind, key)
        return tuple([fields.get(name) for name in names])

    def _getter(
        self, raw: Instance, kind: str, names: tuple[str, ...]
    ) -> tuple[str, tuple[str, ...], itemgetter[Any], bool] | None:
        """What gets the fields of a record; None where it is of another kind."""
        if not self._is(raw, kind):
            return None
        lacking = len(raw.keys)
        places = [raw.keys.index(name) if name in raw.keys else lacking for name in names]
        made = (raw.name, raw.keys, itemgetter(*places), max(places) < lacking)
        self._getters[names] = made
        return made

    def _broken(self, what: str, key: str | None = None) -> FormatError:
        return FormatError(
            f"{what}.",
            path=self._path,
            tensor=key,
            hint="The file is damaged, or was not written by torch.distributed.checkpoint.",
        )


def merge(parts: list[Metadata], path: str) -> Metadata:
    """One checkpoint from the metadata that each rank wrote for itself (no collectives).

    Each rank lists its own chunks under the tensor's global shape. Chunks that several ranks
    hold (replicas) keep all their copies. Raises `FormatError` where ranks do not agree.
    """
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, tuple[Location, ...]] = {}
    paths: dict[str, Path] = {}
    for part in parts:
        for key, copies in part.objects.items():
            objects[key] = objects.get(key, ()) + copies
        for key, tensor in part.tensors.items():
            known = tensors.get(key)
            tensors[key] = tensor if known is None else _join(key, known, tensor, path)
        for key, steps in part.paths.items():
            if paths.setdefault(key, steps) != steps:
                raise FormatError("the ranks nest it differently.", path=path, tensor=key)
    versions = {part.version for part in parts}
    both = sorted(tensors.keys() & objects.keys())
    if both:
        raise FormatError(
            "it is a tensor on some ranks and another object on others.", path=path, tensor=both[0]
        )
    version = versions.pop() if len(versions) == 1 else None
    unclaimed = tuple(place for part in parts for place in part.unclaimed)
    flattened = any(part.flattened for part in parts)
    return Metadata(tensors, objects, paths, version, {}, unclaimed, flattened)


def _join(key: str, first: StoredTensor, second: StoredTensor, path: str) -> StoredTensor:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        raise FormatError(
            f"the ranks disagree: {first.dtype} {first.shape} and {second.dtype} {second.shape}.",
            path=path,
            tensor=key,
            hint="The folder holds files from different saves.",
        )
    chunks = {chunk.offsets: chunk for chunk in first.chunks}
    for chunk in second.chunks:
        known = chunks.get(chunk.offsets)
        if known is not None and known.sizes == chunk.sizes:
            chunk = Chunk(chunk.offsets, chunk.sizes, known.copies + chunk.copies)
        elif known is not None:
            raise FormatError(
                f"two ranks hold chunks at {chunk.offsets}, of sizes {known.sizes} and "
                f"{chunk.sizes}.",
                path=path,
                tensor=key,
                hint="The folder holds files from different saves.",
            )
        chunks[chunk.offsets] = chunk
    return StoredTensor(first.dtype, first.shape, (*chunks.values(),))
