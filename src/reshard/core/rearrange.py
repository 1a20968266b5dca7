"""Cut, join and transpose tensors without touching a byte, by mapping boxes onto boxes.

Experts that one layout stacks and another lists, gate and up projections that one layout fuses,
vocabulary rows that were added: each is another arrangement of the same bytes. All functions return
entries whose boxes tile them again; the engine does not need to know about it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from msgspec.structs import replace

from reshard.core.dtypes import DType
from reshard.core.strides import blocks, contiguous_strides, span
from reshard.core.tensors import Box, Entry, Fragment, Shape, TensorSpec, flat, whole
from reshard.errors import PlanError


def crop(entry: Entry, box: Box) -> Entry:
    """The elements of `box` (over the tensor's own shape) as a tensor of shape `box.sizes`."""
    if box.shape != entry.spec.shape:
        raise PlanError(
            f"a cut made for shape {box.shape} meets shape {entry.spec.shape}.",
            tensor=entry.spec.name,
        )
    fragments = []
    for fragment in unflatten(entry).fragments:
        shared = fragment.box.intersect(box) if box.numel else None
        if shared is not None:
            moved = tuple(o - start for o, start in zip(shared.offsets, box.offsets, strict=True))
            fragments.append(
                replace(cut(fragment, shared), box=Box(box.sizes, moved, shared.sizes))
            )
    return _entry(entry, box.sizes, fragments)


def select(entry: Entry, index: int) -> Entry:
    """`tensor[index]`: one row of the first dimension, without that dimension."""
    shape = entry.spec.shape
    sizes = (1, *shape[1:])
    row = crop(entry, Box(shape, (index,) + (0,) * (len(shape) - 1), sizes))
    return _entry(row, shape[1:], [_drop_first(fragment) for fragment in row.fragments])


def rows(entry: Entry) -> list[Entry]:
    """Every row of the first dimension, as `select` takes it, in one pass over the fragments."""
    entry = unflatten(entry)
    holders: list[list[Fragment]] = [[] for _ in range(entry.spec.shape[0])]
    for fragment in entry.fragments:
        first = fragment.box.offsets[0]
        for row in range(first, first + fragment.box.sizes[0]):
            holders[row].append(fragment)
    return [
        select(replace(entry, fragments=tuple(fragments)), row)
        for row, fragments in enumerate(holders)
    ]


def transpose(entry: Entry, dim0: int, dim1: int) -> Entry:
    """The tensor with two dimensions exchanged; its elements stay where they lie."""
    order = list(range(len(entry.spec.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]

    def turn(values: Shape) -> Shape:
        return tuple(values[dim] for dim in order)

    fragments = []
    for fragment in unflatten(entry).fragments:
        box = fragment.box
        strides = fragment.strides or contiguous_strides(box.sizes)
        turned = Box(turn(box.shape), turn(box.offsets), turn(box.sizes))
        fragments.append(
            replace(fragment, box=turned, strides=_simplify(turned.sizes, turn(strides)))
        )
    return _entry(entry, turn(entry.spec.shape), fragments)


def reshape(entry: Entry, shape: Shape) -> Entry:
    """The same elements, in row-major order, as a tensor of another shape.

    Raises `PlanError` where one of its parts is not stored contiguously.
    """
    if math.prod(shape) != entry.spec.numel:
        raise PlanError(
            f"shape {entry.spec.shape} cannot be seen as {shape}.", tensor=entry.spec.name
        )
    numel = entry.spec.numel
    fragments = []
    for fragment in entry.fragments:
        box = fragment.box
        start = sum(o * s for o, s in zip(box.offsets, contiguous_strides(box.shape), strict=True))
        if fragment.strides is not None or not _is_run(box):
            raise PlanError("one of its parts is not contiguous.", tensor=entry.spec.name)
        fragments.append(replace(fragment, box=flat(numel, start, box.numel)))
    return unflatten(_entry(entry, shape, fragments))


def reinterpret(entry: Entry, dtype: DType) -> Entry:
    """The same bytes as a tensor of another dtype with elements of the same size."""
    fragments = tuple(replace(fragment, dtype=dtype) for fragment in entry.fragments)
    return replace(entry, spec=replace(entry.spec, dtype=dtype), fragments=fragments)


def concat(entries: Sequence[Entry], dim: int) -> Entry:
    """The tensors joined along an existing dimension; all other sizes and dtypes must agree."""
    first = entries[0]
    for other in entries[1:]:
        if _without(other.spec.shape, dim) != _without(first.spec.shape, dim):
            raise PlanError(
                f"shapes {first.spec.shape} and {other.spec.shape} cannot be joined along "
                f"dimension {dim}.",
                tensor=other.spec.name,
            )
        if other.spec.dtype != first.spec.dtype:
            raise PlanError(
                f"dtypes {first.spec.dtype} and {other.spec.dtype} cannot be joined.",
                tensor=other.spec.name,
            )
    total = sum(entry.spec.shape[dim] for entry in entries)
    shape = (*first.spec.shape[:dim], total, *first.spec.shape[dim + 1 :])
    fragments = []
    start = 0
    for entry in entries:
        for fragment in unflatten(entry).fragments:
            offsets = list(fragment.box.offsets)
            offsets[dim] += start
            box = Box(shape, tuple(offsets), fragment.box.sizes)
            fragments.append(replace(fragment, box=box))
        start += entry.spec.shape[dim]
    return _entry(first, shape, fragments)


def stack(entries: Sequence[Entry]) -> Entry:
    """The tensors as rows of a new first dimension."""
    return concat([_add_first(entry) for entry in entries], 0)


def cut(fragment: Fragment, box: Box) -> Fragment:
    """The part of a fragment that holds `box`, which must lie inside the fragment's box."""
    strides = fragment.strides or contiguous_strides(fragment.box.sizes)
    start = sum(
        (offset - origin) * stride
        for offset, origin, stride in zip(box.offsets, fragment.box.offsets, strides, strict=True)
    )
    itemsize = fragment.dtype.itemsize
    kept = _simplify(box.sizes, strides)
    extent = replace(
        fragment.extent,
        offset=fragment.extent.offset + start * itemsize,
        nbytes=span(box.sizes, kept) * itemsize,
    )
    return Fragment(box, extent, fragment.dtype, kept)


def unflatten(entry: Entry) -> Entry:
    """The same tensor with boxes over its own shape, not over the flattened tensor."""
    shape = entry.spec.shape
    if not entry.fragments or entry.over == shape:
        return entry
    fragments = []
    for fragment in entry.fragments:
        (start,), (length,) = fragment.box.offsets, fragment.box.sizes
        for box in boxes_of_range(shape, start, start + length):
            at = sum(o * s for o, s in zip(box.offsets, contiguous_strides(shape), strict=True))
            run = Box(fragment.box.shape, (at,), (box.numel,))
            piece = cut(fragment, run)
            if piece.strides is not None:
                raise PlanError(
                    "a flat part whose elements do not follow each other cannot be rearranged.",
                    tensor=entry.spec.name,
                )
            fragments.append(replace(piece, box=box))
    return replace(entry, fragments=tuple(fragments))


def boxes_of_range(shape: Shape, start: int, stop: int) -> Iterator[Box]:
    """Elements `[start, stop)` of the flattened array as boxes, ascending; 2 * ndim - 1 at most."""
    if start >= stop:
        return
    if not shape:
        yield whole(shape)
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        for box in boxes_of_range(shape[1:], start - first * inner, stop - first * inner):
            yield Box(shape, (first, *box.offsets), (1, *box.sizes))
        return
    full = -(-start // inner)
    end = stop // inner
    if full > first:
        yield from boxes_of_range(shape, start, full * inner)
    if end > full:
        tail = len(shape) - 1
        yield Box(shape, (full, *(0,) * tail), (end - full, *shape[1:]))
    if end * inner < stop:
        yield from boxes_of_range(shape, end * inner, stop)


def blocks_of_range(shape: Shape, start: int, stop: int, max_numel: int) -> Iterator[Box]:
    """The same as boxes of at most `max_numel` elements, each one unbroken run."""
    for box in boxes_of_range(shape, start, stop):
        for block in blocks(box.sizes, max_numel):
            offsets = tuple(a + b for a, b in zip(box.offsets, block.offsets, strict=True))
            yield Box(shape, offsets, block.sizes)


def _entry(like: Entry, shape: Shape, fragments: Sequence[Fragment]) -> Entry:
    spec = TensorSpec(like.spec.name, like.spec.dtype, shape)
    return Entry(spec, tuple(fragments), like.kind)


def _is_run(box: Box) -> bool:
    """Whether its elements follow each other in the row-major array: single indices, then one
    range, then dimensions in full."""
    sizes, shape = box.sizes, box.shape
    cut = next((dim for dim, size in enumerate(sizes) if size != 1), len(sizes))
    return sizes[cut + 1 :] == shape[cut + 1 :]


def _simplify(sizes: Shape, strides: Shape) -> Shape | None:
    """None where the strides are those of a row-major array; the stride of a size of 1 is moot."""
    expected = contiguous_strides(sizes)
    same = all(
        n == 1 or have == want for n, have, want in zip(sizes, strides, expected, strict=True)
    )
    return None if same else strides


def _drop_first(fragment: Fragment) -> Fragment:
    box = fragment.box
    strides = None if fragment.strides is None else fragment.strides[1:]
    inner = Box(box.shape[1:], box.offsets[1:], box.sizes[1:])
    return replace(fragment, box=inner, strides=strides)


def _add_first(entry: Entry) -> Entry:
    fragments = []
    for fragment in unflatten(entry).fragments:
        box = fragment.box
        strides = fragment.strides
        if strides is not None:
            strides = (1, *strides)
        outer = Box((1, *box.shape), (0, *box.offsets), (1, *box.sizes))
        fragments.append(replace(fragment, box=outer, strides=strides))
    return _entry(entry, (1, *entry.spec.shape), fragments)


def _without(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]
