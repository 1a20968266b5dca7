"""Lay out a DCP checkpoint: which chunks, in which files, at which offsets. Pure, no I/O.

    __0_0.distcp   torch.save zips, one a chunk, back to back; the next file once one is full
    __0_1.distcp
    .metadata      written by `pickling`

As if one rank had saved with several writer threads. A large tensor is cut into rows (`by_rows`),
so that a rank that loads its part of it reads little more than that part: `dcp.load` reads chunks
whole. The number of chunks is a power of two and each but the last has ceil(rows / chunks) rows, as
FSDP cuts: for as many ranks, each chunk is exactly one rank's. Objects that are not tensors follow
the tensors, each a torch.save stream that the caller gives.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

from msgspec import Struct, field
from zlib_ng import zlib_ng

from reshard.containers.dcp import pickling
from reshard.containers.dcp.columns import Layouts, Numbers, Places, StoredTensors
from reshard.containers.dcp.metadata import Location, Metadata
from reshard.containers.dcp.pickling import StatePath
from reshard.containers.torch.write import TensorArchive, TensorBytes, lay_out_tensor
from reshard.core.dtypes import DType
from reshard.core.plan import OutputFile, Slot, Texts
from reshard.core.rearrange import crop
from reshard.core.tensors import Box, Entry, Shape, TensorSpec, whole

# Bytes of a chunk, at most, where rows allow it. Smaller chunks cost 1.4 KB each and a line of
# metadata; larger ones make many ranks read what they do not need.
MAX_CHUNK_NBYTES = 64 << 20
# Bytes of a chunk's zip beside its tensor, rounded up.
_ZIP_NBYTES = 2048
#: Cuts a tensor into chunks of at most so many bytes, where rows allow it: boxes over its shape in
#: row-major order, each one unbroken run of its elements, with the elements.
Cut = Callable[[TensorSpec, Entry, int], Iterable[tuple[Box, Entry]]]


def by_rows(spec: TensorSpec, source: Entry, max_nbytes: int) -> Iterator[tuple[Box, Entry]]:
    """The tensor in chunks of rows, ascending; a tensor without rows to cut is one chunk."""
    for box in rows(spec, max_nbytes):
        yield box, source if box.sizes == spec.shape else crop(source, box)


class Section(Struct, frozen=True):
    """What one save holds of one kind: tensors given as (spec, source, reference), in state dict
    order, tensors whose bytes are known, and objects, as torch.save streams.

    `paths` are the keys' places in the nested state dict, by the specs' names; a name that is not
    in it is its own key. The keys of `known` and `objects` are such places. `table` is the output
    files' (`OutputFile.table`), `rank` the number of the writer in their names, which two sections
    of one folder must not share.
    """

    slots: Sequence[tuple[TensorSpec, Entry, Entry | None]]
    objects: Mapping[StatePath, bytes] = {}
    known: Mapping[StatePath, TensorBytes] = {}
    paths: Mapping[str, StatePath] = {}
    table: str = ""
    rank: int = 0


def lay_out(
    slots: Sequence[tuple[TensorSpec, Entry, Entry | None]],
    max_file_nbytes: int,
    *,
    cut: Cut = by_rows,
    objects: Mapping[str, bytes] | None = None,
) -> tuple[tuple[OutputFile, ...], Texts]:
    """Files and metadata for tensors given as (spec, source, reference), in state dict order.

    A source's aliases become further keys of the same bytes. A file holds at most
    `max_file_nbytes`, unless a single row of a tensor does not fit.
    """
    section = Section(slots, {(key,): data for key, data in (objects or {}).items()})
    return lay_out_sections([section], max_file_nbytes, cut=cut)


def lay_out_sections(
    sections: Sequence[Section], max_file_nbytes: int, *, cut: Cut = by_rows, folder: str = ""
) -> tuple[tuple[OutputFile, ...], Texts]:
    """Files and metadata of one save, in a sub-folder where `folder` (`"optim_states/"`) is given.

    Aliases and sizes as in `lay_out`.
    """
    tensors = _Tensors()
    stored: dict[str, tuple[Location, ...]] = {}
    aliases: dict[str, str] = {}
    paths: dict[str, StatePath] = {}
    output: list[OutputFile] = []

    def key_of(path: StatePath) -> str:
        key = ".".join(map(str, path))
        if path != (key,):
            paths[key] = path
        return key

    for section in sections:
        files = _Files(max_file_nbytes, section.rank)
        for spec, source, _ in section.slots:
            path = section.paths.get(spec.name, (spec.name,))
            key = key_of(path)
            tensors.add(key, spec, _chunks(spec, source, files, max_file_nbytes, cut))
            for alias in source.aliases:
                aliases[key_of((*path[:-1], alias))] = key
        for path, known in section.known.items():
            spec = TensorSpec("", known.dtype, known.shape)
            tensors.add(key_of(path), spec, [(whole(spec.shape), files.add_object(_item(known)))])
        for path, data in section.objects.items():
            stored[key_of(path)] = (files.add_object(data),)
        output += [file.output(folder, section.table) for file in files.all]
    found = Metadata(tensors.table, stored, {}, None, aliases)
    return tuple(output), ((f"{folder}.metadata", pickling.dump(found, paths)),)


class _Tensors:
    """The tensors of a save, as they are laid out."""

    def __init__(self) -> None:
        self._keys, self._places, self._layouts = Numbers(), Places(), Layouts()
        self.table = StoredTensors(self._keys, self._places)

    def add(self, key: str, spec: TensorSpec, chunks: Iterable[tuple[Box, Location]]) -> None:
        """Note a tensor's chunks, and where they lie."""
        number = self._keys.of(key)
        boxes, places = zip(*chunks, strict=True)
        cut = self._layouts.cut(
            tuple([box.offsets for box in boxes]), tuple([box.sizes for box in boxes])
        )
        rows = [self._places.add(number, *one) for one in zip(cut.spots, places, strict=True)]
        self.table.add(number, self._layouts.layout(spec.dtype.name, spec.shape, cut), rows)


