"""Every rearrangement does to the described tensor what numpy does to the array."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from reshard.core import rearrange
from reshard.core.tensors import Box
from reshard.core.tiling import check_tiling
from reshard.testing.gathering import gather
from reshard.testing.strategies import Torn, solid_shapes, torn


@given(torn())
def test_unflatten_changes_nothing(case: Torn) -> None:
    entry = rearrange.unflatten(case.entry) if _plain(case) else case.entry
    check_tiling(entry)
    np.testing.assert_array_equal(gather(entry, case.files), case.array)


@given(torn(solid_shapes), st.data())
def test_crop(case: Torn, data: st.DataObject) -> None:
    ranges = []
    for size in case.array.shape:
        start = data.draw(st.integers(0, size))
        ranges.append((start, data.draw(st.integers(start, size))))
    box = Box(case.array.shape, tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))
    entry = rearrange.crop(case.entry, box)
    check_tiling(entry)
    expected = case.array[tuple(slice(a, b) for a, b in ranges)]
    np.testing.assert_array_equal(gather(entry, case.files), expected)


@given(torn(solid_shapes), st.data())
def test_select_and_stack_undo_each_other(case: Torn, data: st.DataObject) -> None:
    rows = [rearrange.select(case.entry, index) for index in range(case.array.shape[0])]
    for index, row in enumerate(rows):
        check_tiling(row)
        np.testing.assert_array_equal(gather(row, case.files), case.array[index])
    again = rearrange.stack(rows)
    check_tiling(again)
    np.testing.assert_array_equal(gather(again, case.files), case.array)


@given(torn(solid_shapes), st.data())
def test_transpose(case: Torn, data: st.DataObject) -> None:
    dims = st.integers(0, case.array.ndim - 1)
    one, other = data.draw(dims), data.draw(dims)
    entry = rearrange.transpose(case.entry, one, other)
    check_tiling(entry)
    np.testing.assert_array_equal(gather(entry, case.files), case.array.swapaxes(one, other))


@given(torn(solid_shapes), st.data())
def test_concat_joins_what_crop_cut(case: Torn, data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, case.array.ndim - 1))
    size = case.array.shape[dim]
    at = data.draw(st.integers(0, size))
    parts = []
    for start, stop in ((0, at), (at, size)):
        offsets = tuple(start if d == dim else 0 for d in range(case.array.ndim))
        sizes = tuple(stop - start if d == dim else n for d, n in enumerate(case.array.shape))
        parts.append(rearrange.crop(case.entry, Box(case.array.shape, offsets, sizes)))
    entry = rearrange.concat(parts, dim)
    check_tiling(entry)
    np.testing.assert_array_equal(gather(entry, case.files), case.array)


def _plain(case: Torn) -> bool:
    return all(fragment.strides is None for fragment in case.entry.fragments)
