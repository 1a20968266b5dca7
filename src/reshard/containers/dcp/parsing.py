"""Read `.metadata`: its tables are taken apart while they are read (`tables`), then compared."""

from __future__ import annotations

import pathlib
from array import array
from collections.abc import Iterable, Mapping

from reshard.containers import torch as torchfile
from reshard.containers.dcp.columns import Paths, StoredTensors
from reshard.containers.dcp.metadata import ALIASES, Location, Metadata, Path
from reshard.containers.dcp.records import Fields
from reshard.containers.dcp.tables import DESCRIBED, OBJECT, PLANNED, STORED, Tables
from reshard.containers.torch.limits import MAX_NBYTES
from reshard.core.collecting import paused_gc
from reshard.core.tensors import Shape
from reshard.errors import IncompleteError, brief
from reshard.storage.local import Sources
from reshard.storage.source import Source

# Steps of a path in the state dict: nested dicts have about five.
MAX_STEPS = 128
# Bytes by which a file that is not a pickle of metadata is refused, before the others are read.
_START_NBYTES = 1 << 16
# Bytes that are read at a time of a file whose end is not needed.
_BLOCK_NBYTES = 16 << 20


def opened(
    path: pathlib.Path, sources: Sources, *, until: bytes | None = None
) -> tuple[Source, bytes]:
    """The file, and its bytes; with `until`, those up to the block in which these bytes occur, or
    the first `MAX_NBYTES` of a file that has more.

    Raises `IncompleteError` where the file is empty, `FormatError` where its first bytes begin
    something else, and what the pickle reader raises for a file that is too long or whose first
    bytes are not those of a pickle.
    """
    source = sources.open(path)
    if source.size == 0:
        raise IncompleteError(
            "the file is empty.", path=path, hint="The save did not finish; use another one."
        )
    start = source.read(0, min(source.size, _START_NBYTES))
    begun = torchfile.check_start(start, source.size, path=str(path))
    if begun is not None:
        Fields(str(path)).record(begun, "Metadata")
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
        tables = Tables(str(path), len(data))
        found = torchfile.read_tables(data, tables, path=str(path))
        if found is None or not tables.are_of(found.value):
            tables = Tables(str(path))
            found = torchfile.read_pickle(data, path=str(path))
        del data
        return compared(found.value, tables)


def compared(value: object, tables: Tables) -> Metadata:
    """What the tables say together; `value` is what is left of the file, and is taken apart.

    Raises `FormatError` where they contradict each other, or are not what DCP writes.
    """
    said = tables.fields
    fields = said.record(value, "Metadata")
    described = said.mapping(fields.get(DESCRIBED), DESCRIBED)
    rows = _rows(fields.get(STORED), tables)
    for key, raw in described.items():
        if not isinstance(key, str):
            raise said.broken(f"a key of its state dict is a {type(key).__name__}")
        if not tables.describe(key, raw):
            raise said.broken(f"its {DESCRIBED} has it twice", key)
    described.clear()
    tensors = StoredTensors(tables.keys, tables.places)
    objects: dict[str, tuple[Location, ...]] = {}
    for number in tables.order:
        layout = tables.said[number]
        code = number << 32
        if layout is OBJECT or layout is None:
            row = rows.pop(code, None)
            found = () if row is None else (tables.places.location(row),)
            objects[tables.keys.values[number]] = found
        else:
            cut = layout.cut
            tensors.add(number, layout, [rows.pop(code | spot, -1) for spot in cut.spots])
            for spot in cut.empty:
                rows.pop(code | spot, None)
    if PLANNED not in fields:  # every torch writes it, as None where nothing is nested
        raise said.broken(f"it has no {PLANNED}")
    flattened = bool(fields[PLANNED]) or any(tables.at_top)
    paths = _paths(fields[PLANNED], tables)
    aliases = _aliases(fields.get(ALIASES), tensors, said)
    tensors.drop(aliases)
    version = fields.get("version")
    version = version if isinstance(version, str) else None
    unclaimed = _unclaimed(rows.values(), tables)
    return Metadata(tensors, objects, paths, version, aliases, unclaimed, flattened)


