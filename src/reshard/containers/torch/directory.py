"""The directory of a zip archive: bytes in, entries out. Nothing here reads a file.

PKWARE's APPNOTE 6.3.10, sections 4.3.12 to 4.3.16 and 4.5.3, restricted to what torch.save writes:
every entry stored uncompressed, no comment at the end, the end records back to back.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from operator import attrgetter

from msgspec import Struct

from reshard.containers.torch.malformed import Compressed, Malformed, show

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
# Without the versions, the time and the attributes, which are of no use here.
_CENTRAL = struct.Struct("<4s4x2H4x3L4H6xL")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF

# Bytes at the end of an archive that `parse_end` looks at.
TAIL_NBYTES = _END64.size + _END64_LOCATOR.size + _END.size
# Bytes of a local header before the entry's name.
LOCAL_NBYTES = 30
# General purpose flags of an entry: encrypted, strongly encrypted, header masked.
ENCRYPTED = 1 | 1 << 6 | 1 << 13


class Directory(Struct, frozen=True):
    """Where the central directory lies, from the start of the archive, and its entries."""

    start: int
    nbytes: int
    count: int


class ArchiveEntry(Struct, frozen=True, gc=False):
    """An entry as the directory states it. `header` counts from the start of the archive.

    `crc32` is None where the writer did not compute it: it then wrote 0, which the data of a
    non-empty entry gives by chance once in 4 billion.
    """

    name: str
    header: int
    nbytes: int
    crc32: int | None

    @property
    def least_end(self) -> int:
        """The byte before which the data cannot end; padding after the name comes on top."""
        return self.header + LOCAL_NBYTES + len(self.name.encode()) + self.nbytes


def parse_end(tail: bytes, nbytes: int) -> Directory | None:
    """Where the directory of an archive of `nbytes` lies; None if it does not end like one.

    `tail` is its last bytes, `TAIL_NBYTES` of them or all. Raises `Malformed`.
    """
    if len(tail) < _END.size or not tail.endswith(b"\0\0"):
        return None
    signature, *narrow, _ = _END.unpack(tail[-_END.size :])
    if signature != b"PK\5\6":
        return None
    end = nbytes - _END.size
    numbers = _parse_end64(tail, end)
    if numbers is None:
        numbers = narrow
    else:
        end -= _END64_LOCATOR.size + _END64.size
        limits = (_U16, _U16, _U16, _U16, _U32, _U32)
        if any(n not in (limit, w) for n, w, limit in zip(narrow, numbers, limits, strict=True)):
            raise Malformed("its two end records disagree on where its directory lies")
    disk, first_disk, here, count, size, start = numbers
    if disk or first_disk or here != count:
        raise Malformed("it is one part of a zip archive in several files")
    if start + size > end:
        raise Malformed(
            f"its directory takes bytes {start} to {start + size}, and its end begins at {end}"
        )
    return Directory(start, size, count)


def _parse_end64(tail: bytes, end: int) -> Sequence[int] | None:
    """The numbers of the zip64 end record before the end record; None if there is none."""
    if len(tail) < TAIL_NBYTES:
        return None
    signature, disk, place, _ = _END64_LOCATOR.unpack_from(tail, _END64.size)
    if signature != b"PK\6\7":
        return None
    fields: list[int]
    record, _, _, _, *fields = _END64.unpack_from(tail)
    if disk or record != b"PK\6\6" or place != end - _END64_LOCATOR.size - _END64.size:
        raise Malformed("its zip64 end record is damaged")
    return fields


def parse_entries(raw: bytes, count: int) -> list[ArchiveEntry]:
    """The entries of a directory, in its order, of different names. Raises `Malformed`."""
    entries: list[ArchiveEntry] = []
    position, unpack = 0, _CENTRAL.unpack_from
    while position < len(raw):
        if position + _CENTRAL.size > len(raw):
            raise Malformed("its directory ends within an entry")
        fields = unpack(raw, position)
        signature, *_, name_nbytes, extra_nbytes, comment_nbytes, _, _ = fields
        name_at = position + _CENTRAL.size
        extra_at = name_at + name_nbytes
        comment_at = extra_at + extra_nbytes
        position = comment_at + comment_nbytes
        if signature != b"PK\1\2" or position > len(raw):
            raise Malformed("an entry of its directory is damaged")
        entries.append(_parse_entry(fields, raw[name_at:extra_at], raw[extra_at:comment_at]))
    if len(entries) != count:
        raise Malformed(f"its directory has {len(entries)} entries and states {count}")
    if len({entry.name for entry in entries}) != count:
        raise Malformed("its directory names an entry twice")
    return entries


def _parse_entry(fields: Sequence[int], raw_name: bytes, extra: bytes) -> ArchiveEntry:
    _, flags, method, crc32, packed, nbytes, _, _, _, disk, header = fields
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        raise Malformed(f"the name of an entry, {raw_name[:40]!r}, is not UTF-8") from None
    if flags & ENCRYPTED:
        raise Malformed(f"its entry {show(name)} is encrypted; torch.save encrypts none")
    if method:
        raise Compressed(name, show(name))
    if packed == _U32 or nbytes == _U32 or header == _U32:
        nbytes, packed, header = _widen(extra, (nbytes, packed, header))
    if packed != nbytes or disk:
        raise Malformed(f"its entry {show(name)} has {nbytes} bytes, stored in {packed}")
    return ArchiveEntry(name, header, nbytes, crc32 if crc32 or not nbytes else None)


def _widen(extra: bytes, values: Sequence[int]) -> list[int]:
    """`values` with those that are 2^32 - 1 taken from the zip64 field, which holds just them."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        field = extra[position + 4 : position + 4 + length]
        position += 4 + length
        if kind == 1:
            wide = [number for (number,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            if len(wide) >= values.count(_U32):
                numbers = iter(wide)
                return [next(numbers) if value == _U32 else value for value in values]
    raise Malformed("an entry of its directory lacks its zip64 sizes")


def check_places(entries: Sequence[ArchiveEntry], directory: Directory) -> list[int]:
    """Where the entries begin, in order, and the directory after them.

    Raises `Malformed` where two overlap, as far as a directory tells: it does not state the
    padding of local headers.
    """
    ordered = sorted(entries, key=attrgetter("header"))
    starts = [entry.header for entry in ordered] + [directory.start]
    for entry, following in zip(ordered, starts[1:], strict=True):
        if entry.least_end > following:
            raise Malformed(
                f"its entry {show(entry.name)} needs bytes {entry.header} to {entry.least_end}, "
                f"and what follows begins at {following}"
            )
    return starts
