"""A low-rank update, merged block by block, against numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from reshard.core import rearrange
from reshard.core.arithmetic import LowRank, computed
from reshard.core.dtypes import BFLOAT16
from reshard.core.tensors import (
    Box,
    Entry,
    flat,
)
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Reader, fill
from tests import tensors
from tests.tensors import stored

Array = np.ndarray[Any, Any]


def evaluate(source: Entry | LowRank, dtype: np.dtype[Any], limit: int) -> Array:
    if isinstance(source, LowRank):
        source = computed(source, source.base)
    return tensors.evaluate(source, limit, dtype, buffer=1 << 16)


@pytest.fixture
def case(tmp_path: Path) -> tuple[LowRank, Array]:
    random = np.random.default_rng(0)
    base = random.standard_normal((13, 9)).astype(np.float32)
    up = random.standard_normal((13, 4)).astype(np.float32)
    down = random.standard_normal((4, 9)).astype(np.float32)
    update = LowRank(
        stored(tmp_path, "w", base), stored(tmp_path, "b", up), stored(tmp_path, "a", down), 0.5
    )
    exact = base.astype(np.float64) + 0.5 * up.astype(np.float64) @ down.astype(np.float64)
    return update, exact


@pytest.mark.parametrize("limit", [1, 4, 9, 27, 1000])
def test_blocks_of_any_size_give_the_merged_matrix(case: tuple[LowRank, Array], limit: int) -> None:
    update, exact = case
    merged = evaluate(update, np.dtype(np.float32), limit)
    np.testing.assert_allclose(merged, exact, rtol=1e-6, atol=1e-6)
    rounded = evaluate(update, BFLOAT16.numpy, limit)
    np.testing.assert_array_equal(
        rounded, evaluate(update, np.dtype(np.float32), limit).astype(BFLOAT16.numpy)
    )


def test_an_update_of_nothing_changes_nothing(case: tuple[LowRank, Array]) -> None:
    update, _ = case
    base = evaluate(update.base, np.dtype(np.float32), 9)
    same = evaluate(replace(update, scaling=0.0), np.dtype(np.float32), 9)
    np.testing.assert_array_equal(same, base)


def test_rows_of_an_update(case: tuple[LowRank, Array]) -> None:
    update, exact = case
    box = Box((13, 9), (2, 0), (7, 9))
    rows = evaluate(rearrange.crop(computed(update, update.base), box), np.dtype(np.float32), 10)
    np.testing.assert_allclose(rows, exact[2:9], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 4, 27, 1000])
def test_a_magnitude_scales_every_row_to_it(
    case: tuple[LowRank, Array], tmp_path: Path, limit: int
) -> None:
    update, exact = case
    magnitude = np.arange(1, 14, dtype=np.float32)
    dora = replace(update, magnitude=stored(tmp_path, "m", magnitude))
    merged = evaluate(dora, np.dtype(np.float32), limit)
    expected = exact / np.linalg.norm(exact, axis=1, keepdims=True) * magnitude[:, None]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    box = Box((13, 9), (2, 0), (7, 9))
    rows = evaluate(rearrange.crop(computed(dora, dora.base), box), np.dtype(np.float32), limit)
    np.testing.assert_allclose(rows, expected[2:9], rtol=1e-5, atol=1e-6)


def test_a_computed_matrix_is_cut_turned_and_joined_as_a_stored_one(
    case: tuple[LowRank, Array],
) -> None:
    update, _ = case
    merged = computed(update, update.base)
    whole_matrix = evaluate(merged, np.dtype(np.float32), 1000)
    turned = rearrange.transpose(merged, 0, 1)
    corner = rearrange.crop(merged, Box((13, 9), (3, 2), (8, 5)))
    stacked = rearrange.stack([merged, merged])
    middle = rearrange.select(rearrange.transpose(stacked, 1, 2), 1)
    joined = rearrange.concat([turned, rearrange.crop(turned, Box((9, 13), (2, 0), (4, 13)))], 0)
    for made, expected in (
        (turned, whole_matrix.T),
        (corner, whole_matrix[3:11, 2:7]),
        (stacked, np.stack([whole_matrix, whole_matrix])),
        (middle, whole_matrix.T),
        (joined, np.concatenate([whole_matrix.T, whole_matrix.T[2:6]])),
    ):
        for limit in (1, 7, 1000):
            np.testing.assert_allclose(
                evaluate(made, np.dtype(np.float32), limit), expected, rtol=1e-6, atol=1e-6
            )
        out = np.empty(made.spec.numel - 4, np.float32)
        with Sources() as sources:
            reader = Reader(sources, Ledger(()), memoryview(bytearray(1 << 16)))
            fill(made, flat(made.spec.numel, 3, len(out)), out, reader)
        np.testing.assert_allclose(out, expected.reshape(-1)[3:-1], rtol=1e-6, atol=1e-6)
