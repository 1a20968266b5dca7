"""The model's part of a DCP checkpoint as a catalog."""

from __future__ import annotations

from pathlib import Path

from reshard.containers import copies
from reshard.containers.dcp import sharing
from reshard.containers.dcp.chunked import entry_of, world_size
from reshard.containers.dcp.items import Items
from reshard.containers.dcp.metadata import Metadata
from reshard.core.catalog import Catalog, Origin
from reshard.core.tensors import Entry, Record
from reshard.errors import FormatError
from reshard.formats import Selection
from reshard.formats.dcp import parts
from reshard.naming import ties
from reshard.storage.local import Sources


def read_chunks(
    folder: Path, sources: Sources, selection: Selection, metadata: Metadata
) -> Catalog:
    """The model's part of the checkpoint that `metadata` describes."""
    keys = [*metadata.tensors, *metadata.aliases]
    part = parts.find({key: metadata.paths[key] for key in keys}, selection.prefix, str(folder))
    items = Items(folder, sources)
    entries: dict[str, Entry] = {}
    records: dict[str, list[Record]] = {}
    for key, names in _named(part, metadata, folder).items():
        entry, found = entry_of(key, names[0], metadata.tensors[key], items, folder)
        entries[names[0]] = entry.aliased(tuple(names[1:]))
        records[names[0]] = found
    sharing.check(metadata, folder, sources)
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
        renamed=frozenset(
            alias
            for name, entry in entries.items()
            for alias in entry.aliases
            if not ties.may_be_tied(name, alias)
        ),
    )


def _named(part: parts.Part, metadata: Metadata, folder: Path) -> dict[str, list[str]]:
    """Each tensor of the part by its key, with its names there: its own first, if that is there."""
    names: dict[str, list[str]] = {}
    taken: set[str] = set()
    for key, name in part.names.items():
        if name in taken:
            raise FormatError("two of its tensors have this name.", path=folder, tensor=name)
        taken.add(name)
        names.setdefault(metadata.aliases.get(key, key), []).append(name)
    return names
