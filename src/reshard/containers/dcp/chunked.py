"""A DCP checkpoint's chunks as entries: find every chunk, and prove that every tensor is tiled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

from reshard.containers import copies
from reshard.containers.dcp import sharing
from reshard.containers.dcp.columns import files_of
from reshard.containers.dcp.items import Items
from reshard.containers.dcp.metadata import Chunk, Location, Metadata, StoredTensor
from reshard.containers.dcp.zips import StoredItem
from reshard.containers.torch.records import TensorRef
from reshard.core import dtypes
from reshard.core.records import Records
from reshard.core.regex import regex
from reshard.core.tensors import (
    Box,
    Entry,
    Extent,
    Fragment,
    Record,
    Shape,
    TensorKind,
    TensorSpec,
)
from reshard.core.tiling import is_grid, proven, stored_whole
from reshard.errors import FormatError, IncompleteError, UnsupportedError, at
from reshard.storage.local import Sources

_RANK_DATA = regex(r"__(\d+)_\d+\.distcp")
#: What is said of a tensor: dtype, shape, offsets and sizes of its chunks.
_Layout: TypeAlias = "tuple[str, Shape, tuple[Shape, ...], tuple[Shape, ...]]"
# Chunks of a layout that is kept to be met again.
_MAX_REPEATED = 4096


def find_tensors(
    names: Mapping[str, str],
    others: Mapping[str, Sequence[str]],
    metadata: Metadata,
    folder: Path,
    sources: Sources,
    *,
    located: bool = True,
) -> tuple[dict[str, Entry], Records]:
    """The tensors of the keys in `names`, by the names that these are mapped to, and the checksums
    of their bytes. `others` are the aliases of those that have any.

    With `located=False` it reads no item: a chunk has its file and size, but not its right offset,
    and there are no checksums.

    Raises `FormatError`, `IncompleteError`, `UnsupportedError`; also where two items of the
    checkpoint share bytes, or a file is a copy of another's.
    """
    finder = _Finder(folder, sources, located=located)
    entries: dict[str, Entry] = {}
    records, owners = Records(), list[str]()
    for key, name in names.items():
        entry, found = finder.entry(key, name, metadata.tensors[key])
        for record in found:
            records.add(record)
            owners.append(name)
        entries[name] = entry.aliased(tuple(others[key])) if key in others else entry
    sharing.check(metadata, folder, sources)
    copies.check_each(zip(owners, records, strict=True), sources)
    return entries, records


class _Finder:
    """Finds the chunks of a checkpoint's tensors.

    Tensors of one shape are cut alike in every layer: their boxes are made, and proven to tile
    them, once.
    """

    def __init__(self, folder: Path, sources: Sources, *, located: bool) -> None:
        self._folder = folder
        self._located = located
        self._items = Items(folder, sources)
        self._proven: dict[_Layout, _Proven] = {}

    def entry(self, key: str, name: str, tensor: StoredTensor) -> tuple[Entry, list[Record]]:
        """One tensor with all its chunks found, and the checksums of their bytes."""
        try:
            spec = TensorSpec(name, dtypes.parse(tensor.dtype), tensor.shape)
        except UnsupportedError as error:
            raise UnsupportedError(error.message, path=self._folder, tensor=name) from None
        layout = (
            tensor.dtype,
            spec.shape,
            tuple([chunk.offsets for chunk in tensor.chunks]),
            tuple([chunk.sizes for chunk in tensor.chunks]),
        )
        known = self._proven.get(layout)
        boxes = self._boxes(spec, tensor) if known is None else known.boxes
        if known is None and spec.shape and is_grid(*layout[2:], spec.shape):
            known = self._note(layout, spec, boxes)
        if known is not None and not self._located:
            copies = [self._copies(spec, chunk) for chunk in tensor.chunks]
            extents = self._items.promised_all(known.nbytes, copies)
            return _whole_or_parts(spec, boxes, extents), []
        fragments = []
        records = []
        plain = known is not None
        for chunk, box in zip(tensor.chunks, boxes, strict=True):
            item = self._item(key, spec, chunk)
            fragments.append(Fragment(box, item.extent, spec.dtype, item.strides))
            plain = plain and item.strides is None
            plain = plain and item.extent.nbytes == box.numel * spec.dtype.itemsize
            if item.record is not None:
                records.append(item.record)
        if plain:
            extents = [fragment.in_file for fragment in fragments]
            return _whole_or_parts(spec, boxes, extents), records
        with at(self._folder):
            entry = proven(spec, fragments, _kind(spec))
        self._note(layout, spec, boxes)
        return entry, records

    def _note(self, layout: _Layout, spec: TensorSpec, boxes: tuple[Box, ...]) -> _Proven:
        """Remember that boxes tile a tensor, if they are few."""
        found = _Proven(boxes, tuple([box.numel * spec.dtype.itemsize for box in boxes]))
        if len(boxes) <= _MAX_REPEATED:
            self._proven[layout] = found
        return found

    def _boxes(self, spec: TensorSpec, tensor: StoredTensor) -> tuple[Box, ...]:
        for chunk in tensor.chunks:
            if len(chunk.offsets) != len(spec.shape) or len(chunk.sizes) != len(spec.shape):
                raise FormatError(
                    f"a chunk at {chunk.offsets} of sizes {chunk.sizes} is not of shape "
                    f"{spec.shape}.",
                    path=self._folder,
                    tensor=spec.name,
                )
        return tuple(Box(spec.shape, chunk.offsets, chunk.sizes) for chunk in tensor.chunks)

    def _item(self, key: str, spec: TensorSpec, chunk: Chunk) -> StoredItem:
        """A chunk's bytes; where several ranks saved the same chunk, their checksums must agree."""
        part = TensorSpec(key, spec.dtype, chunk.sizes)
        if not self._located:
            (extent,) = self._items.promised_all([part.nbytes], [self._copies(spec, chunk)])
            return StoredItem(spec.dtype, chunk.sizes, None, extent, None)
        copies = self._copies(spec, chunk)
        found = [self._items.locate(part, chunk.offsets, copy) for copy in copies]
        checksums = {item.record.crc32 for item in found if item.record is not None}
        if len(checksums) > 1:
            raise FormatError(
                f"{len(found)} ranks saved separate copies of it, and the copies differ.",
                path=self._folder,
                tensor=spec.name,
                hint="Save again with use_collectives=True, or move the files of the other ranks "
                "away.",
            )
        return found[0]

    def _copies(self, spec: TensorSpec, chunk: Chunk) -> tuple[Location, ...]:
        if not chunk.copies:
            raise IncompleteError(
                f"the metadata does not say where its chunk at {chunk.offsets} lies.",
                path=self._folder,
                tensor=spec.name,
                hint="The metadata is damaged, or the save did not finish.",
            )
        return chunk.copies


