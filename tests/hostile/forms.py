"""What is put in the place of a file, whatever that file is: each exhausts something.

A form makes its file at a path where nothing is. All are sparse or a few MB, or are made in less
than a second.
"""

from __future__ import annotations

import os
import socket
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.budget import MIB
from tests.torchfile import hostile
from tests.torchfile.handmade import DATA, Member, archive, pickle, tensor, text, torch_file

Form = Callable[[Path], object]


def _sparse(start: bytes, nbytes: int, end: bytes = b"") -> Form:
    """A file of holes, but for its ends."""

    def make(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(start)
            file.truncate(nbytes)
            if end:
                file.seek(nbytes - len(end))
                file.write(end)

    return make


def _content(content: Callable[[], bytes]) -> Form:
    return lambda path: path.write_bytes(content())


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket has 107 bytes at most
    try:
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(path.name)
    finally:
        os.chdir(here)


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _filled(before: bytes, filler: bytes, after: bytes, nbytes: int) -> Form:
    return _content(lambda: before + filler * (nbytes // len(filler)) + after)


def _safetensors(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _wide_header(count: int) -> bytes:
    """Empty tensors: a header alone.

    Of 300,000 in a model each command took 0.9 to 4.9 s of processor time and at most 255 MiB, on
    cores that were shared; a header of 310,000 is not parsed. Of 300,000 in an adapter doctor took
    7.3 s, and diff, beside a reward head of as many, 11 s and 440 MiB.
    Names that are each a pattern of their own take more, as a base: 2.4 s and 199 MiB for 150,000,
    4.2 s and 273 MiB for 200,000.
    """
    line = b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return _safetensors(b"{" + b",".join(line % number for number in range(count)) + b"}")


def _many_members(count: int) -> bytes:
    """A torch file with a storage of 0 bytes under each of very many names."""
    members = [Member("a/data.pkl", pickle(b"}"))]
    members += [Member(f"a/data/{number}") for number in range(count)]
    plain = archive(*members, here=0xFFFF, count=0xFFFF)
    body, end = plain[:-22], plain[-22:]
    nbytes, start = struct.unpack("<2L", end[12:20])
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 0, 45, 0, 0, *[len(members)] * 2, nbytes, start
    )
    return body + record + struct.pack("<4sLQL", b"PK\6\7", 0, len(body), 1) + end


def _deflated() -> bytes:
    """An entry of 4 GiB in 4 MiB, and a pickle that is compressed."""
    squeezed = zlib.compress(bytes(64 * MIB), 9)[2:-4]
    bomb = Member("archive/data/0", squeezed, nbytes=64 * MIB, packed=len(squeezed), method=8)
    return archive(Member("archive/data.pkl", pickle(tensor())), bomb)


def _stored_huge(path: Path) -> None:
    """A pickle of 4 GB that is stored, of holes."""
    name = b"archive/data.pkl"
    nbytes = 4_000_000_000
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 0, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    entry = struct.pack(
        "<4s6H3L5H2L", b"PK\1\2", 0, 0, 0, 0, 0, 0, 0, nbytes, nbytes, len(name), 0, 0, 0, 0, 0, 0
    )
    directory = entry + name
    start = len(local) + nbytes
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(directory), start, 0)
    with open(path, "wb") as file:
        file.write(local)
        file.seek(start)
        file.write(directory + end)


def _dict_of(value: bytes, count: int) -> bytes:
    """A dict of `count` text keys, each with a value of its own."""
    body = b"".join(text(f"k{number}") + value for number in range(count))
    return b"}(" + body + b"u"


def _tensors(count: int) -> bytes:
    """A state dict of very many tensors, all of one storage."""
    return torch_file(_dict_of(tensor(), count))


_LONG = "x" * (8 * MIB)
#: Pipes, devices and the like, and huge files.
SPECIAL: Mapping[str, Form] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a file of /proc": lambda path: path.symlink_to("/proc/self/environ"),
    "a loop of links": _loop,
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "nothing in it": _content(bytes),
    "20 GB of zeros": _sparse(b"", 20_000_000_000),
    "4 TB of zeros": _sparse(b"", 4_000_000_000_000),
    "20 GB after a brace": _sparse(b'{"a":[', 20_000_000_000),
}
#: What a parser of JSON, of lines or of names may choke on.
TEXTS: Mapping[str, Form] = {
    "15 MB of objects": _filled(b'{"a":[', b'{"a":1},', b"0]}", 15_000_000),
    "15 MB of lists": _filled(b'{"a":[', b"[[],[]],", b"0]}", 15_000_000),
    "120 MB of text": _filled(b'{"a":"', b"a" * 1000, b'"}', 120_000_000),
    "250 MB of objects": _filled(b'{"a":[', b'{"a":1},', b"0]}", 250_000_000),
    "16 MB of numbers": _filled(b'{"a":[', b"1,", b"0]}", 16_000_000),
    "14 MB of keys": _content(
        lambda: b"{" + b",".join(b'"%d":0' % number for number in range(1_200_000)) + b"}"
    ),
    "deep lists": _filled(b'{"a":', b"[", b"", 2_000_000),
    "deep objects": _filled(b"", b'{"a":', b"", 4_000_000),
    "a number of a million digits": _filled(b'{"a":', b"7", b"}", 1_000_000),
    "an exponent": _content(lambda: b'{"a":1e999999999,"b":-1e-999999999}'),
    "one line of 100 MB": _filled(b"", b"7", b"", 100_000_000),
    "lines": _filled(b"", b"a: 1\n", b"", 4_000_000),
    "broken escapes": _filled(b'{"a":"', b"\\", b'"}', 1_000_000),
}
#: What a reader of torch's files, zips, pickles or safetensors may choke on.
BINARIES: Mapping[str, Form] = {
    "a zip of 500,000 names": _content(lambda: _many_members(500_000)),
    "a zip that is deflated": _content(_deflated),
    "a zip with a pickle of 4 GB": _stored_huge,
    "a zip of 4 GB": _sparse(b"PK\3\4", 4_000_000_000, archive(DATA)[-22:]),
    "30,000 tensors": _content(lambda: _tensors(30_000)),
    "500,000 numbers": _content(lambda: torch_file(_dict_of(b"K\1", 500_000))),
    "500,000 dicts": _content(lambda: torch_file(b"](" + b"}" * 500_000 + b"e")),
    "lists that double": _content(lambda: torch_file(hostile.doubling(100)[2:-1])),
    "a long string": _content(lambda: torch_file(text("x" * (100 * MIB)))),
    "a long key": _content(lambda: torch_file(b"}" + text(_LONG) + tensor() + b"s")),
    "a pickle of 120 MB": _content(lambda: pickle(b"](" + (b"N" * 999 + b"e](") * 120_000 + b"e")),
    "a pickle of 250 MB": _sparse(b"\x80\x02}", 250_000_000, b"."),
    "a pickle of strings": _content(
        lambda: pickle(b"](" + (text("ab") + b"\x94") * 4_000_000 + b"e")
    ),
    "a header of 90 MB": _content(lambda: _safetensors(b'{"a":[' + b"[]," * 30_000_000 + b"0]}")),
    "a header of 100,000 tensors": _content(lambda: _wide_header(100_000)),
    "a header of 1,200,000 tensors": _content(lambda: _wide_header(1_200_000)),
    "a header that states 2^63 bytes": _content(lambda: struct.pack("<Q", 1 << 63) + b"{}"),
    "2 GB of zstd": _content(lambda: b"\x28\xb5\x2f\xfd" + bytes(1000)),
}


def _zipped(case: hostile.Case) -> Form:
    return _content(lambda: archive(Member("a/data.pkl", case.make()), DATA))


_HUGE = [case for case in hostile.PICKLES if callable(case.content)]
BOMBS: Mapping[str, Form] = {
    **{f"the bomb of {case.name}": _zipped(case) for case in _HUGE},
    **{f"the bare bomb of {case.name}": _content(case.make) for case in _HUGE},
}
FORMS: Mapping[str, Form] = {**SPECIAL, **TEXTS, **BINARIES, **BOMBS}
