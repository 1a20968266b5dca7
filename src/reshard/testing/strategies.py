"""hypothesis strategies: tensors, and ways in which frameworks tear them apart.

>>> @given(torn())                                                    # doctest: +SKIP
... def test_my_reader(torn: Torn) -> None: ...
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from hypothesis import strategies as st
from msgspec import Struct

from reshard.core.dtypes import FLOAT32
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Box, Entry, Extent, FileRef, Fragment, TensorSpec


class Torn(Struct, frozen=True, dict=True):
    """A tensor, the entry that describes its pieces, and the files that hold them."""

    array: np.ndarray[Any, Any]
    entry: Entry
    files: dict[str, bytes]


_Shapes = st.SearchStrategy[tuple[int, ...]]
shapes: _Shapes = st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple)
solid_shapes: _Shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


def _cuts(size: int) -> st.SearchStrategy[list[int]]:
    inner = st.lists(st.integers(0, size), max_size=3)
    return inner.map(lambda cuts: sorted({0, size, *cuts}))


@st.composite
def torn(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, ...]] = shapes) -> Torn:
    """A tensor torn into a grid of boxes or into flat ranges, some of them stored transposed."""
    shape = draw(shapes)
    array: np.ndarray[Any, Any] = np.arange(1, 1 + int(np.prod(shape)), dtype=np.float32).reshape(
        shape
    )
    over = (array.size,) if draw(st.booleans()) else shape
    view = array.reshape(over)
    grid = [list(itertools.pairwise(draw(_cuts(size)))) for size in over]
    files: dict[str, bytes] = {}
    fragments = []
    for number, ranges in enumerate(itertools.product(*grid)):
        offsets = tuple(start for start, _ in ranges)
        sizes = tuple(stop - start for start, stop in ranges)
        piece = view[tuple(slice(start, stop) for start, stop in ranges)]
        order = draw(st.permutations(range(len(sizes))))
        stored = np.ascontiguousarray(piece.transpose(order)).tobytes()
        stored_strides = contiguous_strides([sizes[dim] for dim in order])
        strides: tuple[int, ...] | None = tuple(
            stored_strides[order.index(dim)] for dim in range(len(sizes))
        )
        if strides == contiguous_strides(sizes):
            strides = None
        before = draw(st.integers(0, 9))
        path = f"/file{number % 3}"
        extent = Extent(FileRef(path), len(files.get(path, b"")) + before, len(stored))
        files[path] = files.get(path, b"") + b"\xff" * before + stored
        fragments.append(Fragment(Box(over, offsets, sizes), extent, FLOAT32, strides))
    mixed = draw(st.permutations(fragments))
    return Torn(array, Entry(TensorSpec("t", FLOAT32, shape), tuple(mixed)), files)
