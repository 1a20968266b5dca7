"""Tensors computed from others: `W + B A`, block by block, rounded once.

Each is a `Computed`: it says which tensors it is made of, and what its elements are in float32.
`transfer/fill.py` reads the tensors and rounds the result to the output's dtype.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Box, Computed, Entry, Fragment, Portion, Read, Shape, whole

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Elements of a merged block: `right` is read again for each, so a block should have many rows.
_MERGED_AT_ONCE = 2 << 20


def computed(source: Computed, like: Entry) -> Entry:
    """The tensor that `source` computes, with the name, dtype, kind and aliases of `like`."""
    shape = source.shape
    numel = whole(shape).numel
    portion = Portion(source, 0, numel * FLOAT32.itemsize)
    fragments = (Fragment(whole(shape), portion, FLOAT32),) if numel else ()
    return replace(like, spec=replace(like.spec, shape=shape), fragments=fragments)


class LowRank(Computed, frozen=True):
    """A matrix with a low-rank update, as LoRA trains it: `base + left @ right * scaling`.

    `base` is `[rows, columns]`, `left` `[rows, rank]`, `right` `[rank, columns]` (for a linear
    layer LoRA's B and A). With `magnitude` `[rows]` (DoRA) each row of the sum is then multiplied
    by its magnitude and divided by its Euclidean norm; with `by_column` (a matrix that is stored
    transposed) each column, and `magnitude` is `[columns]`. Computed in float32, rounded once.
    """

    base: Entry
    left: Entry
    right: Entry
    scaling: float
    magnitude: Entry | None = None
    by_column: bool = False

    @property
    def shape(self) -> Shape:
        return self.base.spec.shape

    @property
    def inputs(self) -> tuple[Entry, ...]:
        parts = (self.base, self.left, self.right, self.magnitude)
        return tuple(part for part in parts if part is not None)

    @property
    def piece_numel(self) -> int:
        return _MERGED_AT_ONCE

    @property
    def rank(self) -> int:
        return self.right.spec.shape[0]

    def values(self, box: Box, read: Read) -> Array:
        """Holds twice the block in float32, and the columns of `right` that it meets; with a
        magnitude, whole rows of them."""
        import numpy as np

        if self.magnitude is None:
            return self._sum(box, read)
        (row, column), (rows, columns) = box.offsets, box.sizes
        if self.by_column:
            scales = _COLUMN_SCALES.of(self, self.magnitude, read)
            return self._sum(box, read) * scales[column : column + columns]
        whole_rows = self._sum(Box(box.shape, (row, 0), (rows, box.shape[1])), read)
        scale = read(self.magnitude, Box(box.shape[:1], (row,), (rows,)))
        scale /= np.linalg.norm(whole_rows, axis=1)
        return whole_rows[:, column : column + columns] * scale[:, None]

    def _sum(self, box: Box, read: Read) -> Array:
        """The elements of `box` of the base and its update added up."""
        import numpy as np

        (row, column), (rows, columns) = box.offsets, box.sizes
        sum_ = read(self.base, box)
        left = read(self.left, Box(self.left.spec.shape, (row, 0), (rows, self.rank)))
        right = read(self.right, Box(self.right.spec.shape, (0, column), (self.rank, columns)))
        delta = left @ right
        delta *= np.float32(self.scaling)
        sum_ += delta
        return sum_

    def column_scales(self, magnitude: Entry, read: Read) -> Array:
        """Magnitude over norm of each column: the whole matrix is read for it, block by block."""
        import numpy as np

        rows, width = self.shape
        squares = np.zeros(width, np.float64)
        step = max(1, _MERGED_AT_ONCE // max(width, 1))
        for row in range(0, rows, step):
            box = Box(self.shape, (row, 0), (min(step, rows - row), width))
            squares += np.square(self._sum(box, read), dtype=np.float64).sum(axis=0)
        scales = read(magnitude, whole((width,)))
        scales /= np.sqrt(squares).astype(np.float32)
        return scales


class _ColumnScales:
    """The column scales of the last matrix.

    Several threads fill the blocks of one matrix one after another; without this each thread would
    read the matrix again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[LowRank, Array] | None = None

    def of(self, update: LowRank, magnitude: Entry, read: Read) -> Array:
        with self._lock:
            if self._last is None or self._last[0] is not update:
                self._last = (update, update.column_scales(magnitude, read))
            return self._last[1]


_COLUMN_SCALES = _ColumnScales()
