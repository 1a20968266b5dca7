"""Reading one torch.save stream: which container it is, its value, where its storages lie."""

from __future__ import annotations

from contextlib import suppress

from msgspec.structs import replace

from reshard.containers.torch import sniff
from reshard.containers.torch.archive import Archive
from reshard.containers.torch.handlers import HANDLERS
from reshard.containers.torch.known import Known
from reshard.containers.torch.legacy import PREFIX, read_legacy
from reshard.containers.torch.limits import MAX_NBYTES
from reshard.containers.torch.machine import BreaksOffError, Machine, PersistentId
from reshard.containers.torch.malformed import Malformed
from reshard.containers.torch.memo import Compactor, Memo, RecalledError
from reshard.containers.torch.nesting import check_depth, check_sharing
from reshard.containers.torch.records import Pickled, Storage, TorchFile
from reshard.containers.torch.storages import parse_storage_id
from reshard.core.tensors import Record
from reshard.errors import FormatError, ReshardError, UnsupportedError
from reshard.storage.source import Source


def read(
    source: Source, *, offset: int = 0, nbytes: int | None = None, known: Known | None = None
) -> TorchFile:
    """The torch.save stream in bytes `[offset, offset + nbytes)` of an opened file.

    `nbytes` None: to the file's end. Reads the pickle, the directory and 30 bytes a storage, and no
    tensor. The pickle's CRC-32 is checked; those of the storages are handed on in `records`. With
    `known`, shared by the reads of files that repeat each other, what was parsed before is not
    parsed again; of files with the same pickle, `value` is then the same object.

    Raises `IncompleteError` (empty, cut off), `FormatError` (damaged), `UnsupportedError` (not a
    torch.save file, or beyond what training files are).
    """
    nbytes = source.size - offset if nbytes is None else nbytes
    head = source.read(offset, min(nbytes, sniff.HEAD_NBYTES))
    if head.startswith(b"PK\3\4"):
        return _read_zip(Archive(source, offset, nbytes, known), source, known)
    if head.startswith(PREFIX):
        return read_legacy(source, offset, nbytes)
    raise sniff.not_wanted(head, nbytes, source.ref.path)


def read_pickle(data: bytes, *, path: str) -> Pickled:
    """A bare pickle, such as the `.metadata` of a DCP checkpoint; `path` is named in errors.

    >>> read_pickle(b"\\x80\\x04cos\\nsystem\\n\\x8c\\x02ls\\x85R.", path=".metadata").value
    <Opaque os.system>

    Raises `FormatError`, `IncompleteError` and `UnsupportedError` as `read` does.
    """
    check_size(len(data), path=path)
    return _parse(data, path, None)


def read_tables(data: bytes, compactor: Compactor, *, path: str) -> Pickled | None:
    """A bare pickle without what `compactor` took of it; None if the pickle needs what was not
    kept, and must be read whole.

    The value holds an `Instance` in place of many an `Opaque`. Raises as `read_pickle` does.
    """
    check_size(len(data), path=path)
    try:
        return _parse(data, path, None, compactor=compactor)
    except RecalledError:
        return None


def check_size(nbytes: int, *, path: str) -> None:
    """Raise `UnsupportedError` where a pickle has more bytes than are read."""
    if nbytes > MAX_NBYTES:
        raise UnsupportedError(
            f"its pickle has {nbytes} bytes; reshard reads at most {MAX_NBYTES}.",
            path=path,
            hint="It is not what its name says.",
        )


def check_start(head: bytes, nbytes: int, *, path: str) -> object:
    """Refuse what is not a pickle by the first of its `nbytes` bytes, before the others are read.

    Returns the value that is being made of these bytes, as far as they go; None if they are all.
    Raises as `read_pickle` does.
    """
    machine = Machine(head, path=path, handlers=HANDLERS, nbytes=nbytes)
    if len(head) < nbytes:
        with suppress(BreaksOffError):
            machine.run()
    return next((stack[0] for stack in (*machine.marks, machine.stack) if stack), None)


