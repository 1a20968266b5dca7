"""The records of `.metadata`, field by field: what the restricted reader gives, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any

from reshard.containers.dcp.metadata import Location
from reshard.containers.torch import Global, Instance, Opaque
from reshard.containers.torch.rows import Rows, each, pieces
from reshard.core.dtypes import DType
from reshard.core.tensors import MAX_DIMS, MAX_NUMEL, Shape
from reshard.errors import FormatError, brief

INDEX, PLACE, CHUNK = "MetadataIndex", "_StorageInfo", "ChunkStorageMetadata"
_FIELDS = {
    INDEX: ("fqn", "offset"),
    PLACE: ("relative_path", "offset", "length", "transform_descriptors"),
    CHUNK: ("offsets", "sizes"),
}
_INT = frozenset({int})
_OFFSET = frozenset({tuple, type(None)})


class Fields:
    """Reads the fields of records; knows the file's name for the errors."""

    def __init__(self, path: str) -> None:
        self.path = path
        # Chunks of all layers have the same few sizes, which a run of records shares.
        self._shapes: dict[Shape, Shape] = {}
        self._kinds: dict[tuple[str, str], bool] = {}
        # By kind: of which class and keys, what gets its fields, whether it has all of them.
        self._getters: dict[str, tuple[str, tuple[str, ...], itemgetter[Any], bool]] = {}

    def record(self, raw: object, kind: str, key: str | None = None) -> Mapping[str, object]:
        """The fields of an instance of `kind`, whatever module it came from (they moved)."""
        if isinstance(raw, Instance) and self._is(raw, kind):
            return dict(zip(raw.keys, raw.values, strict=True))
        if not isinstance(raw, Opaque) or not raw.short_name.endswith(kind):
            found = raw.name if isinstance(raw, Opaque | Instance) else type(raw).__name__
            raise self.broken(f"it has a {found} where a {kind} belongs", key)
        state = raw.state if raw.state is not None else {}
        if not isinstance(state, dict):
            raise self.broken(f"the fields of a {kind} are a {type(state).__name__}", key)
        return state

    def fields(self, raw: object, kind: str, key: str | None = None) -> tuple[Any, ...]:
        """The fields of an `INDEX`, a `PLACE` or a `CHUNK`, None for those that it lacks."""
        if type(raw) is Instance:
            known = self._getters.get(kind)
            # Records of one class share their name and keys; two million are asked.
            if known is None or known[0] is not raw.name or known[1] is not raw.keys:
                known = self._getter(raw, kind)
            if known is not None:
                found: tuple[Any, ...] = known[2](raw.values if known[3] else (*raw.values, None))
                return found
        record = self.record(raw, kind, key)
        return tuple([record.get(name) for name in _FIELDS[kind]])

    def columns(self, raw: Sequence[object], kind: str) -> tuple[Sequence[Any], ...] | None:
        """The fields of many records, a column each; None unless all are spelt alike."""
        first = raw[0]
        if set(map(type, raw)) != {Instance} or not isinstance(first, Instance):
            return None
        for same in ("name", "keys"):
            if len(set(map(attrgetter(same), raw))) > 1:
                return None
        known = self._getter(first, kind)
        if known is None:
            return None
        values = map(attrgetter("values"), raw)
        rows = values if known[3] else ((*one, None) for one in values)
        return tuple(zip(*map(known[2], rows), strict=True))

    def index(self, raw: object) -> tuple[str, Shape | None]:
        """The key and the chunk's offsets that an index names; items that are not tensors have no
        offset in the index."""
        fqn, offset = self.fields(raw, INDEX)
        if not isinstance(fqn, str):
            raise self.broken("an index of its storage_data has no name")
        return fqn, None if offset is None else self.shape(offset, "an index's offset", fqn)

    def location(self, raw: object, key: str) -> Location:
        """The place of an item."""
        name, offset, nbytes, transforms = self.fields(raw, PLACE, key)
        if not isinstance(name, str):
            raise self.broken("a chunk's file has no name", key)
        for number in (offset, nbytes):
            if type(number) is not int or not 0 <= number < MAX_NUMEL:
                self.shape((offset, nbytes), "a place", key)
        if not transforms:
            return Location(name, offset, nbytes)
        if not isinstance(transforms, list | tuple) or set(map(type, transforms)) - {str}:
            raise self.broken("a chunk's transforms are not a list of texts", key)
        return Location(name, offset, nbytes, tuple(transforms))

    def items(
        self, indices: Sequence[object], places: Sequence[object]
    ) -> tuple[Sequence[Any], ...] | None:
        """Keys, offsets, files, bytes' offsets and numbers of items, a column each; None where they
        are not spelt alike, or not as they should be."""
        index, place = self.columns(indices, INDEX), self.columns(places, PLACE)
        if index is None or place is None:
            return None
        (keys, offsets), (files, starts, lengths, transforms) = index, place
        if {*map(type, keys), *map(type, files)} != {str} or any(transforms):
            return None
        if not _OFFSET.issuperset(map(type, offsets)):
            return None
        for numbers in (starts, lengths):
            if not _INT.issuperset(map(type, numbers)):
                return None
            if min(numbers) < 0 or max(numbers) >= MAX_NUMEL:
                return None
        if not _are_shapes([one for one in offsets if one is not None]):
            return None
        return keys, offsets, files, starts, lengths

    def item_rows(
        self, indices: tuple[object, int, int], places: tuple[object, int, int]
    ) -> tuple[Sequence[Any], ...] | None:
        """What `items` gives, of records of `Rows`."""
        (index, *keyed), (place, *placed) = indices, places
        if not isinstance(index, Rows) or not isinstance(place, Rows):
            return None
        if not self._is(index, INDEX) or not self._is(place, PLACE):
            return None
        if not place.lacks("transform_descriptors"):
            return None
        keys, offsets = index.texts("fqn", *keyed), index.sizes("offset", *keyed)
        files = place.texts("relative_path", *placed)
        starts, lengths = place.numbers("offset", *placed), place.numbers("length", *placed)
        if keys is None or offsets is None or files is None or starts is None or lengths is None:
            return None
        # They have at most 48 bits, and sizes are natural.
        if starts.min() < 0 or lengths.min() < 0:
            return None
        return keys, offsets, files, starts.tolist(), lengths.tolist()

    def chunks(
        self, raw: Sequence[object], key: str
    ) -> tuple[Sequence[Shape], Sequence[Shape], bool]:
        """Offsets and sizes of chunks, and whether no two begin at one place and all hold elements.

        Raises `FormatError` where they are not chunks.
        """
        offsets, sizes = self._chunk_columns(raw) or self._chunk_pieces(raw, key)
        plain = len(set(offsets)) == len(offsets) and not any(0 in shape for shape in set(sizes))
        return offsets, sizes, plain

    def _chunk_columns(
        self, raw: Sequence[object]
    ) -> tuple[Sequence[Shape], Sequence[Shape]] | None:
        """Offsets and sizes of chunks that are spelt alike, and as they should be."""
        columns = self.columns(raw, CHUNK) if raw else None
        if columns is None:
            return None
        offsets, sizes = columns
        if {*map(type, offsets), *map(type, sizes)} != {tuple}:
            return None
        if not _are_shapes(offsets) or not _are_shapes(sizes):
            return None
        return offsets, sizes

    def _chunk_pieces(self, raw: Sequence[object], key: str) -> tuple[list[Shape], list[Shape]]:
        """Offsets and sizes of chunks, each checked but those of `Rows`, which are as they should
        be."""
        offsets, sizes = list[Shape](), list[Shape]()
        for piece in pieces(raw):
            rows, start, stop = piece
            if isinstance(rows, Rows) and self._is(rows, CHUNK):
                found = rows.sizes("offsets", start, stop), rows.sizes("sizes", start, stop)
                if found[0] is not None and found[1] is not None:
                    offsets += self._shared(found[0])
                    sizes += self._shared(found[1])
                    continue
            for part in each(piece):
                one, other = self.fields(part, CHUNK, key)
                offsets.append(self.shape(one, "a chunk's offsets", key))
                sizes.append(self.shape(other, "a chunk's sizes", key))
        return offsets, sizes

    def _shared(self, shapes: list[Shape]) -> list[Shape]:
        """The shapes; one object for all that are equal."""
        known = self._shapes
        return [known.setdefault(shape, shape) for shape in shapes]

    def dtype(self, raw: object, key: str) -> str:
        """The name of the type that TensorProperties state."""
        # They are pickled as (dtype, layout, requires_grad, format, pinned).
        state = raw.state if isinstance(raw, Opaque) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if isinstance(state, dict):
            dtype = state.get("dtype")
        if isinstance(dtype, DType | Global):
            return dtype.name
        raise self.broken("it has no dtype", key)

    def shape(self, raw: object, what: str, key: str) -> Shape:
        """A tuple of natural numbers; one object for all that are equal."""
        # Hashing what is not of numbers may take for ever: a tuple of two of the tuple before.
        if isinstance(raw, tuple) and len(raw) <= MAX_DIMS and _INT.issuperset(map(type, raw)):
            known: Shape = raw
            if self._shapes.get(known) is known:
                return known
        shape = self._checked(raw, what, key)
        return self._shapes.setdefault(shape, raw if raw == shape else shape)

    def mapping(self, raw: object, what: str) -> dict[object, object]:
        """A table of the metadata."""
        if not isinstance(raw, dict):
            raise self.broken(f"its {what} is a {type(raw).__name__}")
        return raw

    def broken(self, what: str, key: str | None = None) -> FormatError:
        """The error that the file is damaged."""
        return FormatError(
            f"{what}.",
            path=self.path,
            tensor=key,
            hint="The file is damaged, or was not written by torch.distributed.checkpoint.",
        )

    def _checked(self, raw: object, what: str, key: str) -> Shape:
        if not isinstance(raw, tuple):
            raise self.broken(f"{what} is a {type(raw).__name__}", key)
        if len(raw) > MAX_DIMS:
            raise self.broken(f"{what} has {len(raw)} dimensions", key)
        numbers = []
        for number in raw:
            if type(number) is not int or not 0 <= number < MAX_NUMEL:
                raise self.broken(f"{what} has {brief(number)}", key)
            numbers.append(number)
        return tuple(numbers)

    def _is(self, raw: Instance | Rows, kind: str) -> bool:
        known = self._kinds.get((raw.name, kind))
        if known is None:
            known = raw.name.rpartition(".")[2].endswith(kind)
            self._kinds[raw.name, kind] = known
        return known

    def _getter(
        self, raw: Instance, kind: str
    ) -> tuple[str, tuple[str, ...], itemgetter[Any], bool] | None:
        """What gets the fields of a record; None where it is of another kind."""
        if not self._is(raw, kind):
            return None
        lacking = len(raw.keys)
        places = [raw.keys.index(name) if name in raw.keys else lacking for name in _FIELDS[kind]]
        made = (raw.name, raw.keys, itemgetter(*places), max(places) < lacking)
        self._getters[kind] = made
        return made


def _are_shapes(sizes: Sequence[Shape]) -> bool:
    """Whether tuples of numbers can be shapes or places in tensors."""
    if max(map(len, sizes), default=0) > MAX_DIMS:
        return False
    some = [one for one in sizes if one]
    return min(map(min, some), default=0) >= 0 and max(map(max, some), default=0) < MAX_NUMEL
