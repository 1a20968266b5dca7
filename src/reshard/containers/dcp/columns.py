"""The tables of a checkpoint's metadata, as columns of numbers.

A checkpoint may have 200,000 tensors or 600,000 chunks: as records they take 500 bytes each. Layers
repeat, so a few `Layout`s describe all tensors, and what is left of a chunk is a row of `Places`:
28 bytes. The records are made for who asks for them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from reshard.containers.dcp.metadata import Chunk, Location, Metadata, Path, StoredTensor
from reshard.core.tensors import MAX_NAME, Shape


class Cut(Struct, frozen=True, eq=False):
    """How tensors are cut: the chunks that hold elements, each once, in the order given.

    `spots` are the numbers of their offsets, `empty` those of chunks without elements.
    """

    offsets: tuple[Shape, ...]
    sizes: tuple[Shape, ...]
    spots: tuple[int, ...]
    empty: tuple[int, ...] = ()


class Layout(Struct, frozen=True, eq=False):
    """What is said of a tensor; one object for all tensors of which the same is said."""

    dtype: str
    shape: Shape
    cut: Cut


class Layouts:
    """Makes each layout once. `spots` are the numbers of chunks' offsets, from 0 on that of an item
    that is not a tensor."""

    def __init__(self) -> None:
        self.spots: dict[Shape | None, int] = {None: 0}
        self._cuts: dict[tuple[tuple[Shape, ...], ...], Cut] = {}
        self._made: dict[tuple[str, Shape, Cut], Layout] = {}

    def spot(self, offsets: Shape | None) -> int:
        """The number of a chunk's offsets."""
        return self.spots.setdefault(offsets, len(self.spots))

    def cut(
        self, offsets: tuple[Shape, ...], sizes: tuple[Shape, ...], empty: tuple[Shape, ...] = ()
    ) -> Cut:
        """The way to cut a tensor into these chunks, and those at `empty`."""
        known = self._cuts.get((offsets, sizes, empty))
        if known is None:
            spots = tuple(map(self.spot, offsets))
            known = Cut(offsets, sizes, spots, tuple(map(self.spot, empty)))
            self._cuts[offsets, sizes, empty] = known
        return known

    def layout(self, dtype: str, shape: Shape, cut: Cut) -> Layout:
        """What is said of a tensor."""
        known = self._made.get((dtype, shape, cut))
        if known is None:
            known = self._made[dtype, shape, cut] = Layout(dtype, shape, cut)
        return known


class Numbers:
    """Values and their numbers, counted from 0."""

    def __init__(self) -> None:
        self.values: list[str] = []
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self.values)

    def of(self, value: str) -> int:
        """The number of a value, a new one of one that was not met before."""
        number = self._numbers.setdefault(value, len(self.values))
        if number == len(self.values):
            self.values.append(value)
        return number

    def of_all(self, values: Iterable[str]) -> Iterator[int]:
        """The numbers of values, of which many are the same object."""
        held = [*values]
        if max(map(len, held), default=0) > MAX_NAME:  # to find its equal takes as long as the text
            numbers = {id(value): self.of(value) for value in {id(v): v for v in held}.values()}
            return map(numbers.__getitem__, map(id, held))
        for value in held:
            if value not in self._numbers:
                self.of(value)
        return map(self._numbers.__getitem__, held)

    def known(self, value: str) -> int | None:
        """The number of a value; None where it was not met."""
        return self._numbers.get(value)


class Places:
    """Where items lie: a row for each, with the number of its key and of its chunk's offsets."""

    def __init__(self) -> None:
        self.keys = array("I")
        self.spots = array("I")
        self.files = Numbers()
        self._file = array("I")
        self._offset = array("Q")
        self._nbytes = array("Q")
        self._transforms: dict[int, tuple[str, ...]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, key: int, spot: int, place: Location) -> int:
        """Append a row; returns its number."""
        if place.transforms:
            self._transforms[len(self)] = place.transforms
        self.extend([key], [spot], [place.file], [place.offset], [place.nbytes])
        return len(self) - 1

    def extend(
        self,
        keys: Iterable[int],
        spots: Iterable[int],
        files: Iterable[str],
        offsets: Iterable[int],
        nbytes: Iterable[int],
    ) -> None:
        """Append rows of items that went through no transform."""
        self.keys.extend(keys)
        self.spots.extend(spots)
        self._file.extend(self.files.of_all(files))
        self._offset.extend(offsets)
        self._nbytes.extend(nbytes)

    def apart(self) -> bool:
        """Whether each item of a file follows those of the rows before, as writers list them: then
        no two share a byte."""
        ends = [0] * len(self.files)
        for file, offset, nbytes in zip(self._file, self._offset, self._nbytes, strict=True):
            if offset < ends[file]:
                return False
            ends[file] = offset + nbytes
        return True

    def copies(self, rows: Iterable[int]) -> Iterator[tuple[Location, ...]]:
        """The place of each row, alone; none of one that is negative."""
        names, files, offsets, sizes = self.files.values, self._file, self._offset, self._nbytes
        if self._transforms:
            return (() if row < 0 else (self.location(row),) for row in rows)
        return (
            () if row < 0 else (Location(names[files[row]], offsets[row], sizes[row]),)
            for row in rows
        )

    def files_of(self, rows: Iterable[int]) -> set[str]:
        """The names of the files that rows are of."""
        return {*map(self.files.values.__getitem__, set(map(self._file.__getitem__, rows)))}

    def location(self, row: int) -> Location:
        """The place of a row."""
        file = self.files.values[self._file[row]]
        transforms = self._transforms.get(row, ())
        return Location(file, self._offset[row], self._nbytes[row], transforms)


