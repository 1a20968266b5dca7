"""The journal of finished pieces: what an interrupted run made, for a run that resumes it.

    CHECKSUM TEXT                                   a line; xxh3-64 of the text, in hexadecimal
    ["reshard", version, reshard's version, plan]   the first: what is made, by its digest
    ["source", path, [...]]                         each file that is read, and which one it was
    ["piece", table, tensor, leaf, digest, [[source, start, stop, CRC-32], ...]]
    ["sealed", name, nbytes, tag]                   a file is complete, synced and named

A piece is a leaf of a tensor's digest (`pieces`). Its line holds the checksums of the bytes that
were read to make it, of files that state checksums, so that these are compared although a later run
does not read them. `source` counts the lines of sources from 0.

A line is a claim: a run reuses a piece only if the piece's bytes, read from the output, have the
digest. So nothing that is lost or damaged here can damage an output; it is only made again. What
follows the first line that is not whole is not used, and is cut off before a line is added. A
journal that cannot be written is no reason to fail: it ends there.

Memory: 200 bytes for each piece that an earlier run noted.
"""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Protocol

import msgspec
import xxhash
from msgspec import Struct

from reshard._version import __version__
from reshard.storage.fingerprints import Fingerprint
from reshard.storage.source import close_read
from reshard.transfer.system import write_fully

#: The version of the lines above.
VERSION = 1
# Bytes of a line, at most: a piece that is made of more stretches is not noted.
_MAX_LINE = 1 << 20
# Bytes of pieces after which lines are written. Lines that wait are lost with the process.
_STEP = 16 << 20
# Lines that wait, at most: 200,000 small tensors make few bytes.
_MAX_WAITING = 1 << 12
# Bytes of pieces after which lines are synced, with the next file.
_SYNCED = 64 << 20
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


class _Header(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="reshard"):
    version: int
    reshard: str
    plan: str


class _Source(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="source"):
    path: str
    fingerprint: Fingerprint


class Piece(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="piece"):
    """A finished piece: a leaf of a tensor of a table, the digest of its bytes, and what was read.

    Of `read`, each is the number of a source, the bytes `[start, stop)` of it, and their CRC-32.
    """

    table: str
    tensor: str
    leaf: int
    digest: bytes
    read: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def key(self) -> bytes:
        """Which piece it is, in 16 bytes."""
        return key(self.table, self.tensor, self.leaf)


class Sealed(Struct, frozen=True, array_like=True, forbid_unknown_fields=True, tag="sealed"):
    """A file of the output that is complete, synced and named; of one in a store, its tag."""

    name: str
    nbytes: int
    tag: str = ""


Line = _Header | _Source | Piece | Sealed
_DECODER: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


class StaleError(Exception):
    """An earlier run's journal is not that of this conversion; the message says why.

    `source` is the file that is another by now, where that is the reason.
    """

    def __init__(self, message: str, source: str = "") -> None:
        super().__init__(message)
        self.source = source


class Basis(Struct, frozen=True):
    """What pieces are made of: the plan's digest, and which files its sources are, by path."""

    plan: str
    sources: Mapping[str, Fingerprint] = {}


def key(table: str, tensor: str, leaf: int) -> bytes:
    """Which piece it is, in 16 bytes."""
    return xxhash.xxh3_128_digest(msgspec.json.encode((text_of(table), text_of(tensor), leaf)))


def encoded(line: Line) -> bytes:
    """A line's bytes."""
    text = msgspec.json.encode(line)
    return b"%s %s\n" % (xxhash.xxh3_64_hexdigest(text).encode(), text)


def encoded_piece(piece: Piece) -> bytes:
    """A piece's line; nothing where it is longer than what is read: such a piece is not noted."""
    line = encoded(piece)
    return line if len(line) <= _MAX_LINE else b""


