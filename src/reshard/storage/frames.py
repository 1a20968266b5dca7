"""Compressed frames: a stretch of a file, decompressed piece by piece.

A frame of a few bytes may claim to hold terabytes. No piece is larger than `_PIECE`, and the caller
decides when there are too many pieces.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from reshard.core.tensors import FileRef
from reshard.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

#: Fills a buffer from an offset on, as far as there is anything; returns the number of bytes.
ReadSome = Callable[[int, memoryview], int]
# Bytes of a decompressed piece.
_PIECE = 1 << 20


def pieces(read: ReadSome, ref: FileRef) -> Iterator[bytes]:
    """The decompressed bytes of the frame that `ref` names in the file that `read` reads.

    Raises `UnsupportedError` (a codec that is not supported or not installed), `FormatError`
    (damaged). A frame that is cut off gives fewer bytes.
    """
    codec = _CODECS.get(ref.codec or "")
    if codec is None:
        raise UnsupportedError(f"compression {ref.codec!r} is not supported.", path=ref.path)
    return codec(read, ref)


class _Frame(io.RawIOBase):
    """The frame's compressed bytes as a stream; it reads by position and owns no descriptor."""

    def __init__(self, read: ReadSome, ref: FileRef) -> None:
        super().__init__()
        self._read = read
        self._position = ref.frame_offset
        self._end = ref.frame_offset + ref.frame_nbytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)[: self._end - self._position]
        read = self._read(self._position, view)
        self._position += read
        return read


def _zstd(read: ReadSome, ref: FileRef) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise UnsupportedError(
            "the checkpoint is compressed with zstd.",
            path=ref.path,
            hint="Install the extra, in reshard's folder: pip install '.[zstd]'.",
        ) from None
    stream = io.BufferedReader(_Frame(read, ref), _PIECE)
    try:
        # Its memory is the frame's window, which the library limits to 128 MiB.
        with zstandard.ZstdDecompressor().stream_reader(stream) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise FormatError(
            f"its zstd frame is damaged: {error}.",
            path=ref.path,
            hint="Copy the file again or use another checkpoint.",
        ) from None


_CODECS: dict[str, Callable[[ReadSome, FileRef], Iterator[bytes]]] = {"zstd": _zstd}
