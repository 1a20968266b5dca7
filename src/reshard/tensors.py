"""Tensors as byte ranges: which elements of a tensor lie in which bytes of which file.

A tensor is an `Entry`: its name, dtype and shape, and the `Fragment`s that hold its elements. A
fragment says *which* elements by a `Box` and *where* by an `Extent`. Everything in this module is
plain data and pure functions; nothing opens a file.

    tensor [4, 6] over two ranks           box of rank 1                extent of rank 1
    FSDP, rows:      0 0 0 0 0 0           shape (4, 6)                 rank1.distcp
                     0 0 0 0 0 0           offsets (2, 0)               [offset, offset + 12 * item)
                     1 1 1 1 1 1           sizes (2, 6)
                     1 1 1 1 1 1
    ZeRO, flat:      0 ... 0 1 ... 1       shape (24,) offsets (13,)    zero_pp_rank_1_...pt
                                           sizes (11,)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from reshard.dtypes import DType

Shape = tuple[int, ...]
Kind = Literal["parameter", "buffer", "frozen", "tied"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, element type and shape."""

    name: str
    dtype: DType
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file of the checkpoint and how to open it; extents count in what opening gives.

    `path` is absolute. `codec` is None for a plain file; otherwise bytes
    `[frame_offset, frame_offset + frame_nbytes)` of the file are one frame of that compression
    (`"zstd"`), and an extent's offset counts in the decompressed bytes.
    """

    path: str
    codec: str | None = None
    frame_offset: int = 0
    frame_nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes `[offset, offset + nbytes)` of a file."""

    file: FileRef
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Record:
    """A stretch of a file whose CRC-32 the file itself states (an entry of a zip archive)."""

    extent: Extent
    crc32: int


@dataclass(frozen=True, slots=True)
class Box:
    """Elements `[offsets, offsets + sizes)` of a row-major array of `shape`.

    `shape` is the tensor's own shape, or `(numel,)`: then the box is a range of the flattened
    tensor, as ZeRO partitions and FSDP1 flat parameters are.
    """

    shape: Shape
    offsets: Shape
    sizes: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The elements in both boxes, or None. Both must be over the same `shape`.

        >>> Box((10,), (0,), (6,)).intersect(Box((10,), (4,), (6,)))
        Box(shape=(10,), offsets=(4,), sizes=(2,))
        """
        offsets = tuple(map(max, self.offsets, other.offsets))
        sizes = tuple(
            min(a + m, b + n) - o
            for a, m, b, n, o in zip(
                self.offsets, self.sizes, other.offsets, other.sizes, offsets, strict=True
            )
        )
        if any(size <= 0 for size in sizes):
            return None
        return Box(self.shape, offsets, sizes)


def whole(shape: Shape) -> Box:
    """The box that holds every element of `shape`."""
    return Box(shape, (0,) * len(shape), shape)


def flat(numel: int, start: int, length: int) -> Box:
    """Elements `[start, start + length)` of a tensor of `numel` elements, flattened row-major."""
    return Box((numel,), (start,), (length,))


def contiguous_strides(sizes: Sequence[int]) -> Shape:
    """Row-major strides, in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class Fragment:
    """A part of a tensor: the elements of `box` lie in `extent` as `dtype`.

    `strides` (elements, one for each dimension of the box) is None where the elements lie in
    row-major order without gaps; element `i` (relative to the box) then lies at
    `extent.offset + sum(i * strides) * dtype.itemsize`.
    """

    box: Box
    extent: Extent
    dtype: DType
    strides: Shape | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a catalog. Its fragments' boxes tile it exactly: `check_tiling` proves it.

    All boxes of one entry are over the same shape: the tensor's, or `(numel,)`. `aliases` are
    the other names of the same weights (tied parameters).
    """

    spec: TensorSpec
    fragments: tuple[Fragment, ...]
    kind: Kind = "parameter"
    aliases: tuple[str, ...] = ()

    def renamed(self, name: str) -> Entry:
        """The same tensor under another name."""
        return replace(self, spec=replace(self.spec, name=name))