def _rows(raw: object, tables: Tables) -> dict[int, int]:
    """The row of each item's place, by the numbers of its key and spot, joined in one number."""
    left = tables.fields.mapping(raw, STORED)
    for index, place in left.items():
        tables.place(index, place)
    left.clear()
    held = tables.places
    codes = [key << 32 | spot for key, spot in zip(held.keys, held.spots, strict=True)]
    rows = dict(zip(codes, range(len(held)), strict=True))
    if len(rows) < len(held):
        seen: set[int] = set()
        for key, code in zip(held.keys, codes, strict=True):
            if code in seen:
                what = f"its {STORED} has two places for one item"
                raise tables.fields.broken(what, tables.keys.values[key])
            seen.add(code)
    return rows


def _unclaimed(rows: Iterable[int], tables: Tables) -> tuple[tuple[str, Shape | None], ...]:
    """Keys and offsets of the items that have a place and no chunk, in the file's order."""
    if not rows:
        return ()
    offsets = [*tables.layouts.spots]
    held, keys = tables.places, tables.keys.values
    return tuple([(keys[held.keys[row]], offsets[held.spots[row]]) for row in sorted(rows)])


def _aliases(raw: object, tensors: Mapping[str, object], said: Fields) -> dict[str, str]:
    """The keys that are other names of a tensor: their chunks are the very same."""
    aliases: dict[str, str] = {}
    for alias, name in said.mapping({} if raw is None else raw, ALIASES).items():
        if not isinstance(alias, str) or not isinstance(name, str) or alias == name:
            raise said.broken(f"its {ALIASES} do not map names to names")
        if alias not in tensors or tensors.get(name) != tensors[alias]:
            raise said.broken(f"it is not the same tensor as {brief(name)}", alias)
        aliases[alias] = name
    chained = aliases.keys() & set(aliases.values())
    if chained:
        raise said.broken("it is an alias, and has one", min(chained))
    return aliases


def _paths(raw: object, tables: Tables) -> Paths:
    """The keys' paths in the nested state dict, of which the keys are made."""
    said, keys, at_top = tables.fields, tables.keys, tables.at_top
    tensors = [number for number in tables.order if tables.said[number] is not OBJECT]
    objects = [number for number in tables.order if tables.said[number] is OBJECT]
    order = array("I", [*tensors, *objects])
    planned = {} if raw is None else said.mapping(raw, PLANNED)
    if not planned and not any(at_top):  # saved without flattening
        return Paths(keys, order, {})
    lost = [keys.values[n] for n, top in enumerate(at_top) if top and tables.said[n] is None]
    lost += [
        str(key) for key, path in planned.items() if isinstance(path, tuple) and not tables.has(key)
    ]
    if lost:
        raise said.broken("its planner_data has it, its state dict does not", lost[0])
    others: dict[str, Path] = {}
    for number in order:
        key = keys.values[number]
        if at_top[number] and key in planned:
            raise said.broken(f"its {PLANNED} has it twice", key)
        if not at_top[number]:
            path = _path(planned.get(key), key, said)
            if path != (key,):
                others[key] = path
    planned.clear()
    return Paths(keys, order, others)


def _path(path: object, key: str, said: Fields) -> Path:
    """The path of a key, checked."""
    if path is None:
        raise said.broken("its state dict has it, its planner_data does not", key)
    if not isinstance(path, tuple) or not path or set(map(type, path)) - {str, int}:
        raise said.broken("its path in the state dict is not of names and numbers", key)
    if len(path) > MAX_STEPS:
        raise said.broken(f"its path in the state dict has {len(path)} steps", key)
    named = path if all(type(step) is str for step in path) else tuple(map(str, path))
    if ".".join(named) != key:
        raise said.broken(f"its path in the state dict is {brief(path)}", key)
    return named
