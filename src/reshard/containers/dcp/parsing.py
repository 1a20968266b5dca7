"""Read `.metadata`: its tables are taken apart while they are read, then compared.

A table is set some items at a time; of each the pickle's records are dropped once what they say is
noted (`Parser.items`). What a record should not say is left in its table, and is refused when all
is compared, in the order of the file.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence

from reshard.containers import torch as torchfile
from reshard.containers.dcp.columns import (
    Cut,
    Layout,
    Layouts,
    Numbers,
    Paths,
    Places,
    StoredTensors,
)
from reshard.containers.dcp.metadata import ALIASES, Location, Metadata, Path
from reshard.containers.dcp.records import CHUNK, Fields
from reshard.containers.torch import Instance, Opaque
from reshard.containers.torch.limits import MAX_NBYTES
from reshard.containers.torch.machine import paused_gc
from reshard.containers.torch.nesting import check_count
from reshard.core.tensors import MAX_NAME, Shape
from reshard.errors import FormatError, IncompleteError, brief
from reshard.storage.local import Sources
from reshard.storage.source import Source

# Steps of a path in the state dict: nested dicts have about five.
MAX_STEPS = 128
# In a table: an item that is not a tensor; a path that is the key itself.
_OBJECT, _ITSELF = object(), object()
_OBJECT_KIND = "BytesStorageMetadata"
_INSTANCE = frozenset({Instance})
# Lists of chunks that are kept to be met again, and chunks of such a list.
_MAX_CUTS, _MAX_CHUNKS = 1 << 14, 4096
# Bytes by which a file that is not a pickle is refused, before the others are read.
_START_NBYTES = 1 << 16
# Bytes that are read at a time of a file whose end is not needed.
_BLOCK_NBYTES = 16 << 20


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
        parser = Parser(str(path), len(data))
        found = torchfile.read_tables(data, parser, path=str(path))
        if found is None or not parser.took_from(found.value):
            parser = Parser(str(path))
            found = torchfile.read_pickle(data, path=str(path))
        del data
        return parser.metadata(found.value)


def parse(value: object, path: str) -> Metadata:
    """The metadata that the restricted reader found in the file `path`, all of it.

    Raises `FormatError` where it is not what DCP writes.
    """
    return Parser(path).metadata(value)


class Parser:
    """Turns the tables of one file into columns. It is the `Compactor` of the file's pickle.

    Of a pickle of `nbytes` it takes no more chunks than such a pickle may stand for.
    """

    def __init__(self, path: str, nbytes: int | None = None) -> None:
        self._fields = Fields(path)
        self._nbytes = nbytes
        self._count = 0
        self._keys = Numbers()
        self._places = Places()
        self._made = Layouts()
        self._table: dict[object, object] | None = None
        self._lists: dict[tuple[object, ...], Cut] = {}

    # While the pickle is read.

    def takes(self, key: object, value: object) -> bool:
        """Whether an item is one of `state_dict_metadata`, `planner_data` or `storage_data`."""
        if type(key) is str:
            if isinstance(value, Opaque):
                return value.name.endswith("StorageMetadata")
            return _is_itself(key, value)
        return isinstance(key, Instance | Opaque) and key.name.endswith("MetadataIndex")

    def items(self, table: dict[object, object], flat: list[object]) -> list[object]:
        """Note what the items say; returns what is left of them for the table."""
        if type(flat[-2]) is str:
            left: list[object] = []
            for key, value in zip(flat[::2], flat[1::2], strict=True):
                left += (key, self._less(key, value))
            return left
        if self._table is None:
            self._table = table
        return flat if self._table is not table else self._noted(flat[::2], flat[1::2])

    def text(self, text: str) -> str:
        """The key that equals a text, if there is one."""
        number = self._keys.known(text)
        return text if number is None else self._keys.values[number]

    def took_from(self, value: object) -> bool:
        """Whether the places that were noted are those of the metadata `value`."""
        try:
            fields = self._fields.record(value, "Metadata")
        except FormatError:
            return True  # it will be refused
        return self._table is None or self._table is fields.get("storage_data")

    def _less(self, key: object, value: object) -> object:
        """What stands in a table for a value; the value where it cannot be taken."""
        if type(key) is not str:
            return value
        if _is_itself(key, value):
            return _ITSELF
        if not isinstance(value, Opaque) or not value.name.endswith("StorageMetadata"):
            return value
        self._keys.of(key)
        try:
            return self._described(key, value)
        except FormatError:
            return value

    def _noted(self, indices: list[object], places: list[object]) -> list[object]:
        """Note where items lie; returns those that cannot be noted, in turn."""
        columns = self._fields.items(indices, places)
        if columns is not None:
            keys, offsets, *where = columns
            spots = map(self._made.spot, offsets)
            self._places.extend(self._keys.of_all(keys), spots, *where)
            return []
        left: list[object] = []
        for index, place in zip(indices, places, strict=True):
            try:
                self._note(index, place)
            except FormatError:
                left += (index, place)
        return left

    def _note(self, index: object, place: object) -> None:
        key, offsets = self._fields.index(index)
        location = self._fields.location(place, key)
        self._places.add(self._keys.of(key), self._made.spot(offsets), location)

    def _described(self, key: str, raw: object) -> object:
        """The layout of a tensor, or `_OBJECT`."""
        if isinstance(raw, Opaque) and raw.short_name == _OBJECT_KIND:
            return _OBJECT
        fields = self._fields.record(raw, "TensorStorageMetadata", key)
        listed = fields.get("chunks")
        if not isinstance(listed, list):
            raise self._fields.broken("its chunks are not a list", key)
        self._count += len(listed)
        if self._nbytes is not None:
            check_count(self._count, self._nbytes, path=self._fields.path)
        cut = self._cut(key, listed)
        shape = self._fields.shape(fields.get("size"), "its size", key)
        dtype = self._fields.dtype(fields.get("properties"), key)
        return self._made.layout(dtype, shape, cut)

    def _cut(self, key: str, listed: list[object]) -> Cut:
        """How a tensor is cut. Equal records of a run are one, and so are lists of them."""
        alike = None
        if len(listed) <= _MAX_CHUNKS and _INSTANCE.issuperset(map(type, listed)):
            alike = tuple(listed)
            known = self._lists.get(alike)
            if known is not None:
                return known
        cut = self._cut_of(key, listed)
        if alike is not None and len(self._lists) < _MAX_CUTS:
            self._lists[alike] = cut
        return cut

    def _cut_of(self, key: str, listed: list[object]) -> Cut:
        chunks: dict[Shape, Shape] = {}
        # Of ranks that hold nothing of the tensor; torch writes an empty item for each.
        empty: dict[Shape, None] = {}
        for part in listed:
            offsets, sizes = self._fields.fields(part, CHUNK, key)
            offsets = self._fields.shape(offsets, "a chunk's offsets", key)
            sizes = self._fields.shape(sizes, "a chunk's sizes", key)
            if 0 in sizes:
                empty[offsets] = None
                continue
            known = chunks.setdefault(offsets, sizes)
            if known != sizes:
                raise self._fields.broken(
                    f"two chunks begin at {offsets}, of sizes {known} and {sizes}", key
                )
        return self._made.cut((*chunks,), (*chunks.values(),), (*empty,))

    # When all of it is read.

    def metadata(self, value: object) -> Metadata:
        """What the tables say together; `value`, the record of the file, is taken apart.

        Raises `FormatError` where they are not what DCP writes.
        """
        fields = self._fields.record(value, "Metadata")
        described = self._fields.mapping(fields.get("state_dict_metadata"), "state_dict_metadata")
        rows = self._rows(fields.get("storage_data"))
        tensors = StoredTensors(self._keys, self._places)
        objects: dict[str, tuple[Location, ...]] = {}
        for key, raw in described.items():
            if not isinstance(key, str):
                raise self._fields.broken(f"a key of its state dict is a {type(key).__name__}")
            number = self._keys.of(key)
            whole = (key,) if raw is _ITSELF else raw
            said = raw if raw is _OBJECT or type(raw) is Layout else self._described(key, whole)
            if isinstance(said, Layout):
                cut = said.cut
                tensors.add(number, said, [rows.pop(_code(number, s), -1) for s in cut.spots])
                for spot in cut.empty:
                    rows.pop(_code(number, spot), None)
            else:
                row = rows.pop(_code(number, 0), None)
                objects[key] = () if row is None else (self._places.location(row),)
        described.clear()
        if "planner_data" not in fields:  # every torch writes it, as None where nothing is nested
            raise self._fields.broken("it has no planner_data")
        flattened = bool(fields["planner_data"])
        paths = self._paths(fields["planner_data"], (*tensors, *objects))
        aliases = self._aliases(fields.get(ALIASES), tensors)
        tensors.drop(aliases)
        version = fields.get("version")
        return Metadata(
            tensors,
            objects,
            paths,
            version if isinstance(version, str) else None,
            aliases,
            self._unclaimed(rows.values()),
            flattened,
        )

    def _rows(self, raw: object) -> dict[int, int]:
        """The row of each item's place, by `_code`."""
        left = self._fields.mapping(raw, "storage_data")
        for index, place in left.items():
            self._note(index, place)
        left.clear()
        held = self._places
        codes = map(_code, held.keys, held.spots)
        rows = dict(zip(codes, range(len(held)), strict=True))
        if len(rows) < len(held):
            seen: set[int] = set()
            for key, code in zip(held.keys, map(_code, held.keys, held.spots), strict=True):
                if code in seen:
                    name = self._keys.values[key]
                    raise self._fields.broken("its storage_data has two places for one item", name)
                seen.add(code)
        return rows

    def _unclaimed(self, rows: Iterable[int]) -> tuple[tuple[str, Shape | None], ...]:
        """The keys and offsets of places that no key has a chunk for, in the order of the file."""
        if not rows:
            return ()
        offsets = [*self._made.spots]
        held = self._places
        return tuple(
            (self._keys.values[held.keys[row]], offsets[held.spots[row]]) for row in sorted(rows)
        )

    def _aliases(self, raw: object, tensors: Mapping[str, object]) -> dict[str, str]:
        """The keys that are other names of a tensor: their chunks are the very same."""
        aliases: dict[str, str] = {}
        for alias, name in self._fields.mapping({} if raw is None else raw, ALIASES).items():
            if not isinstance(alias, str) or not isinstance(name, str) or alias == name:
                raise self._fields.broken(f"its {ALIASES} do not map names to names")
            if alias not in tensors or tensors.get(name) != tensors[alias]:
                raise self._fields.broken(f"it is not the same tensor as {brief(name)}", alias)
            aliases[alias] = name
        chained = aliases.keys() & set(aliases.values())
        if chained:
            raise self._fields.broken("it is an alias, and has one", min(chained))
        return aliases

    def _paths(self, raw: object, keys: Sequence[str]) -> Paths:
        """The key's path in the nested state dict, of which the key is made."""
        planned = {} if raw is None else self._fields.mapping(raw, "planner_data")
        if not planned:  # saved without flattening
            return Paths(dict.fromkeys(keys))
        known = set(keys)
        for lost, path in planned.items():
            if lost not in known and (isinstance(path, tuple) or path is _ITSELF):
                raise self._fields.broken("its planner_data has it, its state dict does not",
                                          str(lost))  # fmt: skip
        del known
        paths = {key: self._path(planned.get(key), key) for key in keys}
        planned.clear()
        return Paths(paths)

    def _path(self, path: object, key: str) -> Path | None:
        """The path of a key; None where it is the key itself."""
        if path is _ITSELF:
            return None
        if path is None:
            raise self._fields.broken("its state dict has it, its planner_data does not", key)
        if not isinstance(path, tuple) or not path or set(map(type, path)) - {str, int}:
            raise self._fields.broken("its path in the state dict is not of names and numbers", key)
        if len(path) > MAX_STEPS:
            raise self._fields.broken(f"its path in the state dict has {len(path)} steps", key)
        named = path if all(type(step) is str for step in path) else tuple(map(str, path))
        if ".".join(named) != key:
            raise self._fields.broken(f"its path in the state dict is {brief(path)}", key)
        return None if named == (key,) else named


def _code(key: int, spot: int) -> int:
    """A key and a chunk's offsets as one number."""
    return key << 32 | spot


def _is_itself(key: object, path: object) -> bool:
    """Whether a path is that of a key at the top of the state dict."""
    if type(path) is not tuple or len(path) != 1 or type(path[0]) is not str:
        return False
    return len(path[0]) <= MAX_NAME and path[0] == key
