"""Boxes, blocks and the tiling proof, against numpy and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from reshard.core.dtypes import FLOAT32
from reshard.core.strides import blocks
from reshard.core.tensors import (
    Box,
    Entry,
    Extent,
    FileRef,
    Fragment,
    TensorSpec,
    flat,
    whole,
)
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError
from reshard.testing.gathering import gather
from reshard.testing.strategies import Torn, shapes, solid_shapes, torn


@given(shapes, st.integers(1, 40))
def test_blocks_are_unbroken_runs_in_order(shape: tuple[int, ...], limit: int) -> None:
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    runs = []
    for box in blocks(shape, limit):
        slices = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        run = numbers[slices].reshape(-1)
        assert 0 < run.size <= max(limit, 1)
        runs.append(run)
    joined = np.concatenate(runs) if runs else np.zeros(0, np.int64)
    np.testing.assert_array_equal(joined, numbers.reshape(-1))


@given(torn())
def test_a_torn_tensor_tiles(case: Torn) -> None:
    check_tiling(case.entry)
    np.testing.assert_array_equal(gather(case.entry, case.files), case.array)


@given(torn(solid_shapes), st.data())
def test_a_missing_part_is_a_hole(case: Torn, data: st.DataObject) -> None:
    fragments = [f for f in case.entry.fragments if f.box.numel]
    gone = data.draw(st.sampled_from(fragments))
    rest = tuple(f for f in case.entry.fragments if f is not gone)
    with pytest.raises(IncompleteError, match="elements are in the checkpoint"):
        check_tiling(replace(case.entry, fragments=rest))


@given(torn(solid_shapes), st.data())
def test_a_part_that_occurs_twice_overlaps(case: Torn, data: st.DataObject) -> None:
    fragments = [f for f in case.entry.fragments if f.box.numel]
    twice = data.draw(st.sampled_from(fragments))
    with pytest.raises(FormatError, match="hold the same elements"):
        check_tiling(replace(case.entry, fragments=(*case.entry.fragments, twice)))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=5))
def test_overlap_agrees_with_counting(corners: list[tuple[int, int]]) -> None:
    """Random boxes of 2 x 2 in a 5 x 5 tensor: refused exactly when a cell is counted twice."""
    counts = np.zeros((5, 5), int)
    fragments = []
    for row, column in corners:
        counts[row : row + 2, column : column + 2] += 1
        box = Box((5, 5), (row, column), (2, 2))
        fragments.append(Fragment(box, Extent(FileRef("/f"), 0, 16), FLOAT32))
    entry = Entry(TensorSpec("t", FLOAT32, (5, 5)), tuple(fragments))
    expected = FormatError if counts.max() > 1 else IncompleteError
    with pytest.raises(expected):
        check_tiling(entry)


@pytest.mark.parametrize(
    "box",
    [
        Box((4,), (2,), (3,)),
        Box((4,), (-1,), (3,)),
        Box((5,), (0,), (4,)),
        flat(4, 0, 2),
    ],
)
def test_a_box_outside_or_of_another_size_is_refused(box: Box) -> None:
    fragment = Fragment(box, Extent(FileRef("/f"), 0, 12), FLOAT32)
    with pytest.raises(FormatError):
        check_tiling(Entry(TensorSpec("t", FLOAT32, (4,)), (fragment,)))


def test_an_empty_and_a_scalar_tensor_tile() -> None:
    check_tiling(Entry(TensorSpec("empty", FLOAT32, (0, 3)), ()))
    fragment = Fragment(whole(()), Extent(FileRef("/f"), 0, 4), FLOAT32)
    check_tiling(Entry(TensorSpec("scalar", FLOAT32, ()), (fragment,)))
