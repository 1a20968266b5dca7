"""Blocks of a parameter against numpy: splitting an array and putting it together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reshard.formats.deepspeed.sharding import (
    Sharding,
    from_map,
    interleaved,
    joined,
    replicated,
)

Array = np.ndarray[Any, Any]


def put_together(sharding: Sharding, parts: Sequence[Array], holder: int = 0) -> Array:
    """The whole, each block from the `holder`-th of its ranks; -1 where no block lies."""
    whole = np.full(sharding.shape, -1)
    for block in sharding.blocks:
        rank, start = block.held[holder]
        here = tuple(slice(a, a + n) for a, n in zip(start, block.sizes, strict=True))
        there = tuple(slice(a, a + n) for a, n in zip(block.at, block.sizes, strict=True))
        whole[there] = parts[rank][here]
    return whole


def numbered(shape: Sequence[int]) -> Array:
    return np.arange(np.prod(shape, dtype=int)).reshape(shape)


def shapes(parts: Sequence[Array]) -> list[tuple[int, ...]]:
    return [part.shape for part in parts]


def as_map(sharding: Sharding, parts: Sequence[Array]) -> dict[str, Any]:
    """The same as DeepSpeed's `affine_map` would say it: offsets and strides, by rank."""

    def view(at: Sequence[int], shape: Sequence[int]) -> list[Any]:
        strides = [int(np.prod(shape[dim + 1 :], dtype=int)) for dim in range(len(shape))]
        return [sum(a * b for a, b in zip(at, strides, strict=True)), strides]

    ranks: dict[int, Any] = {
        rank: {"shard_shape": list(part.shape), "pieces": []} for rank, part in enumerate(parts)
    }
    for block in sharding.blocks:
        for rank, start in block.held:
            piece = {
                "shape": list(block.sizes),
                "source": view(block.at, sharding.shape),
                "dest": view(start, parts[rank].shape),
                "locations": [rank for rank, _ in block.held],
            }
            ranks[rank]["pieces"].append(piece)
    return {"logical_shape": list(sharding.shape), "ranks": ranks}


WIDTHS = st.integers(1, 4).flatmap(
    lambda ranks: st.lists(
        st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks), min_size=1, max_size=3
    )
)


@given(widths=WIDTHS, others=st.lists(st.integers(1, 3), max_size=2), data=st.data())
def test_split_sub_parameters_come_together(
    widths: list[list[int]], others: list[int], data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(others)))
    total = sum(map(sum, widths))
    whole = numbered((*others[:dim], total, *others[dim:]))
    ends = np.cumsum([width for each in widths for width in each])[:-1]
    pieces = np.split(whole, ends, axis=dim)
    ranks = len(widths[0])
    parts = [np.concatenate(pieces[rank::ranks], axis=dim) for rank in range(ranks)]
    sharding = interleaved(shapes(parts), dim, widths)
    np.testing.assert_array_equal(put_together(sharding, parts), whole)
    mapped = from_map(as_map(sharding, parts), shapes(parts))
    np.testing.assert_array_equal(put_together(mapped, parts), whole)
    if len(widths) == 1:
        np.testing.assert_array_equal(put_together(joined(shapes(parts), dim), parts), whole)


@given(st.lists(st.integers(0, 4), max_size=3), st.integers(1, 3))
def test_what_every_rank_holds(shape: list[int], ranks: int) -> None:
    parts = [numbered(shape)] * ranks
    for sharding in (
        replicated(shapes(parts)),
        from_map(as_map(replicated(shapes(parts)), parts), shapes(parts)),
    ):
        for holder in range(ranks if parts[0].size else 0):
            np.testing.assert_array_equal(put_together(sharding, parts, holder), parts[0])
        assert all(len(block.held) == ranks for block in sharding.blocks)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="differ beyond dimension 0"):
        joined([(2, 3), (2, 4)], 0)
    with pytest.raises(ValueError, match="no dimension 1"):
        joined([(2,), (2,)], 1)
    with pytest.raises(ValueError, match="and widths"):
        interleaved([(4,), (4,)], 0, [[1, 3], [2, 1]])
    with pytest.raises(ValueError, match="2 ranks hold widths"):
        interleaved([(4,), (4,)], 0, [[4, 4, 4]])
    with pytest.raises(ValueError, match="the same on every rank"):
        replicated([(2,), (3,)])