def decoded(line: bytes) -> Line | None:
    """The line that these bytes are, the line break included; None where they are not whole."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(text).encode() != checksum:
        return None
    try:
        return _DECODER.decode(text)
    except msgspec.MsgspecError:
        return None


def opening(basis: Basis) -> bytes:
    """The lines that a journal begins with."""
    first = encoded(_Header(VERSION, __version__, basis.plan))
    return first + b"".join(map(encoded, _sources(basis)))


def _sources(basis: Basis) -> list[_Source]:
    return [_Source(text_of(path), basis.sources[path]) for path in sorted(basis.sources)]


def text_of(name: str) -> str:
    """A name as JSON can hold it: one that is not UTF-8 holds halves of surrogate pairs."""
    return name.encode("utf-8", "backslashreplace").decode()


class Noted:
    """What an earlier run noted: where in the file the line of each piece is. Safe to use from
    threads.

    The first `nbytes` of the file are whole lines; `damaged` where others follow. Raises
    `StaleError` unless they are of this conversion.
    """

    def __init__(self, file: IO[bytes], basis: Basis) -> None:
        self.damaged: bool = False
        self.nbytes: int = 0
        self.sealed: dict[str, Sealed] = {}
        self._at: dict[bytes, int] = {}
        self._file = file
        self._reading = threading.Lock()
        lines = self._lines()
        _check_opening(lines, basis)
        self.nbytes = file.tell()
        for start, line in lines:
            if isinstance(line, Piece) and _refers(line, len(basis.sources)):
                self._at[line.key] = start
            elif isinstance(line, Sealed):
                self.sealed[line.name] = line
            else:
                self.damaged = True
                break
            self.nbytes = file.tell()

    def __len__(self) -> int:
        """How many pieces were noted."""
        return len(self._at)

    def piece(self, table: str, tensor: str, leaf: int) -> Piece | None:
        """What was noted of a piece last; None where nothing was, or where it cannot be read."""
        asked = key(table, tensor, leaf)
        start = self._at.get(asked)
        if start is None:
            return None
        try:
            with self._reading:
                self._file.seek(start)
                line = decoded(self._file.readline(_MAX_LINE))
        except OSError:  # the piece is made again
            return None
        return line if isinstance(line, Piece) and line.key == asked else None

    def close(self) -> None:
        with suppress(OSError):  # nothing was written through it
            self._file.close()

    def _lines(self) -> Iterator[tuple[int, Line]]:
        """Each whole line, with the offset where it starts."""
        while True:
            start = self._file.tell()
            raw = self._file.readline(_MAX_LINE)
            if not raw:
                return
            line = decoded(raw)
            if line is None:
                self.damaged = True
                return
            yield start, line


def _check_opening(lines: Iterator[tuple[int, Line]], basis: Basis) -> None:
    """Raise `StaleError` where the journal is not of this plan and these sources."""
    _, first = next(lines, (0, None))
    if not isinstance(first, _Header):
        raise StaleError("its journal is damaged, or of another version")
    if first.version != VERSION or first.reshard != __version__:
        raise StaleError(f"reshard {first.reshard} made it, and this is {__version__}")
    if first.plan != basis.plan:
        raise StaleError("its plan is different")
    for source in _sources(basis):
        _, line = next(lines, (0, None))
        if not isinstance(line, _Source):
            raise StaleError("its journal is damaged")
        if line != source:
            raise StaleError("a file of its input has changed", source.path)


def _refers(piece: Piece, num_sources: int) -> bool:
    """Whether what was read for a piece can be bytes of the sources."""
    return all(
        0 <= source < num_sources and 0 <= start < stop for source, start, stop, _ in piece.read
    )


class Notebook(Protocol):
    """A journal, wherever it is kept: what an interrupted run noted, and what this one notes."""

    noted: Noted | None
    sources: list[str]

    def note(self, piece: Piece, nbytes: int) -> None: ...


class Journal:
    """The journal of one run, open and locked. Safe to use from threads.

    `sources` are the paths that the pieces' numbers stand for. `noted` is what an interrupted run
    left. Who makes pieces in other processes gives their records to the one that has the journal.
    """

    def __init__(self, fd: int, at: int, basis: Basis, noted: Noted | None = None) -> None:
        self.noted = noted
        self.sources: list[str] = sorted(basis.sources)
        self._fd = fd
        self._at = at
        self._waiting: list[bytes] = []
        self._passed = self._unsynced = 0
        self._writing = threading.Lock()

    @classmethod
    def begin(cls, path: Path, basis: Basis) -> Journal:
        """A new journal. Raises `OSError`."""
        fd = os.open(path, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            _lock(fd)
            text = opening(basis)
            write_fully(fd, memoryview(text), 0)
        except BaseException:
            close_read(fd)
            raise
        return cls(fd, len(text), basis)

    @classmethod
    def resume(cls, path: Path, basis: Basis) -> Journal:
        """The journal of an interrupted run, to be continued.

        Raises `StaleError` where it is not of this conversion, `BlockingIOError` where a process
        that lives has it, and `OSError`.
        """
        fd = os.open(path, _FLAGS)
        with ExitStack() as failed:
            failed.callback(close_read, fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise StaleError("its journal is not a file of this user")
            _lock(fd)
            file = failed.enter_context(os.fdopen(os.dup(fd), "rb"))
            noted = Noted(file, basis)
            os.truncate(fd, noted.nbytes)
            failed.pop_all()
        return cls(fd, noted.nbytes, basis, noted)

    def note(self, piece: Piece, nbytes: int) -> None:
        """Note a finished piece of `nbytes` bytes, which are written to its file."""
        line = encoded_piece(piece)
        with self._writing:
            self._waiting.append(line)
            self._passed += nbytes
            self._unsynced += nbytes
            if self._passed >= _STEP or len(self._waiting) >= _MAX_WAITING:
                self._flush()

    def seal(self, name: str, nbytes: int) -> None:
        """Note that a file is complete, synced and named, and make all lines durable.

        Not after each small file: what the lines are worth, the sync would cost.
        """
        with self._writing:
            self._waiting.append(encoded(Sealed(text_of(name), nbytes)))
            self._flush()
            if self._fd >= 0 and self._unsynced >= _SYNCED:
                self._unsynced = 0
                try:
                    os.fsync(self._fd)
                except OSError:
                    self._end()

    def close(self) -> None:
        """Write what waits, and release the file."""
        with self._writing:
            self._flush()
            self._end()
            if self.noted is not None:
                self.noted.close()

    def _flush(self) -> None:
        """Write the lines that wait. Where that fails, nothing is written after them."""
        text, self._waiting, self._passed = b"".join(self._waiting), [], 0
        if self._fd >= 0:
            try:
                write_fully(self._fd, memoryview(text), self._at)
            except OSError:
                self._end()
            self._at += len(text)

    def _end(self) -> None:
        if self._fd >= 0:
            close_read(self._fd)
            self._fd = -1


def is_held(path: Path) -> bool:
    """Whether a process that lives has the journal at `path`, as far as the system can tell."""
    try:
        fd = os.open(path, _FLAGS)  # for writing, too: NFS locks nothing else
    except OSError:
        return False
    try:
        _lock(fd)
    except BlockingIOError:
        return True
    finally:
        close_read(fd)
    return False


def _lock(fd: int) -> None:
    """Lock a journal while its run lives, where the system can. Raises `BlockingIOError`."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return  # no locks here: the one beside the output holds others off
