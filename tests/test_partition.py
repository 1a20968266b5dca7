"""Tensors that are described by where every rank's piece lies: what that stands for."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.core.dtypes import BFLOAT16, FLOAT32
from reshard.core.fragments import longest, regions, strided, within
from reshard.core.partition import FlatSpace, Partition, Ranks, partitioned
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, flat, nbytes_read, stored
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError


def ranks_of(lengths: list[int], world: int, dtype: Any = FLOAT32) -> Ranks:
    """Ranks whose flat tensors have these lengths, rank r's in file r, each 8 bytes apart."""
    spaces = []
    for rank in range(world):
        at, parts = 64, []
        for length in lengths:
            extent = Extent(FileRef(f"/{rank}"), at, length * dtype.itemsize)
            parts.append(Fragment(flat(length, 0, length), extent, dtype))
            at += extent.nbytes + 8
        spaces.append(FlatSpace(parts))
    return Ranks(spaces)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Entry, list[int], int]:
    """A tensor of several ranks, the lengths of their flat tensors, and where it begins."""
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    world = draw(st.integers(1, 5))
    start = draw(st.integers(0, sum(lengths)))
    numel = draw(st.integers(0, (sum(lengths) - start) * world))
    return partitioned("w", (numel,), ranks_of(lengths, world), start), lengths, start


@given(partitions(), st.data())
def test_its_fragments_are_those_that_the_arithmetic_gives(
    made: tuple[Entry, list[int], int], data: st.DataObject
) -> None:
    entry, lengths, start = made
    assert isinstance(entry.fragments, Partition)
    world, numel = len(entry.fragments.ranks.spaces), entry.spec.numel
    # Byte by byte, from the layout alone: the place of each element of each rank's space.
    places = [
        64 + 8 * number + 4 * (sum(lengths[:number]) + index)
        for number, length in enumerate(lengths)
        for index in range(length)
    ]
    piece = -(-numel // world)
    expected = [(f"/{i // piece}", places[start + i % piece]) for i in range(numel)]
    found = [
        (fragment.in_file.file.path, fragment.extent.offset + 4 * index)
        for fragment in entry.fragments
        for index in range(fragment.box.numel)
    ]
    assert found == expected
    check_tiling(Entry(entry.spec, tuple(entry.fragments)))
    assert entry.over == (numel,)
    assert bool(entry.fragments) == bool(numel)
    assert len(entry.fragments) == len(tuple(entry.fragments))
    assert nbytes_read(entry.fragments) == nbytes_read(tuple(entry.fragments)) == 4 * numel
    assert longest(entry) >= max((e.nbytes for e in stored(entry.fragments)), default=0)
    assert not strided(entry)
    low, high = sorted((data.draw(st.integers(0, numel)), data.draw(st.integers(0, numel))))
    needed = [
        f
        for f in entry.fragments
        if f.box.offsets[0] < high and f.box.offsets[0] + f.box.numel > low
    ]
    assert [f for f in within(entry, low, high) if f in needed] == (needed if low < high else [])


def test_a_rank_without_a_whole_piece_is_refused() -> None:
    ranks = ranks_of([3, 4], 2)
    assert partitioned("w", (6,), ranks, 4).spec.numel == 6
    with pytest.raises(FormatError, match="its elements 5 to 8 and holds 7"):
        partitioned("w", (6,), ranks, 5)


def test_flat_tensors_are_regions_once() -> None:
    ranks = ranks_of([3, 4], 2)
    entries = [partitioned("a", (6,), ranks, 0), partitioned("b", (8,), ranks, 3)]
    assert list(regions(entries)) == list(ranks.extents())
    assert len(list(regions(entries))) == 4


def test_flat_tensors_of_several_dtypes_are_counted_one_by_one() -> None:
    wide, narrow = (ranks_of([4], 1, dtype).spaces[0] for dtype in (FLOAT32, BFLOAT16))
    entry = partitioned("w", (8,), Ranks([wide, narrow]), 0)
    assert nbytes_read(entry.fragments) == 4 * 4 + 4 * 2
    assert longest(entry) == 16


def test_what_describes_it_says_all_of_it() -> None:
    """Plans are named by it."""
    one = Partition(ranks_of([3, 4], 2), 0, 6)
    others = [
        Partition(ranks_of([3, 4], 2), 1, 6),
        Partition(ranks_of([3, 4], 2), 0, 5),
        Partition(ranks_of([4, 3], 2), 0, 6),
        Partition(ranks_of([3, 4], 3), 0, 6),
        Partition(ranks_of([3, 4], 2, BFLOAT16), 0, 6),
    ]
    same = Partition(ranks_of([3, 4], 2), 0, 6)
    assert (repr(same), same, hash(same)) == (repr(one), one, hash(one))
    assert len({repr(other) for other in (one, *others)}) == 6
    assert all(other != one for other in others)
