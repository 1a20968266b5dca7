"""Stretches of files whose checksums the files state, as columns of numbers.

A checkpoint of 200,000 tensors has as many; as objects they take 190 bytes each, here 24.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from reshard.core.tensors import Extent, FileRef, Record


class Records(Sequence[Record]):
    """Records in the order in which they are added, made as they are asked for."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._files: dict[FileRef, int] = {}
        self._refs: list[FileRef] = []
        self._file = array("I")
        self._offset = array("Q")
        self._nbytes = array("Q")
        self._crc32 = array("I")
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Append a record."""
        extent = record.extent
        number = self._files.setdefault(extent.file, len(self._refs))
        if number == len(self._refs):
            self._refs.append(extent.file)
        self._file.append(number)
        self._offset.append(extent.offset)
        self._nbytes.append(extent.nbytes)
        self._crc32.append(record.crc32)

    def numbers(self) -> bytes:
        """All offsets, sizes and checksums, without the files."""
        return b"".join(map(bytes, (self._offset, self._nbytes, self._crc32)))

    def __len__(self) -> int:
        return len(self._file)

    def __iter__(self) -> Iterator[Record]:
        rows = zip(self._file, self._offset, self._nbytes, self._crc32, strict=True)
        for file, offset, nbytes, crc32 in rows:
            yield Record(Extent(self._refs[file], offset, nbytes), crc32)

    @overload
    def __getitem__(self, index: int) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [*self][index]
        extent = Extent(self._refs[self._file[index]], self._offset[index], self._nbytes[index])
        return Record(extent, self._crc32[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]
