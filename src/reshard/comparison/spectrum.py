"""The rank of the change of a matrix: the share of it that a few directions hold.

The change of a LoRA run has the adapter's rank, that of a full run does not. The singular values
are found by subspace iteration: the change is multiplied by a few columns, and the product by the
change again, row block by row block, so that only these columns are held. Each pass reads both
tensors once. The shares are never above the true ones; they are exact where the change has no more
than `_COLUMNS` directions, and a little below where it has many of about the same size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from reshard.core.tensors import Box

Array = np.ndarray[Any, Any]
#: Gives the change again at each call, in row-major boxes of the matrix, as float32.
Changes = Callable[[], Iterator[tuple[Box, Array]]]

#: Shares are told of the ranks from 1 to this.
RANKS = 8
# Columns of the subspace; twice the ranks that are told, so that the last are right as well.
_COLUMNS = 2 * RANKS
# Passes at most, and the gain of the largest share from one to the next that ends them.
_PASSES, _GAIN = 6, 1e-3
# Norms of changes, and their inverses, that float32 holds.
_LEAST = 1e-37


def energies(changes: Changes, shape: tuple[int, ...], moved: float) -> tuple[float, ...]:
    """The shares of the change's squares that its best approximations of rank 1, 2, ... have.

    `moved` is the norm of the change, above 0. Memory: about three times `_COLUMNS` numbers for
    each column of the matrix. Empty for what is not a matrix, and for a change that float32 cannot
    divide by.
    """
    if len(shape) != 2 or not _LEAST < moved < 1 / _LEAST:
        return ()
    columns = shape[1]
    kept = min(_COLUMNS, columns)
    start = np.random.default_rng(0).standard_normal((columns, kept))
    basis = np.linalg.qr(start)[0].astype(np.float32)
    shares: Array = np.zeros(kept)
    for number in range(_PASSES):
        gram = np.zeros((kept, kept))
        image = np.zeros((columns, kept), np.float32)
        for box, change in changes():
            if box.sizes[1] != columns:
                return ()  # a row that is longer than a block: no weight is so wide
            scaled = change / np.float32(moved)
            made = scaled @ basis
            gram += made.T.astype(np.float64) @ made
            image += scaled.T @ made
        before, shares = shares, np.cumsum(np.linalg.eigvalsh(gram)[::-1])
        # The first columns are random, and tell nothing.
        if number and (shares - before)[:RANKS].max() < _GAIN:
            break
        basis = np.linalg.qr(image)[0]
    return tuple(float(share) for share in np.clip(shares[: min(RANKS, *shape)], 0, 1))
