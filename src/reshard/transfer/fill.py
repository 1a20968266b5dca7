"""Filling one block of an output tensor from the fragments that hold it.

A block is an unbroken run of the tensor's row-major bytes (`tensors.blocks`). Where a fragment is
stored in that order and in the output's dtype, its bytes are read straight into the block;
otherwise they pass through a scratch buffer and are cast and spread from there. Computed tensors
are computed here, block by block.

A cast rounds to nearest even, as torch does. Where torch would turn a finite value into infinity
(70000 as float16, say), `fill` stops: such a model does not compute what was trained.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from types import EllipsisType
from typing import Any

import ml_dtypes
import numpy as np
from msgspec import Struct

from reshard.core.dtypes import FLOAT32, DType
from reshard.core.fragments import within
from reshard.core.rearrange import boxes_of_range, cut, unflatten
from reshard.core.strides import blocks, contiguous_strides
from reshard.core.tensors import (
    Box,
    Computed,
    Entry,
    Extent,
    Fragment,
    Portion,
    Shape,
    flat,
)
from reshard.errors import PlanError, VerificationError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger, PassedRun, join

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
    pieces. `bytes_read` counts what was read. `passed`, where it is a list, gets what was read of
    records.
    """

    sources: Sources
    ledger: Ledger
    scratch: memoryview
    bytes_read: int = 0
    passed: list[PassedRun] | None = None

    def read(self, extent: Extent, buffer: memoryview) -> None:
        """Fill `buffer`, of the extent's size, and note the bytes for their checksum."""
        self.sources.open(extent.file).read_into(extent.offset, buffer)
        run = self.ledger.add(extent, buffer)
        self.bytes_read += extent.nbytes
        if run is not None and self.passed is not None:
            join(self.passed, run)


def fill(source: Entry, box: Box, out: Array, reader: Reader) -> None:
    """Write the elements of `box` into `out`, cast to its dtype.

    `box` is over the tensor's shape, or over `(numel,)`: then it is a range of the flattened
    tensor. `out` is one-dimensional and has `box.numel` elements. Raises `VerificationError` where
    a finite value is beyond the range of `out`'s dtype.
    """
    shape = source.spec.shape
    over = source.over
    if over == box.shape:
        _gather(source, box, out.reshape(box.sizes), reader)
    elif over == shape:
        (start,), done = box.offsets, 0
        for part in boxes_of_range(shape, start, start + box.numel):
            piece = out[done : done + part.numel].reshape(part.sizes)
            _gather(source, part, piece, reader)
            done += part.numel
    else:
        strides = contiguous_strides(box.shape)
        start = sum(o * s for o, s in zip(box.offsets, strides, strict=True))
        _gather(source, flat(source.spec.numel, start, box.numel), out, reader)


def _gather(entry: Entry, box: Box, view: Array, reader: Reader) -> None:
    """Fill an array of the box's sizes; the box is over the shape that the fragments' are over."""
    start = stop = 0
    if entry.over == (entry.spec.numel,):
        start, stop = box.offsets[0], box.offsets[0] + box.sizes[0]
    for fragment in within(entry, start, stop):
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


def _compute(source: Computed, part: Fragment, out: Array, reader: Reader, name: str) -> None:
    """Compute a part of the tensor `name` into an array of the same sizes, piece by piece."""

    def read(entry: Entry, box: Box, dtype: DType = FLOAT32, /) -> Array:
        values = np.empty(box.sizes, dtype.numpy)
        _gather(unflatten(entry), box, values, reader)
        return values

    for box, view in _views(source.shape, part, out):
        for piece in blocks(box.sizes, source.piece_numel):
            offsets = tuple(o + start for o, start in zip(box.offsets, piece.offsets, strict=True))
            values = source.values(Box(source.shape, offsets, piece.sizes), read)
            where = tuple(slice(o, o + n) for o, n in zip(piece.offsets, piece.sizes, strict=True))
            _cast(values, view[where], name)


def _views(shape: Shape, part: Fragment, out: Array) -> Iterator[tuple[Box, Array]]:
    """The boxes of an array of `shape` that a part of it is, each with its place in `out`.

    A part is a box of the array, of which dimensions may have been dropped, added or exchanged, or
    a run of the flattened array.
    """
    own = contiguous_strides(shape)
    start = part.extent.offset // part.dtype.itemsize
    first = [start // stride % max(size, 1) for stride, size in zip(own, shape, strict=True)]
    dim_of = {stride: dim for dim, stride in enumerate(own) if shape[dim] > 1}
    sizes = [1] * len(shape)
    order: list[tuple[int, int]] = []
    strides = part.strides or contiguous_strides(part.box.sizes)
    for axis, (size, stride) in enumerate(zip(part.box.sizes, strides, strict=True)):
        dim = dim_of.get(stride)
        if size == 1:
            continue
        if dim is None or first[dim] + size > shape[dim]:
            break
        sizes[dim] = size
        order.append((dim, axis))
    else:
        ones = [axis for axis, size in enumerate(part.box.sizes) if size == 1]
        view = out.transpose([*ones, *(axis for _, axis in sorted(order))])
        yield Box(shape, tuple(first), tuple(sizes)), view.reshape(sizes)
        return
    if part.strides is not None or not out.flags.c_contiguous:
        raise PlanError(f"its part {part.box} is not a box of the computed shape {shape}.")
    run, done = out.reshape(-1), 0
    for box in boxes_of_range(shape, start, start + part.box.numel):
        yield box, run[done : done + box.numel].reshape(box.sizes)
        done += box.numel


def _copy(part: Fragment, out: Array, reader: Reader, name: str) -> None:
    """Read, or compute, a part of the tensor `name` into an array of the same sizes."""
    stored, extent = part.dtype.numpy, part.extent
    if isinstance(extent, Portion):
        _compute(extent.source, part, out, reader, name)
        return
    if part.strides is None and out.flags.c_contiguous:
        run = out.reshape(-1)
        if stored == out.dtype:
            reader.read(extent, run.view(np.uint8).data)
        else:
            _copy_run(extent, stored, run, reader, name)
        return
    if extent.nbytes > len(reader.scratch):
        for half, place in _halves(part):
            _copy(half, out[place], reader, name)
        return
    raw = reader.scratch[: extent.nbytes]
    reader.read(extent, raw)
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
