"""Hostile and damaged files, made here: small, each with the error that must refuse it.

`FILES` are whole files; `PICKLES` are pickles, to be tried bare and as the `data.pkl` of an
archive. The payloads would create the file `MARKER` in the working directory if they ran.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from tests.torchfile.handmade import (
    DATA,
    REBUILD,
    Member,
    archive,
    number,
    old_file,
    pickle,
    storage,
    tensor,
    text,
    torch_file,
    zip64_file,
)

Content = bytes | Callable[[], bytes]
MARKER = "reshard-hostile-marker"


@dataclass(frozen=True)
class Case:
    """Reading `content` must raise `error`, with `words` in it."""

    name: str
    content: Content
    error: type[ReshardError]
    words: str

    def make(self) -> bytes:
        return self.content if isinstance(self.content, bytes) else self.content()


def _cases(error: type[ReshardError], table: Mapping[str, tuple[Content, str]]) -> tuple[Case, ...]:
    return tuple(Case(name, content, error, words) for name, (content, words) in table.items())


GOOD = torch_file(tensor())
OLD_GOOD = old_file()
RUN = b"cos\nsystem\n" + text(f"touch {MARKER}") + b"\x85R"
EVAL = b"cbuiltins\neval\n" + text(f"open('{MARKER}', 'w')") + b"\x85R"


# One storage named as floats and as integers of the same size, or as bytes.
TWO_TYPES = b"(" + storage() + storage(cls=b"ctorch\nIntStorage\n") + b"t"
UNTYPED = b"(" + storage() + storage(numel=16, cls=b"ctorch.storage\nUntypedStorage\n") + b"t"


def _twice(one: bytes, other: bytes) -> bytes:
    """A dictionary that is given two keys, and the tensor that the file's storages are for."""
    return b"(" + tensor() + b"}(" + one + b"K\1" + other + b"K\2ut"


# Bombs: small files that would take much time or memory.


def _colliding_integers() -> bytes:
    # Equal modulo 2^61 - 1, so equal hashes.
    return pickle(b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(20_000)) + b"u")


def _tuples_as_keys() -> bytes:
    return pickle(b"}(" + b"".join(number(i) + b"N\x86N" for i in range(20_000)) + b"u")


def doubling(levels: int) -> bytes:
    """Lists of two of the list before: 2^levels leaves."""
    body = b"](]q\x00"
    for i in range(1, levels):
        before = b"h" + bytes([i - 1])
        body += b"]q" + bytes([i]) + b"(" + before + before + b"e"
    return pickle(body + b"e")


def _copied_bytes() -> bytes:
    """One long string, to be encoded a hundred thousand times."""
    arguments = text("a" * 1_000_000) + text("latin1") + b"\x86q\x01R"
    return pickle(b"](c_codecs\nencode\nq\x00" + arguments + b"h\x00h\x01R" * 100_000 + b"e")


def _growing_name() -> bytes:
    """getattr of getattr of …, each with a longer name."""
    longer = b"h\x00h\x01" + text("a" * 100) + b"\x86Rq\x01"
    return pickle(b"](c__builtin__\ngetattr\nq\x00cos\nsystem\nq\x01" + longer * 100 + b"e")


def _recalled(prepared: Sequence[bytes], body: bytes, times: int) -> bytes:
    """A list of `times` values that `body` makes, of what was stored under 0, 1, ..."""
    stored = b"".join(one + b"q" + bytes([index]) for index, one in enumerate(prepared))
    return pickle(b"](" + stored + b"](" + body * times + b"ee")


def _all_pairs() -> bytes:
    """A thousand modules and a thousand classes: a million long names."""
    count = 1000
    texts = b"".join(text(f"{i}" + "a" * 500) + b"\x94" for i in range(2 * count))
    pairs = b"".join(
        b"j" + struct.pack("<L", i) + b"j" + struct.pack("<L", count + j) + b"\x93"
        for i in range(count)
        for j in range(count)
    )
    return pickle(b"](" + texts + b"](" + pairs + b"ee")


def _many_sizes() -> bytes:
    sizes = b"(" + b"K\1" * 32 + b"t"
    return _recalled([b"ctorch\nSize\n", sizes], b"h\0h\1\x85R", 900_000)


def _many_devices() -> bytes:
    index = b"\x8a\xff" + b"\x7f" * 255
    prepared = [b"ctorch\ndevice\n", text("cuda"), index]
    return _recalled(prepared, b"h\0h\1h\2\x86R", 700_000)


