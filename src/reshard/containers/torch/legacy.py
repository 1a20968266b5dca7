"""The container of torch.save before torch 1.6, and of `_use_new_zipfile_serialization=False`.

    pickle  0x1950a86a20f9469cfc6c          the magic number
    pickle  1001                            the container's version
    pickle  {little_endian, type_sizes, …}
    pickle  the object                      its persistent ids name storages by key
    pickle  [key, …]                        the order of the storages
    for each key: int64 count, elements     no checksums anywhere

Read from torch/serialization.py of torch 2.13 (`_legacy_load`). The count is of elements, for an
untyped storage of bytes. What an element takes is known only from the object's persistent ids, so
the object is parsed twice: once to learn the storages, once with their places known.
"""

from __future__ import annotations

import struct

from reshard.containers.torch.handlers import HANDLERS
from reshard.containers.torch.limits import MAX_NBYTES
from reshard.containers.torch.machine import BreaksOffError, Machine, PersistentId
from reshard.containers.torch.malformed import Malformed
from reshard.containers.torch.nesting import check_depth, check_sharing
from reshard.containers.torch.records import Storage, TorchFile
from reshard.containers.torch.storages import StorageId, parse_storage_id
from reshard.core.tensors import Extent
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.storage.source import Source

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
# How such a file begins: PROTO 2, LONG1 of 10 bytes, the magic number.
PREFIX = b"\x80\x02\x8a\x0a" + MAGIC.to_bytes(10, "little")
# Bytes read at first; the pickles of most files fit.
_FIRST_WINDOW = 1 << 20


def read_legacy(source: Source, offset: int, nbytes: int) -> TorchFile:
    """The stream in bytes `[offset, offset + nbytes)` of `source`.

    Reads the pickles and the 8 bytes in front of each storage. Raises as `torchfile.read` does.
    """
    path = source.ref.path
    window = min(nbytes, _FIRST_WINDOW)
    while True:
        try:
            return _Stream(source, offset, nbytes, source.read(offset, window)).parse()
        except BreaksOffError:
            if window == nbytes:
                raise
            if window >= MAX_NBYTES:
                raise UnsupportedError(
                    f"its pickles have more than {MAX_NBYTES} bytes.", path=path
                ) from None
        window = min(nbytes, window * 8, MAX_NBYTES)


class _Stream:
    """One parse, with the first bytes of the stream in `head`."""

    def __init__(self, source: Source, offset: int, nbytes: int, head: bytes) -> None:
        self._source = source
        self._offset = offset
        self._nbytes = nbytes
        self._head = head
        self._ids: dict[str, StorageId] = {}
        self._places: dict[str, Extent] = {}

    def parse(self) -> TorchFile:
        start = self._check_header()
        _, end, _ = self._unpickle(start, self._learn)
        keys, data_start, _ = self._unpickle(end, None)
        self._find_storages(keys, data_start)
        value, _, machine = self._unpickle(start, self._storage)
        path = self._source.ref.path
        check_depth(value, path=path)
        check_sharing(value, machine.recalled.values(), end - start, path=path)
        return TorchFile(
            value,
            (),
            tuple(sorted(machine.unknown)),
            ("it is in torch.save's old container, which has no checksums.",),
        )

    def _unpickle(self, start: int, persistent: PersistentId | None) -> tuple[object, int, Machine]:
        machine = Machine(
            self._head, path=self._source.ref.path, handlers=HANDLERS, persistent=persistent
        )
        value, end = machine.run(start)
        return value, end, machine

    def _check_header(self) -> int:
        """Check the first three pickles; where the fourth begins."""
        magic, position, _ = self._unpickle(0, None)
        version, position, _ = self._unpickle(position, None)
        system, position, _ = self._unpickle(position, None)
        if magic != MAGIC or version != VERSION or not isinstance(system, dict):
            raise self._broken("the header of its old torch.save container is damaged.")
        if system.get("little_endian") is not True:
            raise UnsupportedError(
                "it was written on a big-endian machine.", path=self._source.ref.path
            )
        return position

    def _learn(self, value: object) -> Storage:
        """A stand-in for a storage whose place is not known yet."""
        named = parse_storage_id(value)
        known = self._ids.setdefault(named.key, named)
        if (known.itemsize, known.nbytes) != (named.itemsize, named.nbytes):
            raise Malformed(f"storage {named.key!r} is named with two sizes")
        if (known.dtype, known.reason) != (named.dtype, named.reason):
            raise Malformed(f"storage {named.key!r} is named with two types, which torch refuses")
        _, nbytes = named.view or (0, named.nbytes)
        return Storage(named.key, named.dtype, Extent(self._source.ref, 0, nbytes), named.reason)

    def _storage(self, value: object) -> Storage:
        named = parse_storage_id(value)
        place = self._places[named.key]
        start, nbytes = named.view or (0, named.nbytes)
        if start + nbytes > place.nbytes:
            raise Malformed(
                f"a view takes bytes {start} to {start + nbytes} of storage {named.key!r}, which "
                f"has {place.nbytes}"
            )
        extent = Extent(place.file, place.offset + start, nbytes)
        return Storage(named.key, named.dtype, extent, named.reason)

    def _find_storages(self, keys: object, position: int) -> None:
        if not isinstance(keys, list) or set(map(type, keys)) - {str}:
            raise self._broken("the list of its storages is damaged.")
        if len(set(keys)) != len(keys) or set(keys) != set(self._ids):
            raise self._broken(
                f"it lists {len(keys)} storages, and its pickle names {len(self._ids)}, which are "
                "not the same."
            )
        for key in keys:
            named = self._ids[key]
            self._need(key, position, 8)
            raw = self._source.read(self._offset + position, 8)
            (count,) = struct.unpack("<q", raw)
            if count * named.itemsize != named.nbytes:
                raise self._broken(
                    f"its storage {key!r} has {count} elements, and its pickle says "
                    f"{named.nbytes // named.itemsize}."
                )
            position += 8
            self._need(key, position, named.nbytes)
            self._places[key] = Extent(self._source.ref, self._offset + position, named.nbytes)
            position += named.nbytes

    def _need(self, key: str, position: int, nbytes: int) -> None:
        if position + nbytes > self._nbytes:
            raise IncompleteError(
                f"its storage {key!r} needs bytes {position} to {position + nbytes}, but the file "
                f"has {self._nbytes}.",
                path=self._source.ref.path,
                hint="The file was truncated; copy it again or use another checkpoint.",
            )

    def _broken(self, message: str) -> ReshardError:
        return FormatError(
            message,
            path=self._source.ref.path,
            hint="The file is damaged; copy it again or use another checkpoint.",
        )
