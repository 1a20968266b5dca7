"""The model's part of a DCP checkpoint as a catalog."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from reshard.containers.dcp import objects
from reshard.containers.dcp.chunked import find_tensors, world_size
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.objects import ObjectTensors
from reshard.containers.torch import TensorRef
from reshard.containers.torch.named import entries_of
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding, lists_left_out, objects_unread, part_left_out
from reshard.core.tensors import Entry
from reshard.errors import FormatError, ReshardError, UnsupportedError
from reshard.formats import Selection
from reshard.formats.dcp import parts, state
from reshard.naming import ties
from reshard.storage.local import Sources


def read_chunks(
    folder: Path, sources: Sources, selection: Selection, metadata: Metadata
) -> Catalog:
    """The model's part of the checkpoint that `metadata` describes."""
    in_objects = _in_objects(metadata, folder, sources)
    inside = {_key(path): path for path in (*in_objects.tensors, *in_objects.others)}
    part = parts.find(
        {key: metadata.paths[key] for key in (*metadata.tensors, *metadata.aliases)} | inside,
        selection.prefix,
        str(folder),
        metadata.objects,
    )
    _check_names(part, folder)
    entries, records = find_tensors(
        *_named(part, metadata), metadata, folder, sources, located=selection.located
    )
    # Names of one stored tensor in a stream are tied, whatever they are.
    renamed = _renamed(entries.values())
    entries |= entries_of(_whole(part, in_objects, folder))
    for record in in_objects.records:
        records.add(record)
    taken = sum(key in part.names for key in {*metadata.tensors, *inside})
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            version=metadata.version,
            world_size=world_size(metadata),
            details={
                "prefix": ".".join(part.path),
                "tensors_left_out": len(metadata.tensors) + len(inside) - taken,
                "non_tensors": sorted(
                    metadata.objects.keys() - {path[0] for path in inside.values()}
                ),
            },
        ),
        entries=entries,
        records=records,
        findings=tuple(_findings(part, in_objects)),
        renamed=renamed,
        optimizer=state.reader(folder, metadata, part, entries, sources),
    )


def _in_objects(metadata: Metadata, folder: Path, sources: Sources) -> ObjectTensors:
    """The tensors in objects, of a checkpoint that was saved without flattening."""
    nothing = ObjectTensors({}, {}, (), (), ())
    if metadata.flattened:
        return nothing
    try:
        return objects.find(metadata, folder, sources)
    except ReshardError:
        if not metadata.tensors:
            raise
        # An object that cannot be read is not part of a model whose tensors are items.
        return nothing


def _key(path: tuple[str, ...]) -> str:
    """A key for a tensor in an object; no key of the metadata has a NUL."""
    return "\0".join(("", *path))


def _check_names(part: parts.Part, folder: Path) -> None:
    taken: set[str] = set()
    for name in part.names.values():
        if name in taken:
            raise FormatError("two of its tensors have this name.", path=folder, tensor=name)
        taken.add(name)


def _named(part: parts.Part, metadata: Metadata) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The name of each tensor of the part by its key, its own if that is there, and the others that
    some have."""
    names: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    for key, name in part.names.items():
        own = metadata.aliases.get(key, key)
        if own in names:
            others.setdefault(own, []).append(name)
        elif own in metadata.tensors:
            names[own] = name
    return names, others


def _whole(part: parts.Part, in_objects: ObjectTensors, folder: Path) -> Mapping[str, TensorRef]:
    """The part's tensors that lie in objects, by name.

    Raises `UnsupportedError` where one is a sharded tensor, of which an object has one rank's part.
    """
    for path, found in in_objects.others.items():
        name = part.names.get(_key(path))
        if name is not None:
            raise UnsupportedError(
                f"it is {found.describe()}, and {path[0]!r} was saved whole: a save with "
                "flatten_state_dict=False holds one rank's shard of it.",
                path=folder,
                tensor=name,
                hint="Save with flatten_state_dict=True, which is the default.",
            )
    named = ((part.names.get(_key(path)), tensor) for path, tensor in in_objects.tensors.items())
    return {name: tensor for name, tensor in named if name is not None}


def _renamed(entries: Iterable[Entry]) -> frozenset[str]:
    """Aliases that no class ties to their tensor: other layouts' names for it."""
    return frozenset(
        alias
        for entry in entries
        for alias in entry.aliases
        if not ties.may_be_tied(entry.spec.name, alias)
    )


def _findings(part: parts.Part, in_objects: ObjectTensors) -> Iterable[Finding]:
    for name, count in part.beside.items():
        yield part_left_out(name, count)
    if in_objects.unread:
        yield objects_unread(in_objects.unread)
    if in_objects.lists:
        yield lists_left_out(in_objects.lists)
