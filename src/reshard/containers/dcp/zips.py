"""Items that are torch.save zips: where the one tensor of each lies, and its checksum.

Only the two ends of an item are read, one read each. Ranks save the same shapes in every layer,
so most items have a pickle that was seen before: each different one is parsed once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec import Struct

from reshard.containers import torch as torchfile
from reshard.containers.torch.archive import Archive
from reshard.containers.torch.directory import ArchiveEntry
from reshard.core.dtypes import DType
from reshard.core.tensors import Extent, FileRef, Record, Shape
from reshard.errors import FormatError
from reshard.storage.source import Identity, Source

# Bytes kept of each end. torch.save puts about 700 before the tensor of an item and 600 behind it,
# its directory included; `Archive` asks for as much at once.
_END_NBYTES = 4096
# Bytes. The pickle of a plain tensor has about 150; a larger one is not a plain tensor's.
_MAX_PICKLE_NBYTES = 1 << 20
# In a zip: the beginning of a directory's entry, where its CRC-32 and its header's place stand; the
# CRC-32 of a local header; the beginning of a data descriptor, whose CRC-32 follows.
_CENTRAL_SIGNATURE, _CENTRAL_CRC_AT, _HEADER_AT = b"PK\1\2", 16, 42
_LOCAL_CRC_AT = 14
_DESCRIPTOR = b"PK\7\x08"
# torch writes a hash of all records here, to distinguish files. No reader uses it.
_OWN = ".data/serialization_id"
# Kinds of items of one size.
_MAX_ALIKE = 4


class StoredItem(Struct, frozen=True, gc=False):
    """A tensor in a file. `record` is the checksum of its storage, where the zip states one."""

    dtype: DType
    shape: Shape
    strides: Shape | None
    extent: Extent
    record: Record | None


class _Parsed(Struct, frozen=True):
    """What a pickle says: a tensor in bytes `[start, start + nbytes)` of the entry `storage`."""

    dtype: DType
    shape: Shape
    strides: Shape | None
    start: int
    nbytes: int
    storage: str
    storage_nbytes: int


class Ends(Source):
    """An item, `nbytes` long at byte `offset`, of which the first and last bytes are in memory."""

    def __init__(self, whole: Source, offset: int, nbytes: int, head: bytes, tail: bytes) -> None:
        super().__init__(whole.ref, None, whole.identity, whole.size)
        self.offset = offset
        self.nbytes = nbytes
        self.head: bytes = head
        self.tail: bytes = tail
        self._whole = whole
        self._parts = ((offset, head), (offset + nbytes - len(tail), tail))

    def last(self, nbytes: int) -> bytes:
        """The last bytes; fewer where they are not all in memory."""
        if nbytes <= len(self.tail):
            return self.tail[len(self.tail) - nbytes :]
        whole = len(self.head) + len(self.tail) == self.nbytes
        return (self.head + self.tail)[-nbytes:] if whole else b""

    def read(self, offset: int, nbytes: int) -> bytes:
        for start, data in self._parts:
            if start <= offset and offset + nbytes <= start + len(data):
                return data[offset - start : offset - start + nbytes]
        return self._whole.read(offset, nbytes)


class Windows:
    """Reads the ends of a file's items. What ends one item and begins the next is read at once."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._start, self._data = 0, b""

    def ends(self, offset: int, nbytes: int) -> Ends:
        """The item in bytes `[offset, offset + nbytes)`."""
        source = self._source
        head_nbytes = min(nbytes, _END_NBYTES)
        skip = offset - self._start
        if skip >= 0 and skip + head_nbytes <= len(self._data):
            head = self._data[skip : skip + head_nbytes]
        else:
            head = source.read(offset, head_nbytes)
        tail_nbytes = min(nbytes - head_nbytes, _END_NBYTES)
        end = offset + nbytes
        last = end - tail_nbytes
        # As far as the file goes: what follows is the next item as a rule.
        stop = max(end, min(source.size, end + _END_NBYTES))
        self._start, self._data = last, source.read(last, stop - last)
        return Ends(source, offset, nbytes, head, self._data[:tail_nbytes])


