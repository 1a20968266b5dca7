"""What an output offers to those who write it: a folder of this machine, or of a store."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import xxhash

from reshard.core.findings import Finding
from reshard.core.packed import Packed, pieces
from reshard.storage.source import Source
from reshard.transfer.journal import Notebook
from reshard.transfer.making import ReadAt

# Bytes of a file that are copied at a time.
_COPY_PIECE = 4 << 20


class StoppedError(Exception):
    """Another thread failed; this one ends quietly."""


class Output(Protocol):
    """A folder being written, which appears complete or not at all.

    A file is begun by `create`, filled by `put` and ended by `seal`; the number that `create`
    returns stands for it. `partial` is where the files lie until `commit`. With `in_order`, bytes
    are taken in ascending order, and wait where they come before their turn; files have no
    descriptors. `resumed` is the age in words of the interrupted run that is continued; empty where
    none is.
    """

    partial: Path
    resumed: str
    findings: list[Finding]

    @property
    def target(self) -> Path:
        """Where the output will be."""

    @property
    def in_order(self) -> bool: ...

    @property
    def journal(self) -> Notebook | None:
        """Where finished pieces are noted; None where the output cannot be continued."""

    def create(self, name: str, nbytes: int) -> int: ...

    def put(
        self, name: str, fd: int, data: memoryview, offset: int, *, known: bool = False
    ) -> None:
        """Take bytes of a file; with `known`, ones that are no tensor's."""

    def found(self, name: str, fd: int) -> ReadAt | None:
        """How to read what stands in a file already; None where nothing can."""

    def lend(self, name: str, fd: int) -> Path:
        """Close a file so that other processes can write into it; where it is."""

    def take_back(self, name: str, path: Path) -> int:
        """Open a file again that was lent."""

    def seal(self, name: str, fd: int) -> None: ...

    def settle(self) -> None:
        """Wait until every file that was sealed has its name."""

    def halt(self) -> None:
        """Let every thread that waits end: the transfer failed."""

    def write(self, name: str, data: bytes) -> None: ...

    def commit(self) -> None: ...


def copy(folder: Output, name: str, source: Source) -> str:
    """Copy a file of the base model; the xxh3-128 of its bytes, so that none is read twice.

    Raises `IncompleteError` where it becomes shorter.
    """
    hasher = xxhash.xxh3_128()
    number = folder.create(name, source.size)
    for start in range(0, source.size, _COPY_PIECE):
        data = source.read(start, min(_COPY_PIECE, source.size - start))
        hasher.update(data)
        folder.put(name, number, memoryview(data), start)
    folder.seal(name, number)
    return hasher.hexdigest()


def put_text(folder: Output, name: str, text: bytes | Packed) -> None:
    """Write a file whose bytes are known, a large one some at a time."""
    if isinstance(text, bytes):
        folder.write(name, text)
        return
    number, at = folder.create(name, text.nbytes), 0
    for piece in pieces(text):
        folder.put(name, number, memoryview(piece), at, known=True)
        at += len(piece)
    folder.seal(name, number)
