"""Filling one block of an output tensor from the fragments that hold it.

A block is an unbroken run of the tensor's row-major bytes (`tensors.blocks`). Where a fragment is
stored in that order and in the target's dtype, its bytes are read straight into the block;
otherwise they pass through a scratch buffer and are cast and spread from there. A low-rank update
is merged block by block on the way.

A cast rounds to nearest even, as torch does. Where torch would turn a finite value into infinity
(70000 as float16, say), `fill` stops: such a model does not compute what was trained.
"""

from __future__ import annotations

import mmap
import threading
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct

from reshard.core.rearrange import crop, cut
from reshard.core.tensors import (
    Box,
    Entry,
    Extent,
    Fragment,
    LowRank,
    Made,
    Shape,
    contiguous_strides,
    flat,
    whole,
)
from reshard.errors import VerificationError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger

Array = np.ndarray[Any, Any]

# Bytes of source cast at once: read, checksummed and cast while they are in a core's second-level
# cache (1 to 2 MiB on servers). Blocks of 8 MiB at once made conversions 5 to 10% slower.
_PIECE = 1 << 20


def page_aligned(nbytes: int) -> Array:
    """A buffer of `nbytes` bytes that begins with a page of memory; its bytes are not set.

    numpy's own large arrays begin 16 bytes into a page. Reading a file to a place that lies 1 to 31
    bytes later in its page than the bytes do in theirs took two to five times as long (AMD EPYC,
    where the kernel copies with `rep movsb`), and so did writing. Tensors that begin with a page
    of their file are common: 64-byte alignment gives every 64th.
    """
    room = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
    start = -room.ctypes.data % mmap.PAGESIZE
    return room[start : start + nbytes]


class Reader(Struct):
    """Reads extents into a scratch buffer of bounded size; one a thread.

    `scratch` bounds the bytes held for one read; a strided part that reaches further is read in
    pieces. `bytes_read` counts what was read.
    """

    sources: Sources
    ledger: Ledger
    scratch: memoryview
    bytes_read: int = 0

    def read(self, extent: Extent, target: memoryview) -> None:
        """Fill `target`, of the extent's size, and note the bytes for their checksum."""
        self.sources.open(extent.file).read_into(extent.offset, target)
        self.ledger.add(extent, target)
        self.bytes_read += extent.nbytes


def fill(source: Made, box: Box, out: Array, reader: Reader) -> None:
    """Write the elements of `box` (over the tensor's shape) into `out`, cast to its dtype.

    `out` is one-dimensional and has `box.numel` elements. Raises `VerificationError` where a
    finite value is beyond the range of `out`'s dtype.
    """
    if isinstance(source, LowRank):
        _cast(_merged(source, box, reader), out, source.spec.name)
    else:
        _gather(source, box, out, reader)


def _merged(update: LowRank, box: Box, reader: Reader) -> Array:
    """The elements of `box` of a matrix with its low-rank update, in float32.

    Holds three times the block in float32, and the columns of `right` that it meets; with a
    magnitude, whole rows of them.
    """
    (row, column), (rows, columns) = box.offsets, box.sizes
    if update.magnitude is None:
        return _sum(update, box, reader).reshape(-1)
    if update.by_column:
        scales = _COLUMN_SCALES.of(update.whole or update, update.magnitude, reader.sources)
        return (_sum(update, box, reader) * scales[column : column + columns]).reshape(-1)
    width = update.spec.shape[1]
    whole_rows = _sum(update, Box(box.shape, (row, 0), (rows, width)), reader)
    scale = np.empty(rows, np.float32)
    magnitude = flat(update.spec.shape[0], row, rows)
    _gather(crop(update.magnitude, magnitude), whole((rows,)), scale, reader)
    scale /= np.linalg.norm(whole_rows, axis=1)
    return (whole_rows[:, column : column + columns] * scale[:, None]).reshape(-1)


# Elements of a matrix that are summed at once for the norms of its columns.
_NORM_BLOCK = 1 << 20


