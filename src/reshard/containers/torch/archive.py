"""The zip container of torch.save (torch 1.6 and later), at any place in a file.

    start ─► local header │ name │ padding │ data     for each entry; data at a multiple of 64
             …                                        bytes from the start of the archive
             central directory                        the only place of sizes and checksums
             zip64 end record, its locator
      end ─► end record

    data.pkl        the pickle                        all in one folder, named after the file,
    data/<key>      one storage each                  or `archive`
    byteorder       "little" (torch 2.1 and later)
    version, …      of no use here

Read from caffe2/serialize/inline_container.cc of torch 2.13. Nothing is compressed: the bytes of
a tensor are bytes of the file. Reading costs the directory and, for each entry that is asked for,
its local header: its padding, and so where the data begins, stands there alone.
"""

from __future__ import annotations

import bisect
import struct
from collections.abc import Mapping

from zlib_ng import zlib_ng

from reshard.containers.torch.directory import (
    ENCRYPTED,
    LOCAL_NBYTES,
    TAIL_NBYTES,
    ArchiveEntry,
    Directory,
    check_places,
    parse_end,
    parse_entries,
)
from reshard.containers.torch.known import Known, Listing
from reshard.containers.torch.malformed import Compressed, Malformed, show
from reshard.core.tensors import Extent
from reshard.errors import FormatError, IncompleteError, UnsupportedError, listed
from reshard.storage.source import Source

# Bytes. A directory takes about 70 bytes an entry: room for 900,000 storages.
MAX_DIRECTORY_NBYTES = 64 << 20
# Where TorchScript has its source.
_CODE = "code/"
# Bytes read at once for local headers: small entries lie close together.
_WINDOW_NBYTES = 4096

_LOCAL = struct.Struct("<4s5H3L2H")