def _chunks(
    spec: TensorSpec, source: Entry, files: _Files, max_file_nbytes: int, cut: Cut
) -> Iterator[tuple[Box, Location]]:
    """Cut a tensor, and give each chunk its place."""
    for box, held in cut(spec, source, min(MAX_CHUNK_NBYTES, max_file_nbytes - _ZIP_NBYTES)):
        archive, crcs = _archive(spec.dtype, box.sizes)
        part = spec if box.sizes == spec.shape else TensorSpec(spec.name, spec.dtype, box.sizes)
        yield box, files.room(archive.nbytes).add(part, held, archive, crcs)


def _item(known: TensorBytes) -> bytes:
    """The whole item of a tensor whose bytes are known."""
    archive, _ = _archive(known.dtype, known.shape)
    return archive.before + known.data + archive.after(zlib_ng.crc32(known.data))


class _Files:
    """The output files; only the last one still grows."""

    def __init__(self, max_nbytes: int, rank: int = 0) -> None:
        self._max_nbytes = max_nbytes
        self._rank = rank
        self.all = [_File(f"__{rank}_0.distcp")]

    def room(self, nbytes: int) -> _File:
        """The file that an item of this size goes into."""
        last = self.all[-1]
        if last.nbytes and last.nbytes + nbytes > self._max_nbytes:
            self.all.append(_File(f"__{self._rank}_{len(self.all)}.distcp"))
        return self.all[-1]

    def add_object(self, data: bytes) -> Location:
        """An item whose bytes are known, into whichever file has room."""
        return self.room(len(data)).add_object(data)


class Literals(Sequence[tuple[int, bytes]]):
    """Bytes that are known, at their offsets, as two columns: chunks of one shape share the bytes,
    and a tuple with the offset would take a hundred more."""

    def __init__(self) -> None:
        self._offsets = array("Q")
        self._data: list[bytes] = []

    def append(self, offset: int, data: bytes) -> None:
        """Note bytes after all others."""
        self._offsets.append(offset)
        self._data.append(data)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Literals):
            return NotImplemented
        return (self._offsets, self._data) == (other._offsets, other._data)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        return zip(self._offsets, self._data, strict=True)

    @overload
    def __getitem__(self, index: int) -> tuple[int, bytes]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, bytes]]: ...

    def __getitem__(self, index: int | slice) -> tuple[int, bytes] | list[tuple[int, bytes]]:
        if isinstance(index, slice):
            return [*zip(self._offsets[index], self._data[index], strict=True)]
        return self._offsets[index], self._data[index]


class _File(Struct):
    """A file as it grows."""

    name: str
    nbytes: int = 0
    literals: Literals = field(default_factory=lambda: Literals())
    slots: list[Slot] = field(default_factory=list)

    def add(
        self, spec: TensorSpec, source: Entry, archive: TensorArchive, crcs: tuple[int, ...]
    ) -> Location:
        start = self.nbytes
        data = start + len(archive.before)
        self.literals.append(start, archive.before)
        self.literals.append(data + archive.data_nbytes, archive.rest)
        self.slots.append(Slot(data, spec, source, crcs))
        self.nbytes += archive.nbytes
        return Location(self.name, start, archive.nbytes)

    def add_object(self, data: bytes) -> Location:
        start = self.nbytes
        self.literals.append(start, data)
        self.nbytes += len(data)
        return Location(self.name, start, len(data))

    def output(self, folder: str, table: str) -> OutputFile:
        """The file as a plan has it."""
        name = folder + self.name
        return OutputFile(name, self.nbytes, self.literals, tuple(self.slots), table)


def rows(spec: TensorSpec, max_nbytes: int) -> Iterator[Box]:
    """The boxes of `by_rows`."""
    total = spec.shape[0] if spec.shape else 1
    count = 1
    while spec.nbytes > max_nbytes * count and count < total:
        count *= 2
    if count == 1:
        yield whole(spec.shape)
        return
    step = -(-total // count)
    tail = (0,) * (len(spec.shape) - 1)
    for start in range(0, total, step):
        sizes = (min(step, total - start), *spec.shape[1:])
        yield Box(spec.shape, (start, *tail), sizes)


@functools.lru_cache(maxsize=256)
def _archive(dtype: DType, shape: Shape) -> tuple[TensorArchive, tuple[int, ...]]:
    """The archive of a chunk, and where its CRC-32 belongs, from the data's first byte on."""
    # Layers repeat: a model has a dozen different chunks.
    archive = lay_out_tensor(dtype, shape)
    return archive, tuple(archive.data_nbytes + offset for offset in archive.crc_offsets)
