"""The tables of `.metadata`, taken apart while the file is read.

A table is set some items at a time; the pickle's records of each are dropped once what they say is
noted here. What is not as it should be is left in its table, and is refused when all is compared
(`parsing`).
"""

from __future__ import annotations

from array import array

from reshard.containers.dcp.columns import Cut, Layout, Layouts, Numbers, Places
from reshard.containers.dcp.records import CHUNK, INDEX, Fields
from reshard.containers.torch import Instance, Opaque
from reshard.containers.torch.nesting import check_count
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
        pairs = [*zip(indices, places, strict=True)]
        # One in a thousand is not: the pickle's frames cut it in two.
        alike = [pair for pair in pairs if type(pair[0]) is type(pair[1]) is Instance]
        columns = self.fields.items(*zip(*alike, strict=True)) if alike else None
        if columns is not None:
            keys, offsets, *where = columns
            spots = map(self.layouts.spot, offsets)
            self.places.extend(self.keys.of_all(keys), spots, *where)
            pairs = [pair for pair in pairs if not type(pair[0]) is type(pair[1]) is Instance]
        left: list[object] = []
        for index, place in pairs:
            try:
                self.place(index, place)
            except FormatError:
                left += (index, place)
        return left

    def _layout(self, key: str, raw: object) -> Layout:
        if isinstance(raw, Opaque) and raw.short_name == _OBJECT_KIND:
            return OBJECT
        fields = self.fields.record(raw, "TensorStorageMetadata", key)
        listed = fields.get("chunks")
        if not isinstance(listed, list):
            raise self.fields.broken("its chunks are not a list", key)
        self._count += len(listed)
        if self._nbytes is not None:
            check_count(self._count, self._nbytes, path=self.fields.path)
        cut = self._cut(key, listed)
        shape = self.fields.shape(fields.get("size"), "its size", key)
        return self.layouts.layout(self.fields.dtype(fields.get("properties"), key), shape, cut)

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
        chunks: dict[Shape, Shape] = {}
        # Of ranks that hold nothing of the tensor; torch writes an empty item for each.
        empty: dict[Shape, None] = {}
        for part in listed:
            offsets, sizes = self.fields.fields(part, CHUNK, key)
            offsets = self.fields.shape(offsets, "a chunk's offsets", key)
            sizes = self.fields.shape(sizes, "a chunk's sizes", key)
            if 0 in sizes:
                empty[offsets] = None
                continue
            known = chunks.setdefault(offsets, sizes)
            if known != sizes:
                raise self.fields.broken(
                    f"two chunks begin at {offsets}, of sizes {known} and {sizes}", key
                )
        return self.layouts.cut((*chunks,), (*chunks.values(),), (*empty,))


def _table_of(key: object, value: object) -> str | None:
    """The table that an item is of; None of one that is not taken apart."""
    if type(key) is not str:
        index = isinstance(key, Instance | Opaque) and key.name.endswith(INDEX)
        return STORED if index else None
    if isinstance(value, Opaque):
        return DESCRIBED if value.name.endswith("StorageMetadata") else None
    if type(value) is not tuple or len(value) != 1 or type(value[0]) is not str:
        return None
    # A path of one step, which is the key.
    return PLANNED if len(key) <= MAX_NAME and value[0] == key else None
