"""How far two tensors are apart, against numpy's own arithmetic on the whole arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import reshard
from reshard.comparison.measures import Change, Meter, counted
from reshard.comparison.spectrum import RANKS, energies
from reshard.core.strides import blocks

Array = np.ndarray[Any, Any]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8,
          np.bool_, np.complex64]  # fmt: skip


def measured(one: Array, two: Array, block: int = 40_000) -> Change:
    meter = Meter()
    for start in range(0, len(one), block):
        meter.add(one[start : start + block], two[start : start + block])
    return meter.result()


def pair(dtype: Any, length: int = 100_000, scale: float = 0.01) -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    one = rng.standard_normal(length) * 2
    moved = np.where(rng.random(length) < 0.3, one + rng.standard_normal(length) * scale, one)
    if np.dtype(dtype).kind == "c":
        return (one + 1j * moved).astype(dtype), (moved + 1j * one).astype(dtype)
    if np.dtype(dtype).kind == "b":
        one, moved = np.trunc(one), np.trunc(moved)
    return one.astype(dtype), moved.astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_measures_are_those_of_the_whole_arrays(dtype: Any) -> None:
    one, two = pair(dtype, scale=1.5 if np.dtype(dtype).itemsize == 1 else 0.01)
    found = measured(one, two)
    wide = np.complex128 if np.dtype(dtype).kind == "c" else np.float64
    a, b = one.astype(wide), two.astype(wide)
    gaps, unlike = np.abs(a - b), a != b
    assert found.numel == len(one)
    assert found.differing == unlike.sum() > 0
    assert found.unmeasured == 0
    assert found.largest == gaps.max()
    np.testing.assert_allclose(found.mean, gaps[unlike].mean())
    relative = gaps[unlike] / np.maximum(np.abs(a), np.abs(b))[unlike]
    np.testing.assert_allclose(found.largest_relative, relative.max())
    np.testing.assert_allclose(found.mean_relative, relative.mean())
    np.testing.assert_allclose(found.moved, np.linalg.norm(a - b))
    np.testing.assert_allclose(found.norm, max(np.linalg.norm(a), np.linalg.norm(b)))
    assert found.cosine is not None
    cosine = np.vdot(a, b).real / (np.linalg.norm(a) * np.linalg.norm(b))
    np.testing.assert_allclose(found.cosine, cosine)
    assert found.relative == found.moved / found.norm


def test_the_cosine_of_a_tiny_change_is_not_rounded_to_1() -> None:
    one = np.random.default_rng(0).standard_normal(1000)
    across = np.random.default_rng(1).standard_normal(1000)
    across -= one * (one @ across) / (one @ one)
    found = measured(one, one + across * 1e-7)
    angle = 1e-7 * np.linalg.norm(across) / np.linalg.norm(one)
    assert found.cosine is not None
    assert found.cosine < 1
    np.testing.assert_allclose(1 - found.cosine, angle**2 / 2, rtol=0.02)


def test_the_sides_may_be_exchanged() -> None:
    one, two = pair(np.float32)
    there, back = measured(one, two), measured(two, one)
    for name in there.__struct_fields__:
        left, right = getattr(there, name), getattr(back, name)
        assert left == pytest.approx(right, rel=1e-12), name


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    one = np.array([np.nan, 1, np.inf, 2, np.inf, np.nan], np.float32)
    two = np.array([0, np.nan, -np.inf, 3, np.inf, np.nan], np.float32)
    found = measured(one, two)
    assert (found.differing, found.unmeasured) == (4, 3)
    assert (found.largest, found.mean, found.moved) == (1, 1, 1)
    assert found.norm == 3


@pytest.mark.parametrize("huge", [1e300, 1.7e308])
def test_squares_beyond_float64_give_no_number_that_is_not_one(huge: float) -> None:
    found = measured(np.array([huge, 1]), np.array([-huge, 1]))
    assert found.differing == 1
    assert found.relative is None or 0 <= found.relative <= 2
    assert found.cosine is None or -1 <= found.cosine <= 1
    assert np.isfinite([found.largest, found.mean, found.moved, found.norm]).all()


def test_signed_zeros_differ_by_nothing() -> None:
    found = measured(np.array([0.0, 1.0]), np.array([-0.0, 1.0]))
    assert (found.differing, found.largest, found.relative, found.cosine) == (1, 0, 0, 1)


def test_changes_are_counted_by_their_size() -> None:
    meter = Meter()
    meter.add(np.array([0.5, 3, 1, 1]), np.array([0, 0, 0.0, 1]))
    assert counted(meter.exponents) == ((-1, 1), (0, 1), (1, 1))


def shares(matrix: Array) -> Array:
    """The exact shares of the best approximations of rank 1, 2, ..."""
    squares = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return np.asarray(np.cumsum(squares)[:RANKS] / squares.sum())


def streamed(matrix: Array, block: int = 700) -> tuple[float, ...]:
    def changes() -> Any:
        for box in blocks(matrix.shape, block):
            at = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
            yield box, matrix[at].astype(np.float32)

    return energies(changes, matrix.shape, float(np.linalg.norm(matrix)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 12), st.floats(-20, 20))
def test_the_rank_of_a_low_rank_change_is_found(m: int, n: int, rank: int, power: float) -> None:
    rng = np.random.default_rng(m * 100 + n)
    matrix = rng.standard_normal((m, rank)) @ rng.standard_normal((rank, n)) * 10**power
    found = streamed(matrix)
    assert len(found) == min(RANKS, m, n)
    np.testing.assert_allclose(found, shares(matrix)[: len(found)], atol=1e-4)


def test_the_shares_of_a_full_change_are_bounds_from_below() -> None:
    matrix = np.random.default_rng(3).standard_normal((300, 200))
    found, exact = np.array(streamed(matrix, 3000)), shares(matrix)
    assert (found <= exact + 1e-6).all()
    assert (found > exact * 0.85).all()


def test_what_is_no_matrix_has_no_rank() -> None:
    assert streamed(np.ones((3, 4, 5))) == ()
    assert streamed(np.ones(5)) == ()


def test_diff_measures_the_rank_of_a_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((40, 30)).astype(np.float32)
    update = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 30))).astype(np.float32)
    for name, value in (("a", weight), ("b", weight + update)):
        (tmp_path / name).mkdir()
        save_file({"w.weight": value, "same": weight}, tmp_path / name / "model.safetensors")
    (found,) = reshard.diff(tmp_path / "a", tmp_path / "b", spectrum=True).differences
    np.testing.assert_allclose(found.change.energy, shares(update), atol=1e-5)
    (plain,) = reshard.diff(tmp_path / "a", tmp_path / "b").differences
    assert plain.change.energy == ()
    assert plain.change.relative == pytest.approx(
        np.linalg.norm(update) / max(np.linalg.norm(weight), np.linalg.norm(weight + update))
    )