class StoredTensors(Mapping[str, StoredTensor]):
    """Tensors by their keys, in the order in which they are added."""

    def __init__(self, keys: Numbers, places: Places) -> None:
        self._keys = keys
        self._places = places
        self._order = array("I")
        # By the number of the key: what is said of the tensor, and its first chunk in `_rows`.
        self._layouts: list[Layout | None] = [None] * len(keys)
        self._starts = array("I", bytes(4 * len(keys)))
        # The place of each chunk; -1 where none is known.
        self._rows = array("i")

    def add(self, number: int, layout: Layout, rows: Iterable[int]) -> None:
        """Append a tensor by the number of its key, with the place of each of its chunks."""
        missing = number + 1 - len(self._layouts)
        if missing > 0:
            self._layouts += [None] * missing
            self._starts.extend([0] * missing)
        self._order.append(number)
        self._layouts[number] = layout
        self._starts[number] = len(self._rows)
        self._rows.extend(rows)

    def drop(self, keys: Iterable[str]) -> None:
        """Take these keys out."""
        gone = {self._keys.of(key) for key in keys}
        for number in gone:
            self._layouts[number] = None
        if gone:
            self._order = array("I", [number for number in self._order if number not in gone])

    def __getitem__(self, key: str) -> StoredTensor:
        number = self._keys.known(key)
        layout = None if number is None else self._layout(number)
        if number is None or layout is None:
            raise KeyError(key)
        cut = layout.cut
        copies = self._places.copies(self._rows_of(number, cut))
        chunks = (*map(Chunk, cut.offsets, cut.sizes, copies),)
        return StoredTensor(layout.dtype, layout.shape, chunks)

    def dtype(self, key: str) -> str:
        """The name of a tensor's type."""
        number = self._keys.known(key)
        layout = None if number is None else self._layout(number)
        if layout is None:
            raise KeyError(key)
        return layout.dtype

    def __contains__(self, key: object) -> bool:
        number = self._keys.known(key) if isinstance(key, str) else None
        return number is not None and self._layout(number) is not None

    def __iter__(self) -> Iterator[str]:
        return map(self._keys.values.__getitem__, self._order)

    def __len__(self) -> int:
        return len(self._order)

    def apart(self) -> bool:
        """Whether each file lists its items one after the other, so that none overlap."""
        return self._places.apart()

    def files(self) -> set[str]:
        """The names of the files that hold items."""
        return self._places.files_of(row for row in self._rows if row >= 0)

    def places(self) -> Iterator[tuple[str, Location]]:
        """Every item, with its key."""
        for number in self._order:
            layout = self._layouts[number]
            if layout is not None:
                key = self._keys.values[number]
                for row in self._rows_of(number, layout.cut):
                    if row >= 0:
                        yield key, self._places.location(row)

    def _layout(self, number: int) -> Layout | None:
        return self._layouts[number] if number < len(self._layouts) else None

    def _rows_of(self, number: int, cut: Cut) -> array[int]:
        start = self._starts[number]
        return self._rows[start : start + len(cut.offsets)]


class Paths(Mapping[str, Path]):
    """Each key's path in the nested state dict: one of `others`, or the key itself.

    `order` are the numbers of the keys.
    """

    def __init__(self, keys: Numbers, order: Sequence[int], others: Mapping[str, Path]) -> None:
        self._keys = keys
        self._order = order
        self._others = others
        self._held = bytearray(len(keys))
        for number in order:
            self._held[number] = True

    def __getitem__(self, key: str) -> Path:
        if key not in self:
            raise KeyError(key)
        return self._others.get(key, (key,))

    def __contains__(self, key: object) -> bool:
        number = self._keys.known(key) if isinstance(key, str) else None
        return number is not None and number < len(self._held) and bool(self._held[number])

    def __iter__(self) -> Iterator[str]:
        return map(self._keys.values.__getitem__, self._order)

    def __len__(self) -> int:
        return len(self._order)


def dtype_of(metadata: Metadata, key: str) -> str:
    """The name of a tensor's type."""
    tensors = metadata.tensors
    return tensors.dtype(key) if isinstance(tensors, StoredTensors) else tensors[key].dtype


def files_of(metadata: Metadata) -> set[str]:
    """The names of the files that hold items."""
    tensors = metadata.tensors
    if isinstance(tensors, StoredTensors):
        found = tensors.files()
        found.update(place.file for copies in metadata.objects.values() for place in copies)
        return found
    return {place.file for _, place in places(metadata)}


def places(metadata: Metadata) -> Iterator[tuple[str, Location]]:
    """Every item of a checkpoint, with its key; copies of a chunk by several ranks are separate
    items."""
    tensors = metadata.tensors
    if isinstance(tensors, StoredTensors):
        yield from tensors.places()
    else:
        for key, tensor in tensors.items():
            for chunk in tensor.chunks:
                for copy in chunk.copies:
                    yield key, copy
    for key, copies in metadata.objects.items():
        for copy in copies:
            yield key, copy
