"""The tables of `.metadata`, taken apart while the file is read.

A table is set some items at a time; the pickle's records of each are dropped once what they say is
noted here. What is not as it should be is left in its table, and is refused when all is compared
(`parsing`).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from msgspec import Struct

from reshard.containers.dcp.columns import Cut, Layout, Layouts, Numbers, Places
from reshard.containers.dcp.records import INDEX, Fields
from reshard.containers.torch import Instance, Opaque
from reshard.containers.torch.nesting import check_count
from reshard.containers.torch.records import Shared
from reshard.containers.torch.rows import Rows, aligned, each, pieces
from reshard.core.tensors import MAX_NAME, Shape
from reshard.errors import FormatError

#: The fields of the metadata that are taken apart.
DESCRIBED, PLANNED, STORED = "state_dict_metadata", "planner_data", "storage_data"
#: What is said of an item that is not a tensor.
OBJECT = Layout("", (), Cut((), (), ()))
_OBJECT_KIND = "BytesStorageMetadata"
_INSTANCE = frozenset({Instance})
# Lists of chunks that are kept to be met again, and chunks of such a list.
_MAX_LISTS, _MAX_CHUNKS = 1 << 14, 4096


class Tables:
    """What the tables of one file say, as columns. It is the `Compactor` of the file's pickle.

    Of a pickle of `nbytes` it takes no more chunks than such a pickle may stand for. `order` are
    the numbers of the keys that are described, in the order of the file; `said` has what is said of
    each key, by its number, and `at_top` whether its path is the key itself.
    """

    def __init__(self, path: str, nbytes: int | None = None) -> None:
        self.fields = Fields(path)
        self.keys = Numbers()
        self.layouts = Layouts()
        self.order = array("I")
        self.said: list[Layout | None] = []
        self.at_top = bytearray()
        self.places = Places()
        self._nbytes = nbytes
        self._count = 0
        self._taken: dict[str, dict[object, object]] = {}
        self._lists: dict[tuple[object, ...], Cut] = {}
        # By the ids of lists: of one call of `items`, or of what is left in a table.
        self._walked: dict[int, Cut] = {}
        # By the ids of records that stand for many.
        self._shared: dict[int, _Described] = {}

    def takes(self, key: object, value: object) -> bool:
        """Whether an item is one of a table that is taken apart."""
        return _table_of(key, value) is not None

    def items(self, table: dict[object, object], flat: list[object]) -> list[object]:
        """Note what the items say; returns what is left of them for the table."""
        kind = _table_of(flat[-2], flat[-1])
        if kind is None or self._taken.setdefault(kind, table) is not table:
            return flat
        keys, values = flat[::2], flat[1::2]
        if kind == STORED:
            return self._stored(keys, values)
        left: list[object] = []
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str or _table_of(key, value) != kind:
                left += (key, value)
            elif kind == PLANNED:
                number = self._number(key)
                # A key that is set twice is refused by the reader.
                left += (key, value) * 2 if self.at_top[number] else ()
                self.at_top[number] = True
            else:
                try:
                    added = self.describe(key, value)
                except FormatError:
                    left += (key, value)
                else:
                    left += () if added else (key, value) * 2
        self._walked.clear()
        return left

    def text(self, text: str) -> str:
        """The key that equals a text, if there is one."""
        number = self.keys.known(text)
        return text if number is None else self.keys.values[number]

    def are_of(self, value: object) -> bool:
        """Whether the tables that were taken apart are those of the metadata `value`."""
        try:
            fields = self.fields.record(value, "Metadata")
        except FormatError:
            return True  # it will be refused
        return all(table is fields.get(kind) for kind, table in self._taken.items())

    def describe(self, key: str, raw: object) -> bool:
        """Note what is said of a key; False where something was said before.

        Raises `FormatError` where it is neither a tensor nor an object.
        """
        layout = self._layout(key, raw)
        number = self._number(key)
        if self.said[number] is not None:
            return False
        self.said[number] = layout
        self.order.append(number)
        return True

    def has(self, key: object) -> bool:
        """Whether anything is said of a key."""
        number = self.keys.known(key) if isinstance(key, str) else None
        return number is not None and number < len(self.said) and self.said[number] is not None

    def place(self, index: object, place: object) -> None:
        """Note where an item lies. Raises `FormatError` where it is not a place."""
        key, offsets = self.fields.index(index)
        location = self.fields.location(place, key)
        self.places.add(self.keys.of(key), self.layouts.spot(offsets), location)

    def _number(self, key: str) -> int:
        number = self.keys.of(key)
        missing = len(self.keys) - len(self.said)
        if missing > 0:
            self.said += [None] * missing
            self.at_top += bytes(missing)
        return number

    def _stored(self, indices: list[object], places: list[object]) -> list[object]:
        """Note where items lie, in the order of the file: those that are spelt alike at once."""
        if any(type(value) is Rows for value in indices):
            return self._stored_rows(indices, places)
        # One in a thousand is another record: the pickle's frames cut it in two.
        kinds = zip(map(type, indices), map(type, places), strict=True)
        alike = bytes([kind == (Instance, Instance) for kind in kinds])
        left: list[object] = []
        start = 0
        while start < len(alike):
            other = alike.find(0, start)
            stop = len(alike) if other < 0 else max(other, start + 1)
            some = indices[start:stop], places[start:stop]
            columns = self.fields.items(*some) if alike[start] else None
            if columns is not None:
                self._extend(*columns)
            else:
                left += self._stored_each(*some)
            start = stop
        return left

    def _stored_rows(self, indices: list[object], places: list[object]) -> list[object]:
        """Note where items lie, of which many are `Rows`."""
        left: list[object] = []
        for index, place in aligned(indices, places):
            columns = self.fields.item_rows(index, place)
            if columns is not None:
                self._extend(*columns)
            else:
                left += self._stored_each(each(index), each(place))
        for value in (*indices, *places):
            if isinstance(value, Rows):
                value.take()
        return left

    def _extend(
        self,
        keys: Sequence[str],
        offsets: Sequence[Shape | None],
        files: Sequence[str],
        starts: Sequence[int],
        lengths: Sequence[int],
    ) -> None:
        """Note where items lie."""
        known = self.layouts.spots
        try:
            spots = [known[one] for one in offsets]
        except KeyError:
            spots = [self.layouts.spot(one) for one in offsets]
        self.places.extend(self.keys.of_all(keys), spots, files, starts, lengths)

    def _stored_each(self, indices: list[object], places: list[object]) -> list[object]:
        left: list[object] = []
        for index, place in zip(indices, places, strict=True):
            try:
                self.place(index, place)
            except FormatError:
                left += (index, place)
        return left

    def _layout(self, key: str, raw: object) -> Layout:
        if isinstance(raw, Opaque) and raw.short_name == _OBJECT_KIND:
            return OBJECT
        known = self._shared.get(id(raw))
        if known is None:
            known = self._layout_of(key, raw)
            if type(raw) is Shared and len(self._shared) < _MAX_LISTS:
                self._shared[id(raw)] = known
        else:
            self._add_count(known.count)
        return known.layout

    def _layout_of(self, key: str, raw: object) -> _Described:
        fields = self.fields.record(raw, "TensorStorageMetadata", key)
        listed = fields.get("chunks")
        if not isinstance(listed, list):
            raise self.fields.broken("its chunks are not a list", key)
        count = sum(stop - start for _, start, stop in pieces(listed))
        self._add_count(count)
        cut = self._cut(key, listed)
        shape = self.fields.shape(fields.get("size"), "its size", key)
        dtype = self.fields.dtype(fields.get("properties"), key)
        return _Described(raw, count, self.layouts.layout(dtype, shape, cut))

    def _add_count(self, count: int) -> None:
        """Count chunks; refuse more than a pickle of so many bytes may stand for."""
        self._count += count
        if self._nbytes is not None:
            check_count(self._count, self._nbytes, path=self.fields.path)

    def _cut(self, key: str, listed: list[object]) -> Cut:
        """How a tensor is cut. Equal records of a run are one, and so are lists of them."""
        cut = self._walked.get(id(listed))
        if cut is None:
            cut = self._walked[id(listed)] = self._cut_alike(key, listed)
        return cut

    def _cut_alike(self, key: str, listed: list[object]) -> Cut:
        alike = None
        if len(listed) <= _MAX_CHUNKS and _INSTANCE.issuperset(map(type, listed)):
            alike = tuple(listed)
            known = self._lists.get(alike)
            if known is not None:
                return known
        cut = self._cut_of(key, listed)
        if alike is not None and len(self._lists) < _MAX_LISTS:
            self._lists[alike] = cut
        return cut

    def _cut_of(self, key: str, listed: list[object]) -> Cut:
        offsets, sizes, plain = self.fields.chunks(listed, key)
        for part in listed:
            if isinstance(part, Rows):
                part.take()
        if plain:
            return self.layouts.cut(tuple(offsets), tuple(sizes))
        chunks: dict[Shape, Shape] = {}
        # Of ranks that hold nothing of the tensor; torch writes an empty item for each.
        empty: dict[Shape, None] = {}
        for start, size in zip(offsets, sizes, strict=True):
            if 0 in size:
                empty[start] = None
                continue
            known = chunks.setdefault(start, size)
            if known != size:
                raise self.fields.broken(
                    f"two chunks begin at {start}, of sizes {known} and {size}", key
                )
        return self.layouts.cut((*chunks,), (*chunks.values(),), (*empty,))


class _Described(Struct, frozen=True):
    """What a record says of a tensor, and how many chunks it lists."""

    raw: object
    count: int
    layout: Layout


def _table_of(key: object, value: object) -> str | None:
    """The table that an item is of; None of one that is not taken apart."""
    if type(key) is not str:
        index = isinstance(key, Instance | Opaque | Rows) and key.name.endswith(INDEX)
        return STORED if index else None
    if isinstance(value, Opaque):
        return DESCRIBED if value.name.endswith("StorageMetadata") else None
    if type(value) is not tuple or len(value) != 1 or type(value[0]) is not str:
        return None
    # A path of one step, which is the key.
    return PLANNED if len(key) <= MAX_NAME and value[0] == key else None
