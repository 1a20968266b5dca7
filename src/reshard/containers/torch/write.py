"""Laying out torch.save archives of contiguous tensors. Pure: no torch, no file.

    before ─► data.pkl, .format_version, .storage_alignment, byteorder, header of data/0
    data      the tensor's bytes, row-major, little-endian; at a multiple of 64 from the start
    after  ─► data descriptor, version, central directory, end records

The same entries in the same order as torch 2.13 writes them to a stream
(torch/serialization.py, caffe2/serialize/inline_container.cc), less `.data/serialization_id`,
which torch does not need to read a file. The checksum of the data stands only behind it, so the
archive can be written front to back: `before`, the data, `after(crc32)`. A dict of tensors has
`data/0`, `data/1`, ... one after another. Small tensors whose bytes are known are literals.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

from msgspec import Struct
from zlib_ng import zlib_ng

from reshard.containers.torch.pickler import Call, Name, Persistent, Pickler
from reshard.core.dtypes import DType
from reshard.core.plan import OutputFile, Slot
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Entry, Shape, TensorSpec

# torch's default, in bytes; recorded in the entry `.storage_alignment`.
ALIGNMENT = 64

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_DESCRIPTOR = struct.Struct("<4s3L")
_DESCRIPTOR64 = struct.Struct("<4sLQQ")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_U16, _U32 = 0xFFFF, 0xFFFFFFFF
# The class of a storage without a dtype.
_UNTYPED = ("torch.storage", "UntypedStorage")
# Sizes and checksum follow the data (bit 3); the name is UTF-8 (bit 11).
_FLAGS = 1 << 3 | 1 << 11
_VERSION_NEEDED = 45  # zip64


class TensorArchive(Struct, frozen=True):
    """A torch.save archive of one tensor, but for its data.

    `before` is what precedes the data, so `len(before)` is where the data begins; `rest` is what
    follows, with zeros at `crc_offsets` (in `rest`) where the data's CRC-32 belongs.
    """

    before: bytes
    data_nbytes: int
    rest: bytes
    crc_offsets: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The length of the whole archive."""
        return len(self.before) + self.data_nbytes + len(self.rest)

    def after(self, crc32: int) -> bytes:
        """What follows data whose CRC-32 is `crc32`."""
        patched = bytearray(self.rest)
        for offset in self.crc_offsets:
            struct.pack_into("<L", patched, offset, crc32)
        return bytes(patched)


def lay_out_tensor(dtype: DType, shape: Shape) -> TensorArchive:
    """The archive that torch.save would write of a contiguous tensor.

    >>> from reshard.core.dtypes import FLOAT32
    >>> archive = lay_out_tensor(FLOAT32, (2, 3))
    >>> len(archive.before) % 64, archive.data_nbytes
    (0, 24)
    """
    spec = TensorSpec("", dtype, shape)
    zip_ = _Zip()
    zip_.add("data.pkl", _pickled(_tensor(spec, "0")))
    zip_.add(".format_version", b"1")
    zip_.add(".storage_alignment", str(ALIGNMENT).encode())
    zip_.add("byteorder", b"little")
    zip_.begin("data/0", spec.nbytes)
    before = bytes(zip_.out)
    zip_.skip(spec.nbytes)
    descriptor = zip_.finish(spec.nbytes, 0)
    zip_.add("version", b"3\n")
    directory = zip_.close()
    cut = len(before)
    return TensorArchive(
        before,
        spec.nbytes,
        bytes(zip_.out[cut:]),
        (descriptor + 4 - cut, directory["data/0"] + 16 - cut),
    )


class TensorBytes(Struct, frozen=True):
    """A small tensor whose row-major bytes are known."""

    dtype: DType
    shape: Shape
    data: bytes


