"""Arrays in row-major order: their strides, how far these reach, and blocks of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from reshard.core.tensors import Box, Shape, whole


def contiguous_strides(sizes: Sequence[int]) -> Shape:
    """Row-major strides, in elements.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    strides = [1] * len(sizes)
    for dim in range(len(sizes) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * max(sizes[dim + 1], 1)
    return tuple(strides)


def span(sizes: Shape, strides: Shape | None) -> int:
    """Elements from the first to the last that `sizes` and `strides` reach, both counted."""
    if math.prod(sizes) == 0:
        return 0
    if strides is None:
        return math.prod(sizes)
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def blocks(shape: Shape, max_numel: int) -> Iterator[Box]:
    """Cut a row-major array into boxes of at most `max_numel` elements, in ascending order.

    Each box is one unbroken run of the flattened array: full in all trailing dimensions, a range
    in one, a single index in those before it.

    >>> [box.offsets for box in blocks((4, 3), 6)]
    [(0, 0), (2, 0)]
    """
    if math.prod(shape) == 0:
        return
    cut, inner = len(shape), 1
    while cut > 0 and inner * shape[cut - 1] <= max_numel:
        cut -= 1
        inner *= shape[cut]
    if cut == 0:
        yield whole(shape)
        return
    dim = cut - 1
    step = max(1, max_numel // inner)
    tail = len(shape) - cut
    for outer in _indices(shape[:dim]):
        for start in range(0, shape[dim], step):
            sizes = (1,) * dim + (min(step, shape[dim] - start),) + shape[cut:]
            yield Box(shape, (*outer, start) + (0,) * tail, sizes)


def _indices(shape: Shape) -> Iterator[Shape]:
    """Every index of an array of `shape`, in row-major order."""
    if not shape:
        yield ()
        return
    for outer in _indices(shape[:-1]):
        for last in range(shape[-1]):
            yield (*outer, last)
