"""Pickles and archives written by hand, byte for byte, so that any of them can be wrong."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<L", len(raw)) + raw


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def pickle(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


FLOAT = b"ctorch\nFloatStorage\n"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def storage(key: str = "0", numel: int = 4, cls: bytes = FLOAT, view: bytes = b"") -> bytes:
    """A storage, as its persistent id."""
    return b"(" + text("storage") + cls + text(key) + text("cpu") + number(numel) + view + b"tQ"


def tensor(
    offset: int = 0, size: tuple[int, ...] = (4,), stride: tuple[int, ...] = (1,), numel: int = 4
) -> bytes:
    """A tensor of storage 0, as torch.save writes it."""
    where = storage(numel=numel) + number(offset) + numbers(size) + numbers(stride)
    return REBUILD + b"(" + where + b"\x89}tR"


@dataclass(frozen=True)
class Member:
    """An entry of an archive: its data, and what the directory and its local header say of it."""

    name: str
    data: bytes = b""
    crc32: int | None = None
    nbytes: int | None = None
    packed: int | None = None
    flags: int = 0
    method: int = 0
    header: int | None = None
    local_name: str | None = None
    padding: int = 0
    extra: bytes = b""


DATA = Member("archive/data/0", bytes(16))


def archive(*members: Member, **end: int) -> bytes:
    """A zip archive of `members`; `end` replaces fields of its end record."""
    out, directory = bytearray(), bytearray()
    for member in members:
        header = len(out) if member.header is None else member.header
        out += _local(member)
        directory += _central(member, header)
    fields = {
        "disk": 0, "first": 0, "here": len(members), "count": len(members),
        "nbytes": len(directory), "start": len(out), "comment": 0,
    } | end  # fmt: skip
    return bytes(out + directory + struct.pack("<4s4H2LH", b"PK\5\6", *fields.values()))


def _local(member: Member) -> bytes:
    name = (member.local_name or member.name).encode()
    fields = (0, member.flags, member.method, 0, 0, 0, 0, 0, len(name), member.padding)
    return struct.pack("<4s5H3L2H", b"PK\3\4", *fields) + name + member.data


def _central(member: Member, header: int) -> bytes:
    crc32 = zlib.crc32(member.data) if member.crc32 is None else member.crc32
    nbytes = len(member.data) if member.nbytes is None else member.nbytes
    packed = nbytes if member.packed is None else member.packed
    name = member.name.encode()
    fields = (
        0, 0, member.flags, member.method, 0, 0, crc32, packed, nbytes, len(name),
        len(member.extra), 0, 0, 0, 0, header,
    )  # fmt: skip
    return struct.pack("<4s6H3L5H2L", b"PK\1\2", *fields) + name + member.extra


def torch_file(body: bytes, *others: Member, **changes: Any) -> bytes:
    """An archive whose data.pkl is the pickle `body`; `changes` are of its entry."""
    main = replace(Member("archive/data.pkl", pickle(body)), **changes)
    return archive(main, *(others or (DATA,)))


def zip64_file(shift: int) -> bytes:
    """An archive with a zip64 end record whose directory lies `shift` bytes further."""
    plain = torch_file(tensor())
    body, end = plain[:-22], plain[-22:]
    _, _, _, _, count, nbytes, start, _ = struct.unpack("<4s4H2LH", end)
    fields = (44, 0, 45, 0, 0, count, count, nbytes, start + shift)
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", *fields)
    return body + record + struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1) + end


def old_file(
    body: bytes | None = None,
    keys: bytes = b"]" + text("0") + b"a",
    storages: bytes = struct.pack("<q", 4) + bytes(16),
) -> bytes:
    """An old container of the object `body`, by default a tensor."""
    magic = pickle(b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19")
    system = pickle(b"}(" + text("little_endian") + b"\x88u")
    named = pickle(tensor() if body is None else body)
    return magic + pickle(b"M\xe9\x03") + system + named + pickle(keys) + storages