class Archive:
    """The archive in bytes `[offset, offset + nbytes)` of `source`.

    With `known`, a directory that was parsed before is compared with it and not parsed again.
    `folder` is the common folder's name, `entries` maps names inside it (`data.pkl`, `data/0`) to
    entries.
    Raises `IncompleteError` where the archive is cut off, `FormatError` where it breaks a rule,
    `UnsupportedError` where it is a zip archive of something else.
    """

    def __init__(
        self, source: Source, offset: int, nbytes: int, known: Known | None = None
    ) -> None:
        self._source = source
        self._offset = offset
        self._nbytes = nbytes
        self._window, self._window_start = b"", 0
        directory = self._find_directory()
        listing = None
        if known is not None:
            listing = known.listing(directory, source, offset + directory.start)
        if listing is None:
            raw = self._read(directory.start, directory.nbytes)
            listing = self._parsed(raw, directory)
            if known is not None:
                known.note_listing(directory, raw, listing)
        self._folder, self._starts = listing.folder, listing.starts
        self.folder: str = listing.folder.removesuffix("/")
        self.entries: Mapping[str, ArchiveEntry] = listing.entries

    def locate(self, name: str) -> Extent:
        """Where the data of an entry lies in the file."""
        entry = self.entries.get(name)
        if entry is None:
            raise self._broken(f"it lacks the entry {show(name)}.")
        full = f"{self._folder}{name}".encode()
        raw = self._read_header(entry.header, LOCAL_NBYTES + len(full))
        signature, _, flags, method, *_, name_nbytes, extra_nbytes = _LOCAL.unpack_from(raw)
        if signature != b"PK\3\4" or method or flags & ENCRYPTED or raw[LOCAL_NBYTES:] != full:
            raise self._broken(f"the header of its entry {show(full.decode())} is damaged.")
        start = entry.header + LOCAL_NBYTES + name_nbytes + extra_nbytes
        end = start + entry.nbytes
        limit = self._starts[bisect.bisect_right(self._starts, entry.header)]
        if end > limit:
            raise self._broken(
                f"its entry {show(full.decode())} takes bytes {start} to {end}, and what follows "
                f"begins at {limit}."
            )
        return Extent(self._source.ref, self._offset + start, entry.nbytes)

    def read(self, name: str, max_nbytes: int) -> bytes:
        """The data of an entry, its CRC-32 checked where the directory states one."""
        extent = self.locate(name)
        if extent.nbytes > max_nbytes:
            raise UnsupportedError(
                f"its entry {show(name)} has {extent.nbytes} bytes; reshard reads at most "
                f"{max_nbytes}.",
                path=self._source.ref.path,
            )
        data = self._source.read(extent.offset, extent.nbytes)
        stated = self.entries[name].crc32
        found = zlib_ng.crc32(data)
        if stated is not None and found != stated:
            raise self._broken(
                f"its entry {show(name)} has CRC-32 {found:08x}, and should have {stated:08x}."
            )
        return data

    def _parsed(self, raw: bytes, directory: Directory) -> Listing:
        try:
            entries = parse_entries(raw, directory.count)
            starts = check_places(entries, directory)
        except Malformed as problem:
            if isinstance(problem, Compressed) and problem.name.partition("/")[2].startswith(_CODE):
                raise _torchscript(self._source.ref.path) from None
            raise self._broken(f"{problem}.") from None
        folder = _common_folder([entry.name for entry in entries], self._source.ref.path)
        return Listing(
            folder, {entry.name.removeprefix(folder): entry for entry in entries}, starts
        )

    def _find_directory(self) -> Directory:
        tail_nbytes = min(TAIL_NBYTES, self._nbytes)
        tail = self._read(self._nbytes - tail_nbytes, tail_nbytes)
        try:
            directory = parse_end(tail, self._nbytes)
        except Malformed as problem:
            raise self._broken(f"{problem}.") from None
        if directory is None:
            raise IncompleteError(
                f"it begins like a torch.save file, but its {self._nbytes} bytes do not end like "
                "one.",
                path=self._source.ref.path,
                hint="It was truncated while it was written or copied; copy it again.",
            )
        if directory.nbytes > MAX_DIRECTORY_NBYTES:
            raise UnsupportedError(
                f"its directory has {directory.nbytes} bytes; reshard reads at most "
                f"{MAX_DIRECTORY_NBYTES}.",
                path=self._source.ref.path,
            )
        return directory

    def _read_header(self, start: int, nbytes: int) -> bytes:
        skip = start - self._window_start
        if skip < 0 or skip + nbytes > len(self._window):
            length = max(nbytes, min(_WINDOW_NBYTES, self._nbytes - start))
            self._window, self._window_start, skip = self._read(start, length), start, 0
        return self._window[skip : skip + nbytes]

    def _read(self, start: int, nbytes: int) -> bytes:
        if start + nbytes > self._nbytes:
            raise self._broken(
                f"it refers to bytes {start} to {start + nbytes} of an archive of {self._nbytes}."
            )
        return self._source.read(self._offset + start, nbytes)

    def _broken(self, message: str) -> FormatError:
        return FormatError(
            message,
            path=self._source.ref.path,
            hint="The file is damaged; copy it again or use another checkpoint.",
        )


def _common_folder(names: list[str], path: str) -> str:
    """The folder that all entries lie in, with its `/`."""
    folder, slash, _ = names[0].partition("/") if names else ("", "", "")
    folder += slash
    if f"{folder}data.pkl" not in names or not all(name.startswith(folder) for name in names):
        held = listed(sorted(names), 5) or "nothing"
        raise UnsupportedError(
            f"it is a zip archive, but torch.save did not write it: it holds {held}.",
            path=path,
        )
    if f"{folder}constants.pkl" in names or any(n.startswith(f"{folder}{_CODE}") for n in names):
        raise _torchscript(path)
    return folder


def _torchscript(path: str) -> UnsupportedError:
    return UnsupportedError(
        "it is a TorchScript archive: a compiled model, not a checkpoint.",
        path=path,
        hint="Save the model's state_dict() with torch.save.",
    )