def _many_nested_names() -> bytes:
    prepared = [b"c__builtin__\ngetattr\n", b"cm\n" + b"C" * 900 + b"\n", text("a" * 100)]
    return _recalled(prepared, b"h\0h\1h\2\x86R", 700_000)


def _many_tensors() -> bytes:
    """One tensor's arguments, called with half a million times."""
    first = REBUILD + b"q\x00" + tensor()[len(REBUILD) : -1] + b"q\x01R"
    return torch_file(b"]" + first + b"a" + b"h\x00h\x01Ra" * 500_000)


PICKLES = (
    *_cases(
        IncompleteError,
        {
            "empty": (b"", "ends early"),
            "no end": (b"\x80\x02N", "ends early"),
            "text cut off": (pickle(b"X\xff\xff\xff\xffa"), "ends early"),
            "long bytes": (pickle(b"\x8e" + b"\xff" * 8), "ends early"),
            "long frame": (pickle(b"\x95" + b"\xff" * 8), "ends early"),
            "number cut off": (b"\x80\x02J\0\0", "ends early"),
            "name cut off": (b"\x80\x02cos", "ends early"),
        },
    ),
    *_cases(
        FormatError,
        {
            "no value": (pickle(b""), "ends with 0 values"),
            "two values": (pickle(b"NN"), "ends with 2 values"),
            "an open mark": (pickle(b"(N"), "1 marks"),
            "bytes after the end": (pickle(b"N") + b"x", "ends at byte 4 of 5"),
            "no opcode": (pickle(b"\xff"), "0xff"),
            "broken text": (pickle(b"X\1\0\0\0\xff"), "not UTF-8"),
            "broken name": (pickle(b"c\xff\nx\n"), "not UTF-8"),
            "name with escapes": (pickle(b"ca\x1b[2J\nx\n"), "not text"),
            "name of numbers": (pickle(b"K\1K\1\x93"), "not text"),
            "endless name": (pickle(b"c" + b"a" * 9999 + b"\nx\n"), "longer than any name"),
            "growing name": (_growing_name, "longer than any name"),
            "memo not stored": (pickle(b"h\x05"), "recalls value 5"),
            "memo with a gap": (pickle(b"Nr\xff\xff\xff\xff"), "stores value 4294967295"),
            "call of text": (pickle(text("os") + b")R"), "calls a str"),
            "call of a number": (pickle(b"K\1)R"), "calls a int"),
            "call with a list": (pickle(b"cos\nsystem\n]R"), "not a tuple"),
            "append to a dict": (pickle(b"}Na"), "appends to a dict"),
            "items of a list": (pickle(b"]NNs"), "sets items of a list"),
            "odd items": (pickle(b"}(Nu"), "lacks its value"),
            "attributes of text": (pickle(text("a") + b"}b"), "attributes of a str"),
            "below a mark": (pickle(b"N(\x85t"), "lacks operands"),
            "a short tuple": (pickle(b"N\x87"), "tuple lacks items"),
            "a mark that is not there": (pickle(b"Nt"), "lacks operands"),
            "Size of text": (pickle(b"ctorch\nSize\n" + text("a") + b"\x85R"), "is a str"),
            "Size below 0": (pickle(b"ctorch\nSize\n" + number(-1) + b"\x85\x85R"), "is -1"),
            "long Size": (pickle(b"ctorch\nSize\n(" + b"K\1" * 99 + b"t\x85R"), "99 dimensions"),
            "bytes of letters": (
                pickle(b"c_codecs\nencode\n" + text("漢") + text("latin1") + b"\x86R"),
                "above 255",
            ),
        },
    ),
    *_cases(
        UnsupportedError,
        {
            "protocol 6": (b"\x80\x06N.", "protocol 6"),
            "INT": (pickle(b"I1\n"), "opcode INT"),
            "INST": (pickle(b"(ios\nsystem\n"), "opcode INST"),
            "OBJ": (pickle(b"(cos\nsystem\no"), "opcode OBJ"),
            "EXT1": (pickle(b"\x82\x01"), "opcode EXT1"),
            "NEWOBJ_EX": (pickle(b"cos\nx\n)}\x92"), "opcode NEWOBJ_EX"),
            "PERSID": (pickle(b"P0\n"), "opcode PERSID"),
            "DUP": (pickle(b"N2"), "opcode DUP"),
            "NEXT_BUFFER": (pickle(b"\x97"), "opcode NEXT_BUFFER"),
            "a list as key": (pickle(b"}]Ns"), "key that is a list"),
            "a deep tuple as key": (
                pickle(b"})" + b"\x85" * 100_000 + b"Ns"),
                "key that is a tuple",
            ),
            "deep tuple": (pickle(b")" + b"\x85" * 500_000), "deeper than"),
            "deep lists": (pickle(b"]" * 200_000 + b"a" * 199_999), "deeper than"),
            "deep marks": (pickle(b"(" * 500_000), "marks"),
            "deep doubling": (doubling(200), "deeper than"),
            "colliding integers": (_colliding_integers, "keys that are large numbers"),
            "many tuples as keys": (_tuples_as_keys, "keys that are large numbers"),
            "huge integer": (
                pickle(b"\x8b" + struct.pack("<L", 1 << 20) + b"\1" * (1 << 20)),
                "takes 1048576 bytes",
            ),
            "many values": (pickle(b"N" * 5_000_000), "stacks more than"),
            "many dicts": (pickle(b"](" + b"}" * 900_000 + b"e"), "objects of more than"),
            "copied bytes": (_copied_bytes, "objects of more than"),
            "all pairs of names": (_all_pairs, "objects of more than"),
            "many sizes": (_many_sizes, "objects of more than"),
            "many devices": (_many_devices, "objects of more than"),
            "many nested names": (_many_nested_names, "objects of more than"),
        },
    ),
)