class DataArchive(Struct, frozen=True):
    """A torch.save archive of data with tensors in it, but for what these hold.

    `literals` are the bytes around the data, each with its offset in the file. `places` say for
    each tensor, in the order given, where its data begins and where its CRC-32 belongs.
    """

    nbytes: int
    literals: tuple[tuple[int, bytes], ...]
    places: tuple[tuple[int, tuple[int, int]], ...]

    def file(
        self,
        name: str,
        slots: Sequence[tuple[TensorSpec, Entry, Entry | None]],
        table: str = "",
    ) -> OutputFile:
        """The archive as a file: for each tensor what is written, what from, and what of the base
        it is compared with."""
        placed = (
            Slot(start, spec, source, tuple(at - start for at in checksums), reference)
            for (spec, source, reference), (start, checksums) in zip(
                slots, self.places, strict=True
            )
        )
        return OutputFile(name, self.nbytes, self.literals, tuple(placed), table)


def lay_out_state_dict(specs: Sequence[TensorSpec]) -> DataArchive:
    """The archive that torch.save would write of `{spec.name: contiguous tensor}`."""
    return lay_out({spec.name: spec for spec in specs})


def lay_out_data(value: object) -> bytes:
    """The archive that torch.save would write of data without tensors whose bytes are not known.

    Raises `TypeError` as `lay_out` does.
    """
    return b"".join(literal for _, literal in lay_out(value).literals)


def lay_out(value: object) -> DataArchive:
    """The archive that torch.save would write of plain data with tensors in it.

    The data are None, bool, int, float, str, and lists, tuples and dicts of these, of some
    thousands of items in all. A `TensorSpec` stands for a contiguous tensor that is written later,
    a `TensorBytes` for one whose bytes go into the literals.

    Raises `TypeError` for anything else.
    """
    tensors: list[TensorSpec | TensorBytes] = []
    pickled = _pickled(_described(value, tensors))
    zip_ = _Zip()
    zip_.add("data.pkl", pickled)
    zip_.add(".format_version", b"1")
    zip_.add(".storage_alignment", str(ALIGNMENT).encode())
    zip_.add("byteorder", b"little")
    literals: list[tuple[int, bytes]] = []
    later: list[tuple[str, int, int]] = []  # entry, start of the data, of its checksum behind it
    at, cut = 0, 0
    for index, tensor in enumerate(tensors):
        name = f"data/{index}"
        if isinstance(tensor, TensorBytes):
            zip_.add(name, tensor.data)
            continue
        zip_.begin(name, tensor.nbytes)
        literals.append((at, bytes(zip_.out[cut:])))
        cut = len(zip_.out)
        start = at + len(literals[-1][1])
        zip_.skip(tensor.nbytes)
        at = start + tensor.nbytes
        zip_.finish(tensor.nbytes, 0)
        later.append((name, start, at + 4))
    zip_.add("version", b"3\n")
    directory = zip_.close()
    literals.append((at, bytes(zip_.out[cut:])))
    places = tuple(
        (start, (descriptor, at + directory[name] - cut + 16)) for name, start, descriptor in later
    )
    return DataArchive(at + len(literals[-1][1]), tuple(literals), places)


