"""The model's part of a DCP checkpoint as a catalog."""

from __future__ import annotations

from pathlib import Path

from reshard.containers import copies
from reshard.containers.dcp.chunked import entry_of, world_size
from reshard.containers.dcp.items import Items
from reshard.containers.dcp.metadata import Metadata
from reshard.core.catalog import Catalog, Origin
from reshard.core.tensors import Entry, Record
from reshard.errors import FormatError
from reshard.formats import Selection
from reshard.formats.dcp import parts
from reshard.storage.local import Sources


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
        entries[name], records[name] = entry_of(key, name, metadata.tensors[key], items, folder)
    copies.check(records, sources)
    left_out = len(metadata.tensors) - len(entries)
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            version=metadata.version,
            world_size=world_size(metadata),
            details={
                "prefix": ".".join(part.path),
                "tensors_left_out": left_out,
                "non_tensors": sorted(metadata.objects),
            },
        ),
        entries=entries,
        records=tuple(record for found in records.values() for record in found),
    )
