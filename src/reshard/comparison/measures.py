"""How much the elements of two tensors differ, measured in a stream."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from msgspec import Struct

Array = np.ndarray[Any, Any]

# Elements measured at once: as float64, four arrays of this length fit a core's second-level cache,
# and BLAS starts no threads for so few (with threads, on busy cores, it took 20 times as long).
_PIECE = 1 << 13
# A float64 has 11 bits of exponent, which count from 2**-1023.
_EXPONENTS, _BIAS = 1 << 11, 1023


class Change(Struct, frozen=True):
    """How much the elements of two tensors of one shape differ.

    `differing` of `numel` elements differ in a bit; `unmeasured` of these are not finite on one
    side. Of the others, `largest` and `mean` are those of |a - b|, `largest_relative` and
    `mean_relative` those of |a - b| / max(|a|, |b|), which is 2 at most. `moved` is the norm of the
    change (the root of the sum of its squares) and `norm` the larger of the tensors' norms, over
    all elements that are finite on both sides; `cosine` is that of the angle between them, None
    where one of them is 0 or it was not measured. `energy` is the share of the change's squares
    that its best approximation of rank 1, 2, ... has, where that was asked for.
    """

    numel: int = 0
    differing: int = 0
    unmeasured: int = 0
    largest: float = 0.0
    mean: float = 0.0
    largest_relative: float = 0.0
    mean_relative: float = 0.0
    moved: float = 0.0
    norm: float = 0.0
    cosine: float | None = None
    energy: tuple[float, ...] = ()

    @property
    def relative(self) -> float | None:
        """The norm of the change over the norm of the weights; None where that is 0."""
        return ratio(self.moved, self.norm)


def ratio(moved: float, norm: float) -> float | None:
    """A change's norm over the weights'; 0 without a change, None where it is undefined."""
    if not moved:
        return 0.0
    found = moved / norm if norm else math.inf
    return found if math.isfinite(found) else None


class Meter:
    """Takes two tensors in blocks, in turn, and measures how much they differ.

    Without `norms`, the elements of pieces that are equal are not looked at further, and the norms
    and the cosine are those of the pieces that differ. `exponents` counts the changes that are not
    0 by the power of two that is next below; several meters may count into one.
    """

    def __init__(self, *, norms: bool = True, exponents: Array | None = None) -> None:
        self._norms = norms
        self.exponents = np.zeros(_EXPONENTS, np.int64) if exponents is None else exponents
        self._numel = self._differing = self._unmeasured = 0
        self._largest = self._summed = self._largest_relative = self._summed_relative = 0.0
        # Of the change, the first, the second, and the first's square less the second's.
        self._squares = np.zeros(4)

    def add(self, one: Array, two: Array) -> None:
        """Measure a block: two arrays of one dimension, of one dtype and length."""
        self._numel += len(one)
        unlike = differ(one, two)
        for start in range(0, len(one), _PIECE):
            piece = slice(start, start + _PIECE)
            count = int(np.count_nonzero(unlike[piece]))
            if count:
                self._differing += count
                self._measure(_wide(one[piece]), _wide(two[piece]), unlike[piece])
            elif self._norms:
                self._keep(_wide(one[piece]))

    def _keep(self, values: Array) -> None:
        """Count elements that are the same on both sides."""
        with np.errstate(over="ignore", invalid="ignore"):
            square = np.vdot(values, values).real
            if not np.isfinite(square):
                values = np.where(np.isfinite(values), values, 0)
                square = np.vdot(values, values).real
            self._squares[1:3] += square

    def _measure(self, a: Array, b: Array, unlike: Array) -> None:
        with np.errstate(over="ignore", invalid="ignore"):
            gaps = np.abs(a - b)
            finite = np.isfinite(gaps)
            if not finite.all():
                self._unmeasured += int(np.count_nonzero(unlike & ~finite))
                a, b = np.where(finite, a, 0), np.where(finite, b, 0)
                gaps = np.where(finite, gaps, 0)
            scale = np.maximum(np.abs(a), np.abs(b))
            relative = gaps / np.where(scale > 0, scale, 1)
            self._squares += (
                np.dot(gaps, gaps), np.vdot(a, a).real, np.vdot(b, b).real,
                np.vdot(a + b, a - b).real,
            )  # fmt: skip
        self._largest = max(self._largest, float(gaps.max()))
        self._largest_relative = max(self._largest_relative, float(relative.max()))
        self._summed += float(gaps.sum())
        self._summed_relative += float(relative.sum())
        self.exponents += np.bincount(gaps.view(np.int64) >> 52, minlength=_EXPONENTS)

    def result(self) -> Change:
        """What was measured so far."""
        measured = max(self._differing - self._unmeasured, 1)
        moved, first, second = (_root(square) for square in self._squares[:3])
        return Change(
            self._numel,
            self._differing,
            self._unmeasured,
            self._largest,
            self._summed / measured if math.isfinite(self._summed) else self._largest,
            self._largest_relative,
            self._summed_relative / measured,
            moved,
            max(first, second),
            self._cosine(moved, first, second) if self._norms else None,
        )

    def _cosine(self, moved: float, first: float, second: float) -> float | None:
        """The cosine, from the change: of small ones, the scalar product would round to 1."""
        if not first or not second:
            return None
        along = float(self._squares[3]) / (first + second)
        found = 1 - (moved / first * (moved / second) - along / first * (along / second)) / 2
        return min(max(found, -1.0), 1.0) if math.isfinite(found) else None


def counted(exponents: Array) -> tuple[tuple[int, int], ...]:
    """The exponents that occur, ascending, with their counts: changes from 2**e to 2**(e + 1).

    >>> meter = Meter()
    >>> meter.add(np.array([1.0, 2.0, 0.0]), np.array([1.5, 2.0, 0.1]))
    >>> counted(meter.exponents)
    ((-4, 1), (-1, 1))
    """
    # No change, and those below 2**-1022, have exponent 0.
    return tuple((int(e) - _BIAS, int(exponents[e])) for e in np.flatnonzero(exponents) if e)


def differ(one: Array, two: Array) -> Array:
    """Which elements of two arrays of one dtype differ in any bit."""
    bits = np.dtype((np.void, one.dtype.itemsize))
    if one.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.asarray(one.view(bits) != two.view(bits))


def _wide(values: Array) -> Array:
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return values.astype(np.complex128 if values.dtype.kind == "c" else np.float64)


def _root(square: float) -> float:
    """The root of a sum of squares; the largest number where the sum is beyond it."""
    return math.sqrt(min(float(square), float(np.finfo(np.float64).max)))
