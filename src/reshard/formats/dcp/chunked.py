"""A DCP checkpoint's chunks as a catalog: every chunk found, every tensor proven to be tiled."""

from __future__ import annotations

import re
from pathlib import Path

from reshard import dtypes
from reshard.catalog import Catalog, Origin
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.formats import Selection
from reshard.formats.dcp import copies, parts
from reshard.formats.dcp.items import Items
from reshard.formats.dcp.metadata import Chunk, Metadata, StoredTensor
from reshard.formats.dcp.zips import StoredItem
from reshard.storage import Sources
from reshard.tensors import Box, Entry, Fragment, Record, TensorSpec, check_tiling

_RANK_DATA = re.compile(r"__(\d+)_\d+\.distcp")


def read_chunks(
    folder: Path, sources: Sources, selection: Selection, metadata: Metadata
) -> Catalog:
    """The model's part of the checkpoint that `metadata` describes."""
    paths = {key: metadata.paths[key] for key in metadata.tensors}
    part = parts.find(paths, selection.prefix, str(folder))
    items = Items(folder, sources)
    entries: dict[str, Entry] = {}
    records: dict[str, list[Record]] = {}
    for key, name in part.names.items():
        if name in entries:
            raise FormatError("two of its tensors have this name.", path=folder, tensor=name)
        entries[name], records[name] = _entry(key, name, metadata.tensors[key], items, folder)
    copies.check(records, sources)
    left_out = len(metadata.tensors) - len(entries)
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            version=metadata.version,
            world_size=_world(metadata),
            details={
                "prefix": ".".join(part.path),
                "tensors_left_out": left_out,
                "non_tensors": sorted(metadata.objects),
            },
        ),
        entries=entries,
        records=tuple(record for found in records.values() for record in found),
    )


def _entry(
    key: str, name: str, tensor: StoredTensor, items: Items, folder: Path
) -> tuple[Entry, list[Record]]:
    """One tensor with all its chunks found, and the checksums of their bytes."""
    try:
        spec = TensorSpec(name, dtypes.parse(tensor.dtype), tensor.shape)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, path=folder, tensor=name) from None
    fragments = []
    records = []
    for chunk in tensor.chunks:
        if len(chunk.offsets) != len(spec.shape) or len(chunk.sizes) != len(spec.shape):
            raise FormatError(
                f"a chunk at {chunk.offsets} of sizes {chunk.sizes} is not of shape {spec.shape}.",
                path=folder,
                tensor=name,
            )
        item = _item(key, spec, chunk, items, folder)
        box = Box(spec.shape, chunk.offsets, chunk.sizes)
        fragments.append(Fragment(box, item.extent, spec.dtype, item.strides))
        if item.record is not None:
            records.append(item.record)
    entry = Entry(spec, tuple(fragments), "parameter" if spec.dtype.floating else "buffer")
    try:
        check_tiling(entry)
    except ReshardError as error:
        error.path = error.path or str(folder)
        raise
    return entry, records


def _item(key: str, spec: TensorSpec, chunk: Chunk, items: Items, folder: Path) -> StoredItem:
    """A chunk's bytes; where several ranks saved the same chunk, their checksums must agree."""
    if not chunk.copies:
        raise IncompleteError(
            f"the metadata does not say where its chunk at {chunk.offsets} lies.",
            path=folder,
            tensor=spec.name,
            hint="The metadata is damaged, or the save did not finish.",
        )
    part = TensorSpec(key, spec.dtype, chunk.sizes)
    found = [items.locate(part, chunk.offsets, copy) for copy in chunk.copies]
    checksums = {item.record.crc32 for item in found if item.record is not None}
    if len(checksums) > 1:
        raise FormatError(
            f"{len(found)} ranks saved it, each for itself, and their values differ.",
            path=folder,
            tensor=spec.name,
            hint="Save again with use_collectives=True, or move the files of the other ranks away.",
        )
    return found[0]


def _world(metadata: Metadata) -> int | None:
    """One more than the highest rank that wrote a file that is in use."""
    files = {
        copy.file
        for tensor in metadata.tensors.values()
        for chunk in tensor.chunks
        for copy in chunk.copies
    }
    ranks = [int(match[1]) for file in files if (match := _RANK_DATA.fullmatch(file))]
    return max(ranks) + 1 if ranks else None
