"""The tiling proof: right for any layout, against counting, and in linear time."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reshard.core import tiling
from reshard.core.dtypes import UINT8
from reshard.core.tensors import Box, Entry, Extent, FileRef, Fragment, Shape, TensorSpec
from reshard.core.tiling import check_tiling, is_grid, overlapping, tiles
from reshard.errors import FormatError, IncompleteError, ReshardError

FILE = FileRef("/f")


def entry_of(boxes: list[Box], shape: Shape) -> Entry:
    fragments = tuple(Fragment(box, Extent(FILE, 0, box.numel), UINT8) for box in boxes)
    return Entry(TensorSpec("t", UINT8, shape), fragments)


def counted(boxes: list[Box], shape: Shape) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How often each element is held."""
    counts = np.zeros(shape, np.int64)
    for box in boxes:
        counts[tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))] += 1
    return counts


@st.composite
def any_boxes(draw: st.DrawFn) -> tuple[list[Box], Shape]:
    """A shape cut in two again and again, and then some boxes moved, dropped or doubled."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=5)))
    boxes = [Box(shape, (0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 12))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        cut = draw(st.integers(0, box.sizes[dim]))
        for start, size in ((0, cut), (cut, box.sizes[dim] - cut)):
            at, left = list(box.offsets), list(box.sizes)
            at[dim] += start
            left[dim] = size
            if size:
                boxes.append(Box(shape, tuple(at), tuple(left)))
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(boxes) - 1))
        box = boxes[number]
        offsets = tuple(
            draw(st.integers(0, size - own)) for size, own in zip(shape, box.sizes, strict=True)
        )
        boxes[number] = Box(shape, offsets, box.sizes)
        if draw(st.booleans()):
            boxes.append(box)
    return draw(st.permutations(boxes)), shape


@pytest.mark.heavy
@settings(max_examples=300)
@given(any_boxes(), st.sampled_from([0, 1 << 20]))
def test_the_proof_agrees_with_counting(case: tuple[list[Box], Shape], corners: int) -> None:
    """By the corners, and by sums at random numbers."""
    boxes, shape = case
    counts = counted(boxes, shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling, "_MAX_CORNERS", corners)
        assert tiles(boxes, shape) == bool((counts == 1).all())
        pair = overlapping(boxes)
        assert (pair is not None) == bool((counts > 1).any())
        if pair is not None:
            assert pair[0].intersect(pair[1]) is not None
        expected: type[ReshardError] = FormatError if (counts > 1).any() else IncompleteError
        if (counts == 1).all():
            check_tiling(entry_of(boxes, shape))
        else:
            with pytest.raises(expected):
                check_tiling(entry_of(boxes, shape))


def spiral(turns: int) -> tuple[list[Box], Shape]:
    """Strips around strips: no straight cut separates the outer ones."""
    side = 2 * turns + 1
    shape = (side, side)
    boxes = [Box(shape, (turns, turns), (1, 1))]
    for ring in range(turns):
        length = side - 2 * ring - 1
        low, high = ring, side - ring - 1
        boxes += [
            Box(shape, (low, low), (1, length)),
            Box(shape, (low, high), (length, 1)),
            Box(shape, (high, low + 1), (1, length)),
            Box(shape, (low + 1, low), (length, 1)),
        ]
    return boxes, shape


def pinwheels(count: int) -> tuple[list[Box], Shape]:
    """Squares of 3 x 3, each cut like a pinwheel."""
    shape = (3 * count, 3 * count)
    boxes = []
    for row in range(0, shape[0], 3):
        for column in range(0, shape[1], 3):
            for (top, left), sizes in (
                ((0, 0), (1, 2)),
                ((0, 2), (2, 1)),
                ((2, 1), (1, 2)),
                ((1, 0), (2, 1)),
                ((1, 1), (1, 1)),
            ):
                boxes.append(Box(shape, (row + top, column + left), sizes))
    return boxes, shape


def grid(count: int) -> tuple[list[Box], Shape]:
    shape = (count, count)
    return [Box(shape, (r, c), (1, 1)) for r in range(count) for c in range(count)], shape


def rows(count: int) -> tuple[list[Box], Shape]:
    return [Box((count, 3), (row, 0), (1, 3)) for row in range(count)], (count, 3)


def cube(dims: int) -> tuple[list[Box], Shape]:
    """Two halves along each dimension: 2^dims boxes."""
    shape = (2,) * dims
    corners = np.ndindex(*shape)
    return [Box(shape, tuple(map(int, corner)), (1,) * dims) for corner in corners], shape


def stairs(dims: int) -> tuple[list[Box], Shape]:
    """A box halved along one dimension after another: cut along all of 32, in few boxes."""
    shape = (2,) * dims
    boxes, sizes = [], list(shape)
    for dim in range(dims):
        sizes[dim] = 1
        offsets = [0] * dims
        offsets[dim] = 1
        boxes.append(Box(shape, tuple(offsets), tuple(sizes)))
    return [*boxes, Box(shape, (0,) * dims, (1,) * dims)], shape


Layout = tuple[list[Box], Shape]


def counting_lines(entry: Entry) -> int:
    """How many lines of the proof run: the same on any machine, however busy."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != tiling.__file__:
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        check_tiling(entry)
    except ReshardError:
        pass
    finally:
        sys.settrace(before)
    return lines