class _Proven(Struct, frozen=True):
    """Boxes that are known to tile a tensor, and the bytes of each."""

    boxes: tuple[Box, ...]
    nbytes: tuple[int, ...]


def _whole_or_parts(spec: TensorSpec, boxes: Sequence[Box], extents: Sequence[Extent]) -> Entry:
    """The entry of extents that hold the elements of `boxes`, row-major; these tile it."""
    if len(extents) == 1:
        return stored_whole(spec, extents[0], _kind(spec))
    pairs = zip(boxes, extents, strict=True)
    fragments = tuple([Fragment(box, extent, spec.dtype) for box, extent in pairs])
    return Entry(spec, fragments, _kind(spec))


def _kind(spec: TensorSpec) -> TensorKind:
    return "parameter" if spec.dtype.floating else "buffer"


def scalar(entry: Entry) -> TensorRef:
    """A tensor of one element, as what a stream refers to.

    Raises `FormatError` where it has none.
    """
    if not entry.fragments:
        raise FormatError(f"its shape {entry.spec.shape} has no number.", tensor=entry.spec.name)
    fragment = entry.fragments[0]
    return TensorRef(fragment.dtype, entry.spec.shape, fragment.in_file, None, ("", 0))


def world_size(metadata: Metadata) -> int | None:
    """One more than the highest rank that wrote a file that is in use."""
    files = files_of(metadata)
    ranks = [int(match[1]) for file in files if (match := _RANK_DATA.fullmatch(file))]
    return max(ranks) + 1 if ranks else None
