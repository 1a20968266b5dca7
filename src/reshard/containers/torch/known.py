"""Files that repeat each other, such as the model files of a save's ranks: read, but parsed once.

Every byte of a file's directory and pickle is read and compared with those of files before; what is
alike has been parsed and checked already. Two files are alike in spite of

    the folder of the archive         a file's own name, which stands in all names of its directory
    the device of the storages        "cuda:3", which stands in the pickle once for each tensor
    the checksum of such a pickle     which stands in the directory

A pickle is known only if its tensors are empty: then it does not matter where they lie. With model
files of 1,024 ranks that state 70,000 parameters each, all of a ZeRO-3 checkpoint is read in 8 s
of CPU; to parse them all would take about an hour.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers.torch.directory import ArchiveEntry, Directory
from reshard.containers.torch.records import Global, Instance, Opaque, Storage, TensorRef, TorchFile
from reshard.core.regex import regex
from reshard.storage.source import Source

# Directories that differ by more than a folder of as many letters; pickles, by more than a device.
_MAX_DIRECTORIES, _MAX_PICKLES = 16, 16
# Bytes by which directories of files are told apart, as a rule: the first states the checksum of a
# pickle.
_START_NBYTES = 1 << 12
# Of an entry, where its CRC-32 stands, the lengths of its name and of what follows it, and its name
# (APPNOTE 4.3.12).
_CRC_AT, _LENGTHS_AT, _NAME_AT = 16, 28, 46
_LENGTHS = struct.Struct("<3H")
# Its first byte is in no text.
_MARK = b"\xff\xfemark"
#: What torch calls a device, as the text of a BINUNICODE opcode.
DEVICE = regex(rb"[a-z]{2,12}:\d{1,3}")
#: Bytes of a text that may be a device's name, at most.
MAX_DEVICE = 16


class Listing(Struct, frozen=True):
    """A directory that was parsed. `folder` ends with `/`; `entries` are by their names inside it;
    `starts` is where each begins, in order, and the end of the last."""

    folder: str
    entries: Mapping[str, ArchiveEntry]
    starts: Sequence[int]


class _KnownDirectory(Struct, frozen=True):
    directory: Directory
    raw: bytes
    listing: Listing
    #: `raw` with `_MARK` for each folder, where the folder stands in the entries' names alone.
    marked: bytes | None
    #: Where the checksums of single entries stand, by their names.
    checksums: Mapping[str, int]


class _KnownPickle(Struct):
    data: bytes
    crc32: int
    file: TorchFile
    #: Where the text of the storages' device stands, and that text; empty where it is not known.
    places: Sequence[int]
    device: bytes


class Known:
    """The directories and pickles of the files that were read with it."""

    def __init__(self) -> None:
        self._directories: list[_KnownDirectory] = []
        self._pickles: list[_KnownPickle] = []

    def listing(self, directory: Directory, source: Source, offset: int) -> Listing | None:
        """What the directory at byte `offset` of a file lists, if it is known."""
        alike = [known for known in self._directories if known.directory == directory]
        if not alike:
            return None
        start = source.read(offset, min(directory.nbytes, _START_NBYTES))
        for known in alike:
            if known.raw.startswith(start) and source.equals(offset, known.raw):
                return known.listing
        raw = source.read(offset, directory.nbytes)
        for known in alike:
            listing = _with_other_checksums(raw, known)
            if listing is not None:
                self.note_listing(directory, raw, listing)
                return listing
        return _in_another_folder(raw, alike)

    def note_listing(self, directory: Directory, raw: bytes, listing: Listing) -> None:
        """Remember a directory that was parsed and found sound."""
        if len(self._directories) < _MAX_DIRECTORIES:
            folder, count = listing.folder.encode(), len(listing.entries)
            marked = _marked(raw, folder)
            in_names = raw.count(folder) == count == marked.count(_MARK)
            checksums = _checksums(raw, listing)
            self._directories.append(
                _KnownDirectory(directory, raw, listing, marked if in_names else None, checksums)
            )

    def keeps(self, value: object) -> bool:
        """Whether the value of a file is that of one of the pickles that it remembers."""
        return any(known.file.value is value for known in self._pickles)

    def equal(
        self, source: Source, offset: int, nbytes: int, crc32: int | None
    ) -> TorchFile | None:
        """What the pickle at byte `offset` of a file holds, if its every byte is known.

        `crc32` is the checksum that the file states of it.
        """
        for known in self._pickles:
            # One that was parsed had the checksum that its file stated.
            stated = (len(known.data), known.crc32) == (nbytes, crc32)
            if stated and source.equals(offset, known.data):
                return known.file
        return None

    def alike(self, data: bytes, crc32: int) -> TorchFile | None:
        """What a pickle holds, if it is known but for the device."""
        for known in self._pickles:
            if not known.places or len(data) != len(known.data):
                continue
            first, length = known.places[0], len(known.device)
            device = data[first : first + length]
            if DEVICE.fullmatch(device) is None:
                continue
            patched = bytearray(data)
            for at in known.places:
                if data[at : at + length] != device:
                    break
                patched[at : at + length] = known.device
            else:
                if patched == known.data:
                    self._note(_KnownPickle(data, crc32, known.file, (), b""))
                    return known.file
        return None

    def note_pickle(
        self, data: bytes, crc32: int, file: TorchFile, devices: Mapping[int, bytes]
    ) -> None:
        """Remember a pickle that was parsed, whose tensors are empty and whose checksum is right.

        `devices` are the texts that may be a device's name, by the places where they stand.
        """
        texts = {*devices.values()}
        device = texts.pop() if len(texts) == 1 else b""
        # As a location it is dropped. Where the value shows it, another device is another value.
        if not device or _shows(file, device.decode()):
            device = b""
        places = tuple(devices) if device else ()
        self._note(_KnownPickle(data, crc32, file, places, device))

    def _note(self, known: _KnownPickle) -> None:
        if len(self._pickles) < _MAX_PICKLES:
            self._pickles.append(known)


def _checksums(raw: bytes, listing: Listing) -> Mapping[str, int]:
    """Where a directory states the checksums that differ where nothing else does: of the pickle,
    which torch writes first, and of the digest of all others, which it writes last."""
    names = [*listing.entries]
    found = {names[0]: _CRC_AT} if names[0] == "data.pkl" else {}
    at = raw.rfind(f"{listing.folder}{names[-1]}".encode()) - _NAME_AT
    if names[-1] != ".data/serialization_id" or not raw.startswith(b"PK\1\2", at):
        return found
    if at + _NAME_AT + sum(_LENGTHS.unpack_from(raw, at + _LENGTHS_AT)) == len(raw):
        found[names[-1]] = at + _CRC_AT
    return found


def _with_other_checksums(raw: bytes, known: _KnownDirectory) -> Listing | None:
    """What a directory lists that differs from a known one by the checksums of these entries."""
    patched = bytearray(raw)
    changed: dict[str, ArchiveEntry] = {}
    for name, at in known.checksums.items():
        patched[at : at + 4] = known.raw[at : at + 4]
        crc32 = int.from_bytes(raw[at : at + 4], "little")
        changed[name] = replace(known.listing.entries[name], crc32=crc32)
        if not crc32:
            return None
    if not changed or patched != known.raw:
        return None
    return replace(known.listing, entries={**known.listing.entries, **changed})


def _in_another_folder(raw: bytes, alike: Sequence[_KnownDirectory]) -> Listing | None:
    """What a directory lists that differs from a known one by a folder of as many letters.

    A folder ends with its only `/`, so two places where it stands cannot overlap, and those of a
    mark cannot. A known directory has marks at its entries' names and nowhere else. If this one
    with marks is the same, and became shorter by as many, they stand for its folder at these names.
    """
    own = raw[_NAME_AT : raw.find(b"/", _NAME_AT) + 1]
    if not own or not own.isascii():
        return None
    marked = _marked(raw, own)
    for known in alike:
        if known.marked == marked and len(known.listing.folder) == len(own):
            return replace(known.listing, folder=own.decode())
    return None


def _marked(raw: bytes, folder: bytes) -> bytes:
    # Of another length, so that the length says how often the folder stood there.
    mark = _MARK if len(folder) != len(_MARK) else _MARK + b"-"
    return raw.replace(folder, mark) if folder else b""


def _shows(file: TorchFile, text: str) -> bool:
    """Whether a file's value holds a text anywhere, as a part of another, too."""
    if any(text in name for name in file.opaque):
        return True
    raw = text.encode()
    seen: set[int] = set()
    todo: list[object] = [file.value]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind is str:
            if text in value:  # type: ignore[operator]
                return True
        elif kind is bytes:
            if raw in value:  # type: ignore[operator]
                return True
        elif isinstance(value, Global):
            todo.append(value.name)
        elif isinstance(value, TensorRef):
            todo.append(value.storage[0])
        elif isinstance(value, Storage):
            todo.append(value.key)
        elif isinstance(value, dict | list | tuple | Opaque | Instance) and id(value) not in seen:
            seen.add(id(value))
            todo.extend(_held(value))
    return False


def _held(
    value: dict[object, object] | list[object] | tuple[object, ...] | Opaque | Instance,
) -> Sequence[object]:
    if isinstance(value, dict):
        return (*value.keys(), *value.values())
    if isinstance(value, Opaque):
        return (value.name, value.args, value.state, value.items, value.reason)
    if isinstance(value, Instance):
        return (value.name, value.keys, value.values)
    return value