def ends_of_frame(source: Source, ref: FileRef, pieces: Iterator[bytes], limit: int) -> Ends:
    """The item that a compressed frame of `source` holds, its ends kept as the bytes pass.

    Raises `FormatError` where more than `limit` bytes come out of the frame.
    """
    head = tail = b""
    nbytes = 0
    for piece in pieces:
        head += piece[: _END_NBYTES - len(head)]
        tail = (tail + piece)[-_END_NBYTES:]
        nbytes += len(piece)
        if nbytes > limit:
            raise FormatError(
                f"its frame holds more than {limit} bytes, but its chunk needs fewer.",
                path=ref.path,
                hint="The file is damaged or was crafted to mislead.",
            )
    return Ends(_Frame(ref, source.identity, nbytes), 0, nbytes, head, tail)


class _Frame(Source):
    """A compressed frame of which only the ends were kept."""

    def __init__(self, ref: FileRef, identity: Identity, nbytes: int) -> None:
        super().__init__(ref, None, identity, nbytes)

    def read(self, offset: int, nbytes: int) -> bytes:
        raise FormatError(
            f"the bytes from {offset} on are not part of a tensor.",
            path=self.ref.path,
            hint="It was not written by torch.distributed.checkpoint.",
        )


class Zips:
    """Finds tensors in zips. It remembers what it has parsed, so it serves one checkpoint.

    Items of one shape differ in their tensor and its checksum alone: an item is compared with one
    that was read (`_Alike`) before it is read itself. A checkpoint of 46,000 chunks opened in 10 s
    with every pickle parsed, and in 4.5 s with each different one parsed once.
    """

    def __init__(self) -> None:
        self._alike: dict[int, list[_Alike]] = {}
        self._parsed: dict[tuple[bytes, ArchiveEntry | None], _Parsed] = {}

    def locate(self, item: Ends) -> StoredItem:
        """The tensor of a zip.

        Raises `FormatError`, `IncompleteError` and `UnsupportedError` as `torchfile.read` does,
        and `FormatError` where the zip holds anything but one tensor.
        """
        known = self._alike.setdefault(item.nbytes, [])
        for one in known:
            found = one.locate(item)
            if found is not None:
                return found
        archive = Archive(item, item.offset, item.nbytes)
        found = self._read(item, archive)
        if len(known) < _MAX_ALIKE:
            alike = _Alike.of(item, archive, found)
            if alike is not None and alike.locate(item) == found:
                known.append(alike)
        return found

    def _read(self, item: Ends, archive: Archive) -> StoredItem:
        key = (archive.read("data.pkl", _MAX_PICKLE_NBYTES), archive.entries.get("byteorder"))
        parsed = self._parsed.get(key)
        if parsed is None or not _fits(parsed, archive):
            file = torchfile.read(item, offset=item.offset, nbytes=item.nbytes)
            parsed = self._parsed[key] = _parse(file.value, archive, item.ref.path)
        storage = archive.locate(parsed.storage)
        crc32 = archive.entries[parsed.storage].crc32
        return StoredItem(
            parsed.dtype,
            parsed.shape,
            parsed.strides,
            Extent(item.ref, storage.offset + parsed.start, parsed.nbytes),
            Record(storage, crc32) if crc32 is not None and storage.nbytes else None,
        )