def _parse(
    data: bytes,
    path: str,
    persistent: PersistentId | None,
    *,
    compactor: Compactor | None = None,
    devices: dict[int, bytes] | None = None,
) -> Pickled:
    machine = Machine(
        data,
        path=path,
        handlers=HANDLERS,
        persistent=persistent,
        compactor=compactor,
        devices=devices,
    )
    try:
        value, end = machine.run()
    except ReshardError:
        if machine.has_lost_rows():
            raise RecalledError from None
        raise
    if machine.has_lost_rows() or machine.holds_rows():
        raise RecalledError
    machine.memo = Memo()  # what only the memo holds is a third of it
    if end != len(data):
        raise FormatError(f"its pickle ends at byte {end} of {len(data)}.", path=path)
    check_depth(value, path=path)
    check_sharing(value, machine.recalled.values(), len(data), path=path)
    return Pickled(value, tuple(sorted(machine.unknown)))


def _read_zip(archive: Archive, source: Source, known: Known | None) -> TorchFile:
    path = source.ref.path
    _check_byte_order(archive, path)
    stated = None if known is None else archive.entries["data.pkl"].crc32
    if known is not None and stated is not None:
        place = archive.locate("data.pkl")
        same = known.equal(source, place.offset, place.nbytes, stated)
        if same is not None:
            return replace(same, written_as=archive.folder)
    storages = _ZipStorages(archive)
    data = archive.read("data.pkl", MAX_NBYTES)
    if known is not None and stated is not None:
        same = known.alike(data, stated)
        if same is not None:
            return replace(same, written_as=archive.folder)
    devices: dict[int, bytes] | None = None if known is None else {}
    pickled = _parse(data, path, storages.find, devices=devices)
    unchecked = storages.unchecked + (archive.entries["data.pkl"].crc32 is None)
    file = TorchFile(
        pickled.value,
        tuple(storages.records),
        pickled.opaque,
        (f"{unchecked} of its records have no checksum.",) if unchecked else (),
        archive.folder,
    )
    if known is not None and stated is not None and not unchecked and storages.all_empty:
        known.note_pickle(data, stated, file, devices or {})
    return file


def _check_byte_order(archive: Archive, path: str) -> None:
    # Before torch 2.1 there was no such entry, and almost all machines were little-endian.
    if "byteorder" not in archive.entries:
        return
    order = archive.read("byteorder", 16)
    if order != b"little":
        raise UnsupportedError(
            f"it was written on a machine with byte order {order.decode('latin-1')!r}.",
            path=path,
            hint="Load it and save it again with torch on a little-endian machine.",
        )


class _ZipStorages:
    """The storages of an archive, as the pickle comes to name them.

    `records` are the checksums of those named so far, `unchecked` counts those without one.
    """

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._found: dict[str, Storage] = {}
        self.records: list[Record] = []
        self.unchecked = 0

    @property
    def all_empty(self) -> bool:
        """Whether no storage that was named holds a byte."""
        return not any(storage.extent.nbytes for storage in self._found.values())

    def find(self, value: object) -> Storage:
        """The storage that a persistent id names."""
        named = parse_storage_id(value)
        storage = self._found.get(named.key)
        if storage is None:
            extent = self._archive.locate(f"data/{named.key}")
            storage = Storage(named.key, named.dtype, extent, named.reason)
            self._found[named.key] = storage
            self._note_checksum(storage)
        if storage.extent.nbytes != named.nbytes:
            raise Malformed(
                f"storage {named.key!r} has {storage.extent.nbytes} bytes in the archive, and the "
                f"pickle says {named.nbytes}"
            )
        if named.view is not None:
            raise Malformed(f"storage {named.key!r} is a view, which only old containers know")
        if (storage.dtype, storage.reason) != (named.dtype, named.reason):
            raise Malformed(f"storage {named.key!r} is named with two types, which torch refuses")
        return storage

    def _note_checksum(self, storage: Storage) -> None:
        crc32 = self._archive.entries[f"data/{storage.key}"].crc32
        if crc32 is None:
            self.unchecked += 1
        elif storage.extent.nbytes:
            self.records.append(Record(storage.extent, crc32))
