"""A large file whose bytes are known, held compressed until it is written.

`.metadata` of 200,000 tensors has 60 MB, which would be held while they are converted. It repeats
itself: 3 MB are left of it, in 0.3 s.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct
from zlib_ng import zlib_ng

# Bytes that are compressed at a time.
_PIECE = 1 << 20
# The fastest.
_LEVEL = 1


class Packed(Struct, frozen=True):
    """`nbytes` bytes, in pieces that are compressed one by one."""

    nbytes: int
    pieces: tuple[bytes, ...]

    def __len__(self) -> int:
        return self.nbytes


class Packing:
    """Bytes as they are made, from front to back."""

    def __init__(self) -> None:
        self._nbytes = 0
        self._packed: list[bytes] = []
        self._last = bytearray()

    def add(self, data: bytes | bytearray) -> None:
        """Append bytes."""
        self._nbytes += len(data)
        self._last += data
        if len(self._last) >= _PIECE:
            self._packed.append(zlib_ng.compress(self._last, _LEVEL))
            self._last = bytearray()

    def done(self) -> bytes | Packed:
        """All of them; as they are, where they are few."""
        if not self._packed:
            return bytes(self._last)
        return Packed(self._nbytes, (*self._packed, zlib_ng.compress(self._last, _LEVEL)))


def pieces(text: bytes | Packed) -> Iterator[bytes]:
    """The bytes, some at a time."""
    if isinstance(text, Packed):
        yield from map(zlib_ng.decompress, text.pieces)
    else:
        yield text