class _Alike(Struct, frozen=True):
    """What the bytes of an item around its storage are, but for what differs from item to item.

    `head` and `tail` match all bytes before and behind the storage. Left open are the checksums of
    the storage and of `_OWN`, and the data of `_OWN`: of all these, readers use the storage's
    checksum in the directory alone, which is the group of `tail`. All else that a reader sees is
    equal, so it finds the same.
    """

    head: re.Pattern[bytes]
    tail: re.Pattern[bytes]
    head_nbytes: int
    tail_nbytes: int
    storage_nbytes: int
    start: int
    item: StoredItem

    @staticmethod
    def of(item: Ends, archive: Archive, found: StoredItem) -> _Alike | None:
        """What others are compared with; None where not all of it is in memory."""
        stored = [name for name in archive.entries if name.startswith("data/")]
        if len(stored) != 1:
            return None
        storage = archive.locate(stored[0])
        begin = storage.offset - item.offset
        after = begin + storage.nbytes
        tail = item.last(item.nbytes - after)
        if begin > len(item.head) or len(tail) != item.nbytes - after:
            return None
        stated: list[tuple[int, int]] = []  # where the storage's checksum stands in the directory
        opened: list[tuple[int, int]] = []
        for name in (*stored, _OWN):
            entry = archive.entries.get(name)
            if entry is None:
                continue
            central = _central(tail, entry.header)
            place = archive.locate(name)
            data = place.offset - item.offset
            end = data + place.nbytes
            if central is None:
                return None
            checksum = (after + central, after + central + 4)
            opened.append((entry.header + _LOCAL_CRC_AT, entry.header + _LOCAL_CRC_AT + 4))
            if tail.startswith(_DESCRIPTOR, end - after):
                opened.append((end + len(_DESCRIPTOR), end + len(_DESCRIPTOR) + 4))
            if name == _OWN:
                opened += [(data, end), checksum]
            else:
                stated.append(checksum)
        return _Alike(
            _pattern(item.head[:begin], 0, opened, []),
            _pattern(tail, after, opened, stated),
            begin,
            len(tail),
            storage.nbytes,
            found.extent.offset - storage.offset,
            found,
        )

    def locate(self, item: Ends) -> StoredItem | None:
        """The tensor of an item that is alike; None where it is not."""
        if self.head.match(item.head) is None:
            return None
        match = self.tail.fullmatch(item.last(self.tail_nbytes))
        if match is None:
            return None
        crc32 = int.from_bytes(match[1], "little")
        offset = item.offset + self.head_nbytes
        storage = extent = Extent(item.ref, offset, self.storage_nbytes)
        own = self.item
        if self.start or own.extent.nbytes != self.storage_nbytes:
            extent = Extent(item.ref, offset + self.start, own.extent.nbytes)
        record = Record(storage, crc32) if crc32 and self.storage_nbytes else None
        return StoredItem(own.dtype, own.shape, own.strides, extent, record)


def _central(tail: bytes, header: int) -> int | None:
    """Where in the directory the CRC-32 of the entry with this header stands."""
    at = tail.find(_CENTRAL_SIGNATURE)
    while at >= 0:
        if tail[at + _HEADER_AT : at + _HEADER_AT + 4] == header.to_bytes(8, "little")[:4]:
            return at + _CENTRAL_CRC_AT
        at = tail.find(_CENTRAL_SIGNATURE, at + 1)
    return None


def _pattern(
    data: bytes, start: int, opened: list[tuple[int, int]], stated: list[tuple[int, int]]
) -> re.Pattern[bytes]:
    """Matches `data`, which begins at byte `start` of its item, but for what is left open."""
    source = b""
    at = start
    for first, last in sorted([*opened, *stated]):
        if first < at or last > start + len(data):
            continue
        source += re.escape(data[at - start : first - start])
        source += b"(.{4})" if (first, last) in stated else b".{%d}" % (last - first)
        at = last
    return re.compile(source + re.escape(data[at - start :]), re.DOTALL)


def _parse(value: object, archive: Archive, path: str) -> _Parsed:
    if not isinstance(value, torchfile.TensorRef):
        raise FormatError(
            "its item holds no plain tensor.",
            path=path,
            hint="The file is damaged, or was not written by torch.distributed.checkpoint.",
        )
    storage = f"data/{value.storage[0]}"
    start = value.extent.offset - archive.locate(storage).offset
    return _Parsed(
        value.dtype,
        value.shape,
        value.strides,
        start if value.extent.nbytes else 0,
        value.extent.nbytes,
        storage,
        archive.entries[storage].nbytes,
    )


def _fits(parsed: _Parsed, archive: Archive) -> bool:
    """Whether the archive has the storage that the pickle was checked against."""
    entry = archive.entries.get(parsed.storage)
    return entry is not None and entry.nbytes == parsed.storage_nbytes