def _overlapping() -> bytes:
    """Two storages that share their bytes."""
    main = Member("archive/data.pkl", pickle(tensor()))
    first = len(archive(main, start=0)) - 22 - 46 - len(main.name)
    return archive(main, DATA, Member("archive/data/1", nbytes=16, header=first))


def _zip64(size: int, extra: bytes) -> bytes:
    """An archive whose data.pkl has its size in the zip64 field `extra`."""
    return torch_file(b"N", nbytes=size, extra=extra)


FILES = (
    *_cases(
        IncompleteError,
        {
            "empty file": (b"", "empty"),
            "zeros": (bytes(4096), "zero"),
            "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            "zip begun": (b"PK\3\4", "do not end"),
            "zip cut off": (GOOD[:-1], "do not end"),
            "zip cut in half": (GOOD[: len(GOOD) // 2], "do not end"),
            "zip with a tail": (GOOD + b"x", "do not end"),
            "old, cut off": (OLD_GOOD[:-1], "storage '0' needs bytes"),
            "old, cut in its pickles": (OLD_GOOD[:90], "ends early"),
            "old, without its list": (old_file()[:-40], "ends early"),
        },
    ),
    *_cases(
        UnsupportedError,
        {
            "safetensors": (struct.pack("<Q", 8) + b'{"a":{}}', "safetensors"),
            "tar": (b"x" * 257 + b"ustar" + bytes(300), "tar archive"),
            "gzip": (b"\x1f\x8b" + b"x" * 30, "gzip"),
            "web page": (b"<!DOCTYPE html><html>", "web page"),
            "bare pickle": (pickle(b"N"), "bare pickle"),
            "npz": (archive(Member("a.npy", b"x")), "a.npy"),
            "empty zip": (b"PK\3\4" + archive(start=4), "holds nothing"),
            "TorchScript": (torch_file(b"N", Member("archive/constants.pkl")), "TorchScript"),
            "two folders": (torch_file(b"N", Member("other/x")), "other/x"),
            "big-endian": (torch_file(b"N", Member("archive/byteorder", b"big")), "'big'"),
            "old, big-endian": (OLD_GOOD.replace(b"\x88u.", b"\x89u.", 1), "big-endian"),
            "many tensors": (_many_tensors, "objects of more than"),
        },
    ),
    *_cases(
        FormatError,
        {
            "one byte": (b"P", "begins with 50"),
            "text": (b"hello, world", "begins with 68 65 6c"),
            "compressed": (torch_file(b"N", method=8), "compressed"),
            "encrypted": (torch_file(b"N", flags=1), "encrypted"),
            "wrong CRC": (torch_file(b"N", crc32=1), "CRC-32"),
            "named twice": (torch_file(b"N", Member("archive/data.pkl")), "twice"),
            "overlapping": (_overlapping, "what follows begins"),
            "size beyond the file": (torch_file(b"N", nbytes=1 << 30), "needs bytes"),
            "stored size differs": (torch_file(b"N", packed=3), "stored in 3"),
            "header beyond the file": (torch_file(b"N", header=1 << 31), "needs bytes"),
            "header in the data": (torch_file(b"N", header=3), "damaged"),
            "local name differs": (torch_file(b"N", local_name="archive/data.pkx"), "damaged"),
            "padding into the next": (torch_file(b"N", padding=9), "what follows begins"),
            "zip64 sizes missing": (_zip64(0xFFFFFFFF, b""), "lacks its zip64"),
            "zip64 sizes cut": (_zip64(0xFFFFFFFF, b"\1\0\x10\0" + bytes(4)), "lacks its zip64"),
            "zip64 size huge": (_zip64(0xFFFFFFFF, b"\1\0\x10\0" + b"\xff" * 16), "needs bytes"),
            "zip64 elsewhere": (zip64_file(-8), "disagree"),
            "directory beyond the file": (archive(DATA, start=1 << 31), "its end begins"),
            "directory elsewhere": (archive(DATA, start=0), "damaged"),
            "directory cut short": (archive(DATA, nbytes=20), "ends within an entry"),
            "several disks": (archive(DATA, disk=1), "several files"),
            "wrong count": (archive(DATA, here=7, count=7), "states 7"),
            "no storage": (torch_file(tensor(), Member("archive/x")), "lacks the entry"),
            "storage of another size": (torch_file(tensor(numel=5)), "pickle says 20"),
            "storage of two types": (torch_file(TWO_TYPES), "is named with two types"),
            "storage of a type and of none": (torch_file(UNTYPED), "is named with two types"),
            "old, storage of two types": (old_file(TWO_TYPES), "is named with two types"),
            "a key twice": (torch_file(_twice(text("a"), text("a"))), "sets the key 'a' twice"),
            "a number twice": (torch_file(_twice(b"K\1", b"K\1")), "sets the key 1 twice"),
            "a name and how it is spelt": (
                torch_file(_twice(b"X\3\0\0\0\xed\xb2\x80", text("\\udc80"))),
                "sets the key '\\\\udc80' twice",
            ),
            "old, a key twice": (old_file(_twice(text("a"), text("a"))), "sets the key 'a' twice"),
            "storage below 0": (torch_file(tensor(numel=-1)), "-1 elements"),
            "storage of endless size": (torch_file(tensor(numel=1 << 62)), "elements"),
            "storage of no class": (torch_file(storage(cls=b"cos\nsystem\n")), "unknown class"),
            "storage with a path": (
                torch_file(storage(key="../../etc/passwd")),
                "lacks the entry 'data/../../etc/passwd'",
            ),
            "storage of a long key": (torch_file(storage(key="k" * 9999)), "not a short text"),
            "long name, compressed": (archive(Member("x" * 9999, method=8)), "compressed"),
            "storage as a view": (torch_file(storage(view=text("v") + b"NN\x87")), "elements"),
            "persistent id of a number": (torch_file(b"K\1Q"), "not a tuple"),
            "persistent id of a module": (torch_file(text("module") + b"\x85Q"), "whole module"),
            "past the storage": (torch_file(tensor(offset=1)), "bytes 4 to 20"),
            "negative offset": (torch_file(tensor(offset=-1)), "offset is -1"),
            "huge offset": (torch_file(tensor(offset=1 << 62)), "larger than any"),
            "negative size": (torch_file(tensor(size=(-4,))), "size is -4"),
            "negative stride": (torch_file(tensor(stride=(-1,))), "stride is -1"),
            "wide stride": (torch_file(tensor(stride=(2,))), "bytes 0 to 28"),
            "endless sizes": (
                torch_file(tensor(size=(1 << 32, 1 << 32), stride=(0, 0))),
                "larger than any",
            ),
            "endless stride": (torch_file(tensor(size=(3,), stride=(1 << 62,))), "larger than"),
            "sizes without strides": (torch_file(tensor(stride=())), "0 strides"),
            "tensor of no storage": (torch_file(REBUILD + b"(NK\0))\x89}tR"), "not a storage"),
            "tensor of no arguments": (torch_file(REBUILD + b")R"), "0 arguments"),
            "old, other count": (old_file(storages=struct.pack("<q", 5) + bytes(20)), "says 4"),
            "old, count below 0": (old_file(storages=struct.pack("<q", -4)), "-4 elements"),
            "old, storage not listed": (old_file(keys=b"]"), "lists 0 storages"),
            "old, list of lists": (old_file(keys=b"]]a"), "list of its storages"),
            "old, other version": (OLD_GOOD.replace(b"M\xe9\x03", b"M\xe8\x03", 1), "header"),
            "old, a view past its storage": (
                old_file(body=storage(view=text("v") + b"K\3K\2\x87")),
                "a view takes bytes 12 to 20",
            ),
            "old, two sizes": (
                old_file(body=storage() + storage(numel=3) + b"\x86"),
                "two sizes",
            ),
        },
    ),
)
