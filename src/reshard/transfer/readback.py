"""Read files back as soon as they are written: while others are written, and while they are cached.

The result is only digests of stretches of files. Verification, which reads the folder without the
plan, decides whether these stretches are the tensors'.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from contextlib import suppress

import xxhash
from msgspec import Struct

from reshard.errors import VerificationError, WriteError
from reshard.transfer.fill import Array

# Shorter stretches are left to the verification: noting one takes 300 bytes.
LEAST_NBYTES = 1 << 20


class Stretch(Struct, frozen=True):
    """Bytes `[offset, offset + nbytes)` of a written file, by the path that it will have."""

    path: str
    offset: int
    nbytes: int


class ReadJob(Struct, frozen=True):
    """A stretch that is to be read now, from an open file."""

    owner: ReadBack
    fd: int
    stretch: Stretch

    def read(self, buffer: Array) -> None:
        """Read it through `buffer`, and note its digest. Raises `VerificationError`."""
        stretch = self.stretch
        hasher = xxhash.xxh3_128()
        at, stop = stretch.offset, stretch.offset + stretch.nbytes
        try:
            while at < stop:
                view = buffer[: min(len(buffer), stop - at)].data
                got = os.preadv(self.fd, [view], at)
                if got == 0:
                    raise VerificationError(
                        f"it ends at byte {at}; {stop} were written.", path=stretch.path
                    )
                hasher.update(view[:got])
                at += got
        except OSError as error:
            raise VerificationError(
                f"it cannot be read again: {error.strerror or error}.", path=stretch.path
            ) from None
        self.owner.done(self.fd, stretch, hasher.digest())


class ReadBack:
    """What is to be read again, and what was found. Safe to use from threads."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, int, int], bytes] = {}
        self._waiting: dict[int, list[Stretch]] = {}
        self._ready: deque[ReadJob] = deque()
        self._left: dict[int, int] = {}
        self._lock = threading.Lock()

    def note(self, fd: int, stretch: Stretch) -> None:
        """Note that a stretch of the file `fd` will be written."""
        if stretch.nbytes >= LEAST_NBYTES:
            with self._lock:
                self._waiting.setdefault(fd, []).append(stretch)

    def known(self, stretch: Stretch, digest: bytes) -> None:
        """Note that a stretch was already read from the file, and has this digest."""
        if stretch.nbytes >= LEAST_NBYTES:
            with self._lock:
                self.found[stretch.path, stretch.offset, stretch.nbytes] = digest

    def written(self, fd: int) -> None:
        """Note that the whole file is written; call this before its descriptor is closed."""
        with self._lock:
            stretches = self._waiting.pop(fd, [])
            if stretches:
                own = os.dup(fd)
                self._left[own] = len(stretches)
                self._ready.extend(ReadJob(self, own, stretch) for stretch in stretches)

    def take(self) -> ReadJob | None:
        """The next stretch to read; None where there is none now."""
        with self._lock:
            return self._ready.popleft() if self._ready else None

    def done(self, fd: int, stretch: Stretch, digest: bytes) -> None:
        """Note what was read; a file of which all was read is closed."""
        with self._lock:
            self.found[stretch.path, stretch.offset, stretch.nbytes] = digest
            self._left[fd] -= 1
            if not self._left[fd]:
                del self._left[fd]
                _close(fd, stretch.path)

    def close(self) -> None:
        """Close what is open still, after a failure."""
        for fd in self._left:
            with suppress(OSError):
                os.close(fd)
        self._left.clear()


def _close(fd: int, path: str) -> None:
    """Close a file that was written: a network file system may report only now what it lost."""
    try:
        os.close(fd)
    except OSError as error:
        raise WriteError(f"it cannot be written: {error.strerror or error}.", path=path) from None