class _ColumnScales:
    """Magnitude over norm for each column of a matrix, which is read once more for it.

    Those of the last matrix are kept: its blocks are filled one after another, by several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[LowRank, Array] | None = None

    def of(self, update: LowRank, magnitude: Entry, sources: Sources) -> Array:
        with self._lock:
            if self._last is None or self._last[0] is not update:
                self._last = (update, _column_scales(update, magnitude, sources))
            return self._last[1]


_COLUMN_SCALES = _ColumnScales()


def _column_scales(update: LowRank, magnitude: Entry, sources: Sources) -> Array:
    rows, width = update.spec.shape
    reader = Reader(sources, Ledger(()), page_aligned(_PIECE).data)
    squares = np.zeros(width, np.float64)
    step = max(1, _NORM_BLOCK // max(width, 1))
    for row in range(0, rows, step):
        box = Box(update.spec.shape, (row, 0), (min(step, rows - row), width))
        squares += np.square(_sum(update, box, reader), dtype=np.float64).sum(axis=0)
    scales = np.empty(width, np.float32)
    _gather(magnitude, whole((width,)), scales, reader)
    scales /= np.sqrt(squares).astype(np.float32)
    return scales


def _sum(update: LowRank, box: Box, reader: Reader) -> Array:
    """The elements of `box` of the base and its update added up, in float32."""
    (row, column), (rows, columns) = box.offsets, box.sizes
    sum_ = _matrix(update.base, (row, column), (rows, columns), reader)
    left = _matrix(update.left, (row, 0), (rows, update.rank), reader)
    right = _matrix(update.right, (0, column), (update.rank, columns), reader)
    delta = left @ right
    delta *= np.float32(update.scaling)
    sum_ += delta
    return sum_


def _matrix(entry: Entry, offsets: Shape, sizes: Shape, reader: Reader) -> Array:
    """A part of a stored matrix, in float32."""
    part = crop(entry, Box(entry.spec.shape, offsets, sizes))
    out = np.empty(part.spec.numel, np.float32)
    _gather(part, whole(sizes), out, reader)
    return out.reshape(sizes)


def _gather(entry: Entry, box: Box, out: Array, reader: Reader) -> None:
    over = entry.fragments[0].box.shape
    if over != box.shape:
        strides = contiguous_strides(box.shape)
        start = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
        box = flat(entry.spec.numel, start, box.numel)
    view = out.reshape(box.sizes)
    for fragment in entry.fragments:
        shared = fragment.box.intersect(box)
        if shared is None:
            continue
        # The ellipsis keeps a 0-d view a view; `view[()]` would be a copied scalar.
        where: tuple[slice | EllipsisType, ...] = (
            *(
                slice(o - origin, o - origin + size)
                for o, origin, size in zip(shared.offsets, box.offsets, shared.sizes, strict=True)
            ),
            ...,
        )
        plain = shared == fragment.box and fragment.strides is None
        part = fragment if plain else cut(fragment, shared)
        _copy(part, view[where], reader, entry.spec.name)


def _copy(part: Fragment, out: Array, reader: Reader, name: str) -> None:
    """Read a part of the tensor `name` into an array of the same sizes."""
    stored = part.dtype.numpy
    if part.strides is None and out.flags.c_contiguous:
        run = out.reshape(-1)
        if stored == out.dtype:
            reader.read(part.extent, run.view(np.uint8).data)
        else:
            _copy_run(part.extent, stored, run, reader, name)
        return
    if part.extent.nbytes > len(reader.scratch):
        for half, place in _halves(part):
            _copy(half, out[place], reader, name)
        return
    raw = reader.scratch[: part.extent.nbytes]
    reader.read(part.extent, raw)
    strides = part.strides or contiguous_strides(part.box.sizes)
    array: Array = np.ndarray(
        part.box.sizes, stored, raw, strides=[stride * stored.itemsize for stride in strides]
    )
    _cast(array, out, name)


def _copy_run(extent: Extent, stored: np.dtype[Any], out: Array, reader: Reader, name: str) -> None:
    """Read the elements of an extent, in order, and cast them into `out`, piece by piece."""
    count = min(_PIECE, len(reader.scratch)) // stored.itemsize
    for start in range(0, len(out), count):
        piece = out[start : start + count]
        raw = reader.scratch[: len(piece) * stored.itemsize]
        reader.read(Extent(extent.file, extent.offset + start * stored.itemsize, len(raw)), raw)
        _cast(np.frombuffer(raw, stored), piece, name)


def _cast(values: Array, out: Array, name: str) -> None:
    """Copy `values` into `out`, cast to its dtype; an overflow is an error."""
    # numpy warns of some overflows and not of ml_dtypes'; all are looked for below. "invalid" is
    # a signalling NaN, which stays a NaN.
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(out, values, casting="unsafe")
        if values.dtype == out.dtype or not _holds_infinity(out):
            return
        overflowed = np.isinf(out) & np.isfinite(values)
    if overflowed.any():
        first, largest = float(values[overflowed][0]), float(ml_dtypes.finfo(out.dtype).max)
        raise VerificationError(
            f"it holds {first:g}, and the largest {out.dtype} is {largest:g}.",
            tensor=name,
            hint="Pass --dtype keep, or a dtype of wider range.",
        )


# The integers of the same width, by item size in bytes.
_BITS = {2: (np.int16, np.uint16), 4: (np.int32, np.uint32), 8: (np.int64, np.uint64)}


def _holds_infinity(array: Array) -> bool:
    """Whether an array of a floating type with infinities may hold one (or a NaN).

    Seen as integers, infinities and NaNs are the largest signed values (sign bit clear) and the
    largest unsigned ones (sign bit set): two maxima, a tenth of the time of the cast itself
    (0.09 ms for 2 Mi elements; `isinf` takes 1.4 ms on bfloat16 and 12 ms on float16).
    """
    if not array.size or array.dtype.itemsize not in _BITS:
        return False
    signed, unsigned = _BITS[array.dtype.itemsize]
    plus, minus = np.array([np.inf, -np.inf], array.dtype).view(unsigned)
    return bool(array.view(signed).max() >= plus or array.view(unsigned).max() >= minus)


def _halves(part: Fragment) -> list[tuple[Fragment, tuple[slice, ...]]]:
    """The part cut in two across its longest stride, each with its place in the whole."""
    box = part.box
    strides = part.strides or contiguous_strides(box.sizes)
    reach = [(size > 1, stride) for size, stride in zip(box.sizes, strides, strict=True)]
    dim = reach.index(max(reach))
    middle = box.sizes[dim] // 2
    halves = []
    for start, stop in ((0, middle), (middle, box.sizes[dim])):
        offsets, sizes = list(box.offsets), list(box.sizes)
        offsets[dim] += start
        sizes[dim] = stop - start
        place = (slice(None),) * dim + (slice(start, stop),)
        halves.append((cut(part, Box(box.shape, tuple(offsets), tuple(sizes))), place))
    return halves
