"""An open input: a file of this machine, or an object of a store.

Files are read with `pread`, never mapped: a file that shrinks while it is read must give an error,
not a SIGBUS.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from reshard.core.tensors import FileRef
from reshard.errors import FormatError, IncompleteError, NotFoundError, is_of_system
from reshard.storage.paths import status

if TYPE_CHECKING:
    from reshard.storage.remote import Opened

#: Which file it is: its device, inode, size and time of change; of an object its tag and size.
Identity = tuple[int, int, int, int]
# Bytes that are read before they are compared: 512 KiB take two thirds of the time of 20 MB.
_COMPARED_NBYTES = 1 << 19


class Source:
    """An open input file. Safe to use from several threads."""

    def __init__(self, ref: FileRef, fd: int | None, identity: Identity, size: int) -> None:
        self.ref = ref
        self.size = size
        self.identity = identity
        self._fd = fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (writable, contiguous bytes) from `offset` on.

        Raises `IncompleteError` where the file ends before the buffer is full.
        """
        fd = self._fd
        if fd is None:
            fd, now = open_regular(self.ref.path)
            try:
                if identity_of(now) != self.identity:
                    raise changed(self.ref.path)
                _read_fully(fd, offset, buffer, self.ref.path)
            finally:
                close_read(fd)
        else:
            _read_fully(fd, offset, buffer, self.ref.path)

    def read_some(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` on as far as there is anything; returns the bytes read."""
        nbytes = min(len(buffer), max(self.size - offset, 0))
        self.read_into(offset, buffer[:nbytes])
        return nbytes

    def equals(self, offset: int, data: bytes) -> bool:
        """Whether the bytes from `offset` on are `data`; they are read up to where they differ.

        Raises `IncompleteError` where the file ends before.
        """
        # An opened file some at a time: what was read is then compared in the processor's cache.
        block = len(data) if self._fd is None else min(len(data), _COMPARED_NBYTES)
        buffer, view = bytearray(block), memoryview(data)
        for at in range(0, len(data), max(block, 1)):
            part = view[at : at + block]
            if len(part) < len(buffer):
                buffer = bytearray(len(part))
            self.read_into(offset + at, memoryview(buffer))
            if buffer != part:
                return False
        return True

    def identity_now(self) -> Identity | None:
        """Which file is there now under the name; None where none is.

        Raises `NotFoundError` where that cannot be told.
        """
        try:
            return identity_of(status(Path(self.ref.path)))
        except NotFoundError as error:
            if is_of_system(error):
                raise
            return None

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes `[offset, offset + nbytes)`; `IncompleteError` where the file is shorter."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise IncompleteError(
                f"bytes {offset} to {offset + nbytes} are needed, the file has {self.size}.",
                path=self.ref.path,
                hint="The file was truncated; copy it again or use another checkpoint.",
            )
        if self._fd is not None:
            # All at once as a rule, and without the copy of a buffer that is filled in parts. An
            # error is met again there, and stated.
            with suppress(OSError):
                data = os.pread(self._fd, nbytes, offset)
                if len(data) == nbytes:
                    return data
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def close(self) -> None:
        if self._fd is not None:
            close_read(self._fd)
            self._fd = None


class Expanded(Source):
    """A compressed frame in an unnamed temporary file, which goes when this does."""

    def __init__(self, ref: FileRef, file: IO[bytes], identity: Identity) -> None:
        super().__init__(ref, file.fileno(), identity, os.fstat(file.fileno()).st_size)
        self._file = file

    def close(self) -> None:
        self._file.close()


class RemoteSource(Source):
    """An object of a store, read by ranges."""

    def __init__(self, ref: FileRef, opened: Opened, identity: Identity) -> None:
        super().__init__(ref, None, identity, opened.known.nbytes)
        self._opened = opened

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self._opened.read_into(offset, buffer)

    def identity_now(self) -> Identity | None:
        return self._opened.identity_now()


def open_regular(path: str) -> tuple[int, os.stat_result]:
    """A regular file's descriptor, and what the system says of the file.

    Raises `NotFoundError`, `FormatError` (not a regular file).
    """
    fd = -1
    try:
        # O_NONBLOCK: opening a named pipe must not hang.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        now = os.fstat(fd)
    except FileNotFoundError:
        raise NotFoundError("there is no such file.", path=path) from None
    except OSError as error:
        if fd >= 0:
            close_read(fd)
        raise NotFoundError(f"it cannot be opened: {error.strerror}.", path=path) from error
    if not stat.S_ISREG(now.st_mode):
        close_read(fd)
        raise FormatError("it is not a regular file.", path=path)
    return fd, now


def close_read(fd: int) -> None:
    """Close a descriptor that nothing was written through: what fails then loses nothing."""
    with suppress(OSError):
        os.close(fd)


def _read_fully(fd: int, offset: int, buffer: memoryview, path: str) -> None:
    done = 0
    while done < len(buffer):
        try:
            got = os.preadv(fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise IncompleteError(f"it cannot be read: {error.strerror}.", path=path) from error
        if got == 0:
            raise IncompleteError(
                f"the file ends at byte {offset + done}; bytes to {offset + len(buffer)} are "
                "needed.",
                path=path,
                hint="The file was truncated; copy it again or use another checkpoint.",
            )
        done += got


def identity_of(now: os.stat_result) -> Identity:
    return (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns)


def changed(path: str) -> IncompleteError:
    return IncompleteError(
        "the file changed while it was read.",
        path=path,
        hint="Convert again once nothing writes to the checkpoint.",
    )
