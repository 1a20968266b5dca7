"""The zip container of torch.save (torch 1.6 and later), at any place in a file.

    start ─► local header │ name │ padding │ data     one for each entry, data at a multiple of 64
             …                                        bytes from the start of the archive
             central directory                        the only place where sizes and CRCs stand
             [zip64 end record, its locator]          where a number passes 2^32 or 2^16
      end ─► end record                               22 bytes; torch writes no comment after it

Read from caffe2/serialize/inline_container.cc of torch 2.13 and PKWARE's APPNOTE 6.3.10. Every
entry is stored, none compressed: the bytes of a tensor are bytes of the file. All numbers are
checked before use; entries may neither repeat nor overlap, nor leave the archive.

Reading costs the directory and, for each entry that is asked for, its 30-byte local header,
whose name and padding lengths say where the data begins.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from zlib_ng import zlib_ng

from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.storage import Source
from reshard.tensors import Extent

# Bytes. A directory takes about 70 bytes an entry: room for 900,000 storages.
MAX_DIRECTORY_NBYTES = 64 << 20

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED = 1 | 1 << 6 | 1 << 13


@dataclass(frozen=True, slots=True)
class ArchiveEntry:
    """An entry as the directory states it. `header` counts from the start of the archive.

    `crc32` is None where the writer did not compute it: it then wrote 0, which a non-empty
    entry has by chance once in 4 billion.
    """

    name: str
    header: int
    nbytes: int
    crc32: int | None


class Archive:
    """The archive in bytes `[offset, offset + nbytes)` of `source`.

    `entries` maps names without their common folder (`data.pkl`, `data/0`) to entries.
    Raises `IncompleteError` where the archive is cut off, `FormatError` where it breaks a rule,
    `UnsupportedError` where it is a zip archive of something else.
    """

    def __init__(self, source: Source, offset: int, nbytes: int) -> None:
        self._source = source
        self._offset = offset
        self._nbytes = nbytes
        directory, count = self._find_directory()
        self._directory = directory.offset
        raw = self._read(directory.offset, directory.nbytes)
        entries = self._parse_directory(raw, count)
        self._headers = self._check_places(entries)
        self.folder = self._common_folder(entries)
        self.entries: Mapping[str, ArchiveEntry] = {
            entry.name[len(self.folder) + 1 :]: entry for entry in entries
        }

    def locate(self, name: str) -> Extent:
        """Where the data of an entry lies in the file."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._broken(f"it lacks the entry {name!r}, which its pickle names.")
        raw = self._read(entry.header, _LOCAL.size)
        fields = _LOCAL.unpack(raw)
        signature, flags, method, name_nbytes, extra_nbytes = (
            fields[0], fields[2], fields[3], fields[9], fields[10]
        )  # fmt: skip
        if signature != b"PK\3\4" or method or flags & _ENCRYPTED:
            raise self._broken(f"the header of its entry {entry.name!r} is damaged.")
        start = entry.header + _LOCAL.size + name_nbytes + extra_nbytes
        end = start + entry.nbytes
        following = bisect.bisect_right(self._headers, entry.header)
        limit = self._headers[following]
        if end > limit:
            raise self._broken(
                f"its entry {entry.name!r} takes bytes {start} to {end}, and another begins at "
                f"{limit}."
            )
        return Extent(self._source.ref, self._offset + start, entry.nbytes)

    def read(self, name: str, max_nbytes: int) -> bytes:
        """The data of an entry, its CRC-32 checked."""
        entry = self.entries.get(name)
        if entry is not None and entry.nbytes > max_nbytes:
            raise UnsupportedError(
                f"its entry {name!r} has {entry.nbytes} bytes; at most {max_nbytes} are read.",
                path=self._source.ref.path,
            )
        extent = self.locate(name)
        data = self._source.read(extent.offset, extent.nbytes)
        stated = self.entries[name].crc32
        found = zlib_ng.crc32(data)
        if stated is not None and found != stated:
            raise self._broken(
                f"its entry {name!r} has CRC-32 {found:08x}, and should have {stated:08x}."
            )
        return data

    def _read(self, start: int, nbytes: int) -> bytes:
        if start < 0 or nbytes < 0 or start + nbytes > self._nbytes:
            raise self._broken(
                f"it refers to bytes {start} to {start + nbytes} of an archive of {self._nbytes}."
            )
        return self._source.read(self._offset + start, nbytes)

    def _broken(self, message: str) -> ReshardError:
        return FormatError(
            message,
            path=self._source.ref.path,
            hint="The file is damaged; copy it again or use another checkpoint.",
        )

    def _cut_off(self) -> ReshardError:
        return IncompleteError(
            f"it begins like a torch.save file, and its {self._nbytes} bytes do not end like one.",
            path=self._source.ref.path,
            hint="It was cut off while it was written or copied; copy it again.",
        )

    def _find_directory(self) -> tuple[Extent, int]:
        """Where the central directory lies, from the start of the archive, and its entries."""
        end = self._nbytes - _END.size
        if end < 0:
            raise self._cut_off()
        signature, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(
            self._read(end, _END.size)
        )
        if signature != b"PK\5\6" or comment:
            raise self._cut_off()
        narrow = (disk, first_disk, here, count, nbytes, start)
        wide = self._find_end64(end)
        if wide is not None:
            end, numbers = wide
            limits = (0xFFFF,) * 4 + (0xFFFFFFFF,) * 2
            if any(
                n not in (limit, w) for n, w, limit in zip(narrow, numbers, limits, strict=True)
            ):
                raise self._broken("its two end records disagree on where its directory lies.")
            disk, first_disk, here, count, nbytes, start = numbers
        if disk or first_disk or here != count:
            raise self._broken("it is one part of a zip archive in several files.")
        if start + nbytes > end:
            raise self._broken(
                f"its directory takes bytes {start} to {start + nbytes}, and its end begins at "
                f"{end}."
            )
        if nbytes > MAX_DIRECTORY_NBYTES:
            raise UnsupportedError(
                f"its directory has {nbytes} bytes; at most {MAX_DIRECTORY_NBYTES} are read.",
                path=self._source.ref.path,
            )
        return Extent(self._source.ref, start, nbytes), count

    def _find_end64(self, end: int) -> tuple[int, tuple[int, ...]] | None:
        """Where the zip64 end record begins, and its numbers; None if there is none."""
        if end < _END64_LOCATOR.size:
            return None
        raw = self._read(end - _END64_LOCATOR.size, _END64_LOCATOR.size)
        signature, disk, place, _ = _END64_LOCATOR.unpack(raw)
        if signature != b"PK\6\7":
            return None
        fields = _END64.unpack(self._read(place, _END64.size))
        if disk or fields[0] != b"PK\6\6" or place + _END64.size > end - _END64_LOCATOR.size:
            raise self._broken("its zip64 end record is damaged.")
        return place, fields[4:]

    def _parse_directory(self, raw: bytes, count: int) -> list[ArchiveEntry]:
        entries: list[ArchiveEntry] = []
        position = 0
        while position < len(raw):
            if position + _CENTRAL.size > len(raw):
                raise self._broken("its directory ends within an entry.")
            fields = _CENTRAL.unpack_from(raw, position)
            name_at = position + _CENTRAL.size
            extra_at = name_at + fields[10]
            comment_at = extra_at + fields[11]
            position = comment_at + fields[12]
            if fields[0] != b"PK\1\2" or position > len(raw):
                raise self._broken("an entry of its directory is damaged.")
            entries.append(
                self._parse_entry(fields, raw[name_at:extra_at], raw[extra_at:comment_at])
            )
        if len(entries) != count:
            raise self._broken(f"its directory has {len(entries)} entries and states {count}.")
        if len({entry.name for entry in entries}) != count:
            raise self._broken("its directory names an entry twice.")
        return entries

    def _parse_entry(self, fields: tuple[int, ...], raw: bytes, extra: bytes) -> ArchiveEntry:
        flags, method, crc32, packed, nbytes = fields[3], fields[4], *fields[7:10]
        disk, header = fields[13], fields[16]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._broken(f"the name of an entry, {raw!r:.60}, is not UTF-8.") from None
        if flags & _ENCRYPTED:
            raise self._broken(f"its entry {name!r} is encrypted; torch.save encrypts none.")
        if method:
            raise self._broken(f"its entry {name!r} is compressed; torch.save compresses none.")
        if 0xFFFFFFFF in (packed, nbytes, header):
            nbytes, packed, header = self._parse_zip64(extra, nbytes, packed, header)
        if packed != nbytes or disk:
            raise self._broken(f"its entry {name!r} has {nbytes} bytes, stored in {packed}.")
        return ArchiveEntry(name, header, nbytes, crc32 if crc32 or not nbytes else None)

    def _parse_zip64(self, extra: bytes, *values: int) -> list[int]:
        """Size, stored size and header offset, each from the zip64 field where it is 2^32 - 1."""
        position = 0
        while position + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, position)
            position += 4
            if kind == 1:
                wide = extra[position : position + length]
                numbers = iter(struct.unpack_from(f"<{len(wide) // 8}Q", wide))
                try:
                    return [next(numbers) if v == 0xFFFFFFFF else v for v in values]
                except StopIteration:
                    break
            position += length
        raise self._broken("an entry of its directory lacks its zip64 sizes.")

    def _check_places(self, entries: list[ArchiveEntry]) -> list[int]:
        """The places of all local headers in order, and the directory's after them.

        Entries that overlap are refused here as far as the directory tells, and in `locate`
        exactly.
        """
        ordered = sorted(entries, key=lambda entry: entry.header)
        headers = [entry.header for entry in ordered] + [self._directory]
        for entry, following in zip(ordered, headers[1:], strict=True):
            least = entry.header + _LOCAL.size + len(entry.name.encode()) + entry.nbytes
            if least > following:
                raise self._broken(
                    f"its entry {entry.name!r} needs bytes {entry.header} to {least}, and what "
                    f"follows begins at {following}."
                )
        return headers

    def _common_folder(self, entries: list[ArchiveEntry]) -> str:
        """The folder that all entries lie in (torch names it after the file, or `archive`)."""
        names = [entry.name for entry in entries]
        folder = names[0].partition("/")[0] if names else ""
        inside = all(name.startswith(folder + "/") for name in names)
        if not inside or f"{folder}/data.pkl" not in names:
            shown = ", ".join(sorted(names)[:5])
            raise UnsupportedError(
                f"it is a zip archive, and not one of torch.save: it holds {shown or 'nothing'}.",
                path=self._source.ref.path,
            )
        if f"{folder}/constants.pkl" in names or any(
            name.startswith(f"{folder}/code/") for name in names
        ):
            raise UnsupportedError(
                "it is a TorchScript archive: a compiled model, not a checkpoint.",
                path=self._source.ref.path,
                hint="Save the model's state_dict() with torch.save.",
            )
        return folder