class _Zip:
    """An archive as it grows. `out` is what is written of it, without the data skipped."""

    def __init__(self) -> None:
        self.out = bytearray()
        self._skipped = 0
        self._entries: list[tuple[bytes, int, int, int]] = []
        self._header = 0
        self._name = b""

    @property
    def _position(self) -> int:
        return len(self.out) + self._skipped

    def add(self, name: str, data: bytes) -> None:
        self.begin(name, len(data))
        self.out += data
        self.finish(len(data), zlib_ng.crc32(data))

    def begin(self, name: str, nbytes: int) -> None:
        """The local header, padded so that the data begins at a multiple of `ALIGNMENT`."""
        self._header, self._name = self._position, f"archive/{name}".encode()
        wide = nbytes >= _U32
        # Sizes that are not known yet are 0, or stand so in the zip64 field.
        extra = struct.pack("<2H2Q", 1, 16, 0, 0) if wide else b""
        start = self._header + _LOCAL.size + len(self._name) + len(extra) + 4
        padding = -start % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        size = _U32 if wide else 0
        self.out += _LOCAL.pack(
            b"PK\3\4", _VERSION_NEEDED if wide else 0, _FLAGS, 0, 0, 0, 0, size, size,
            len(self._name), len(extra),
        )  # fmt: skip
        self.out += self._name + extra

    def skip(self, nbytes: int) -> None:
        """Pass over data that is not written here."""
        self._skipped += nbytes

    def finish(self, nbytes: int, crc32: int) -> int:
        """The data descriptor; where it lies in `out`."""
        at = len(self.out)
        kind = _DESCRIPTOR64 if nbytes >= _U32 else _DESCRIPTOR
        self.out += kind.pack(b"PK\7\10", crc32, nbytes, nbytes)
        self._entries.append((self._name, self._header, nbytes, crc32))
        return at

    def close(self) -> dict[str, int]:
        """The directory and the end records; where each entry of the directory lies in `out`."""
        start = self._position
        places: dict[str, int] = {}
        for name, header, nbytes, crc32 in self._entries:
            places[name.decode().removeprefix("archive/")] = len(self.out)
            self._add_central(name, header, nbytes, crc32)
        end = self._position
        count, size = len(self._entries), end - start
        self.out += _END64.pack(
            b"PK\6\6", _END64.size - 12, 0x31E, _VERSION_NEEDED, 0, 0, count, count, size, start
        )
        self.out += _END64_LOCATOR.pack(b"PK\6\7", 0, end, 1)
        self.out += _END.pack(b"PK\5\6", 0, 0, count, count, size, min(start, _U32), 0)
        return places

    def _add_central(self, name: bytes, header: int, nbytes: int, crc32: int) -> None:
        wide = [value for value in (nbytes, nbytes, header) if value >= _U32]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        self.out += _CENTRAL.pack(
            b"PK\1\2", 0, _VERSION_NEEDED if wide else 0, _FLAGS, 0, 0, 0, crc32,
            min(nbytes, _U32), min(nbytes, _U32), len(name), len(extra), 0, 0, 0, 0,
            min(header, _U32),
        )  # fmt: skip
        self.out += name + extra


def _pickled(value: object) -> bytes:
    pickler = Pickler()
    pickler.put(value)
    return pickler.finish()


def _tensor(spec: TensorSpec, key: str) -> Call:
    """`_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`.

    A dtype without a storage class of its own: `_rebuild_tensor_v3(…, dtype)` of an untyped
    storage, whose size counts bytes.
    """
    storage = spec.dtype.storage
    kind = Name("torch", storage) if storage is not None else Name(*_UNTYPED)
    size = spec.nbytes if storage is None else spec.numel
    hooks = Call(Name("collections", "OrderedDict"), ())
    stored = Persistent(("storage", kind, key, "cpu", size))
    args = (stored, 0, spec.shape, contiguous_strides(spec.shape), False, hooks)
    if storage is None:
        rebuild = Name("torch._utils", "_rebuild_tensor_v3")
        return Call(rebuild, (*args, Name("torch", spec.dtype.name)))
    return Call(Name("torch._utils", "_rebuild_tensor_v2"), args)


def _described(value: object, tensors: list[TensorSpec | TensorBytes]) -> object:
    """Data with its tensors as calls that make them; they are appended to `tensors`, and named by
    their numbers."""
    if isinstance(value, TensorSpec | TensorBytes):
        tensors.append(value)
        return _tensor(TensorSpec("", value.dtype, value.shape), str(len(tensors) - 1))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_described(part, tensors) for part in value]
    if isinstance(value, tuple):
        return tuple(_described(part, tensors) for part in value)
    if isinstance(value, Mapping):
        return {key: _described(part, tensors) for key, part in value.items()}
    raise TypeError(f"{type(value).__name__} is not plain data")
