"""Reading one torch.save stream: which container, its storages, its value."""

from __future__ import annotations

from reshard.errors import UnsupportedError
from reshard.storage import Source
from reshard.tensors import Record
from reshard.torchfile import sniff
from reshard.torchfile.archive import Archive
from reshard.torchfile.handlers import HANDLERS
from reshard.torchfile.legacy import PREFIX, read_legacy
from reshard.torchfile.records import Malformed, Pickled, Storage, TorchFile
from reshard.torchfile.storages import parse_storage_id
from reshard.torchfile.unpickler import MAX_NBYTES, Machine, check_depth


def read(source: Source, *, offset: int = 0, nbytes: int | None = None) -> TorchFile:
    """The torch.save stream in bytes `[offset, offset + nbytes)` of an opened file.

    Reads its pickle, its directory and 30 bytes a storage, and no tensor. The pickle's CRC-32 is
    checked; those of the storages are handed on in `records`.

    Raises `IncompleteError` (empty, cut off), `FormatError` (damaged), `UnsupportedError` (not a
    torch.save file, or larger and stranger than training files are).
    """
    path = source.ref.path
    nbytes = source.size - offset if nbytes is None else nbytes
    head = source.read(offset, min(nbytes, sniff.HEAD_NBYTES))
    if head.startswith(b"PK\3\4"):
        return _read_zip(Archive(source, offset, nbytes), path)
    if head.startswith(PREFIX):
        return read_legacy(source, offset, nbytes)
    raise sniff.not_torch(head, nbytes, path)


def read_pickle(data: bytes, *, path: str) -> Pickled:
    """A bare pickle, such as the `.metadata` of a DCP checkpoint; `path` is named in errors.

    >>> read_pickle(b"\\x80\\x04cos\\nsystem\\n\\x8c\\x02ls\\x85R.", path="x").value
    <Opaque os.system>

    Raises `FormatError`, `IncompleteError` and `UnsupportedError` as `read` does.
    """
    _check_size(len(data), path)
    machine = Machine(data, path=path, handlers=HANDLERS)
    value, end = machine.run()
    if end != len(data):
        raise machine.broken(f"its pickle ends at byte {end} of {len(data)}.")
    check_depth(value, path=path)
    return Pickled(value, tuple(sorted(machine.unknown)))


def _check_size(nbytes: int, path: str) -> None:
    if nbytes > MAX_NBYTES:
        raise UnsupportedError(
            f"its pickle has {nbytes} bytes; at most {MAX_NBYTES} are read.", path=path
        )


def _read_zip(archive: Archive, path: str) -> TorchFile:
    if "byteorder" in archive.entries:
        order = archive.read("byteorder", 16)
        if order != b"little":
            raise UnsupportedError(
                f"it was written on a machine of byte order {order.decode('latin-1')!r}.",
                path=path,
                hint="Load it and save it again with torch on a little-endian machine.",
            )
    storages: dict[str, Storage] = {}

    def persistent(value: object) -> Storage:
        named = parse_storage_id(value)
        known = storages.get(named.key)
        if known is None:
            known = Storage(
                named.key, named.dtype, archive.locate(f"data/{named.key}"), named.reason
            )
            storages[named.key] = known
        if known.extent.nbytes != named.nbytes:
            raise Malformed(
                f"storage {named.key!r} has {known.extent.nbytes} bytes in the archive, and the "
                f"pickle says {named.nbytes}"
            )
        if named.view is not None:
            raise Malformed("a zip archive's storage is a view")
        if known.dtype != named.dtype:
            # The same bytes, viewed as another type.
            return Storage(named.key, named.dtype, known.extent, named.reason)
        return known

    data = archive.read("data.pkl", MAX_NBYTES)
    machine = Machine(data, path=path, handlers=HANDLERS, persistent=persistent)
    value, end = machine.run()
    if end != len(data):
        raise machine.broken(f"its pickle ends at byte {end} of {len(data)}.")
    check_depth(value, path=path)
    crcs = {key: archive.entries[f"data/{key}"].crc32 for key in storages}
    missing = sum(1 for key, crc in crcs.items() if crc is None and storages[key].extent.nbytes)
    if archive.entries["data.pkl"].crc32 is None:
        missing += 1
    return TorchFile(
        value,
        tuple(
            Record(storages[key].extent, crc)
            for key, crc in crcs.items()
            if crc is not None and storages[key].extent.nbytes
        ),
        tuple(sorted(machine.unknown)),
        (f"{missing} of its records have no checksum.",) if missing else (),
    )