def spoilt(case: Layout) -> Iterator[Layout]:
    """The layout itself; with a hole; with two that overlap and a hole elsewhere; all shuffled."""
    boxes, shape = case
    boxes = random.Random(1).sample(boxes, len(boxes))
    yield boxes, shape
    yield boxes[:-1], shape
    yield [*boxes[:-1], boxes[0]], shape


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("make", "few", "many"),
    [
        pytest.param(spiral, 100, 400, id="spiral"),
        pytest.param(pinwheels, 10, 20, id="pinwheels"),
        pytest.param(grid, 20, 40, id="grid"),
        pytest.param(rows, 500, 2000, id="rows"),
    ],
)
def test_four_times_the_parts_take_four_times_the_steps(
    make: Callable[[int], Layout], few: int, many: int
) -> None:
    for small, large in zip(spoilt(make(few)), spoilt(make(many)), strict=True):
        assert 3.5 < len(large[0]) / len(small[0]) < 4.5
        costs = [counting_lines(entry_of(*layout)) for layout in (small, large)]
        searched = 2 * 3 * tiling._MAX_PAIRS  # two dimensions, a few lines a pair
        assert costs[1] < 5 * costs[0] + searched


@pytest.mark.parametrize("make", [cube, stairs])
def test_many_dimensions_are_proven_too(make: Callable[[int], Layout]) -> None:
    boxes, shape = make(12 if make is cube else 32)
    assert tiles(boxes, shape)
    assert not tiles(boxes[:-1], shape)
    assert not tiles([*boxes[:-1], boxes[0]], shape)


@pytest.mark.heavy
def test_large_layouts_of_every_kind_tile() -> None:
    for boxes, shape in (spiral(3000), pinwheels(50), grid(100)):
        check_tiling(entry_of(boxes, shape))
        with pytest.raises(IncompleteError, match="elements are in the checkpoint"):
            check_tiling(entry_of(boxes[1:], shape))
        with pytest.raises(FormatError, match="hold the same elements"):
            check_tiling(entry_of([*boxes, boxes[7]], shape))


def test_an_overlap_that_no_search_finds_is_still_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "_MAX_PAIRS", 0)
    shape = (4, 4)
    boxes = [Box(shape, (0, 0), (2, 4)), Box(shape, (1, 1), (2, 4 - 1)), Box(shape, (3, 2), (1, 2))]
    assert sum(box.numel for box in boxes) == 16
    with pytest.raises(FormatError, match="some of its 3 parts hold the same elements: 16 for 16"):
        check_tiling(entry_of(boxes, shape))


@st.composite
def blocks_of_one_size(draw: st.DrawFn) -> tuple[list[Box], Shape]:
    """A grid of equal blocks, of which some were moved or left out; or a shape that it overlaps."""
    size = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    grid = tuple([draw(st.integers(1, 3)) for _ in size])
    shape = tuple(
        a * b + draw(st.sampled_from([0, 0, 0, 1])) for a, b in zip(size, grid, strict=True)
    )
    starts = [tuple(map(int.__mul__, at, size)) for at in np.ndindex(*grid)]
    boxes = [Box(shape, start, size) for start in draw(st.permutations(starts))]
    for _ in range(draw(st.integers(0, 1))):
        number = draw(st.integers(0, len(boxes) - 1))
        moved = tuple([draw(st.integers(0, limit)) for limit in shape])
        boxes[number] = Box(shape, moved, size)
    return boxes[: draw(st.sampled_from([len(boxes), len(boxes), len(boxes) - 1]))], shape


@settings(max_examples=300, deadline=None)
@given(blocks_of_one_size())
def test_an_even_grid_is_known_at_once(drawn: tuple[list[Box], Shape]) -> None:
    boxes, shape = drawn
    if not boxes:
        return
    inside = all(
        start + size <= limit
        for box in boxes
        for start, size, limit in zip(box.offsets, box.sizes, shape, strict=True)
    )
    right = inside and bool((counted(boxes, shape) == 1).all())
    assert is_grid([box.offsets for box in boxes], [box.sizes for box in boxes], shape) == right


def test_parts_that_are_no_even_grid() -> None:
    assert not is_grid([(0,), (2,)], [(2,), (1,)], (3,))
    assert not is_grid([(0, 0), (0, 1)], [(0, 1), (0, 1)], (0, 2))
    assert not is_grid([], [], (3,))
