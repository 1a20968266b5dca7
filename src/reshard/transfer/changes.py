"""Whether a written tensor differs from the base model's, with small reads."""

from __future__ import annotations

import numpy as np

from reshard.core.plan import Slot
from reshard.core.tensors import flat
from reshard.errors import VerificationError
from reshard.transfer.fill import Array, Reader, fill

# Elements first compared with the base model's, and at most: each piece that is equal makes the
# next twice as large. More at once would leave the core's cache.
_COMPARED, _MOST_COMPARED = 16 << 10, 128 << 10


def differs(slot: Slot, start: int, raw: Array, reader: Reader) -> bool:
    """Whether a block differs from the same elements of the slot's reference.

    The reference has flat boxes. Compares piece by piece and stops at the first difference, so
    that a trained tensor costs one small read of the base model, and a frozen one few.
    """
    if slot.reference is None:
        return False
    dtype = slot.spec.dtype.numpy
    values = raw.view(dtype)
    numel = slot.spec.numel
    buffer = np.empty(min(len(values), _MOST_COMPARED), dtype)
    at, count = 0, _COMPARED
    while at < len(values):
        part = values[at : at + count]
        other = buffer[: len(part)]
        try:
            fill(slot.reference, flat(numel, start + at, len(part)), other, reader)
        except VerificationError:
            # The reference has a value beyond the range of `dtype`; the block has none.
            return True
        if part.tobytes() != other.tobytes():
            return True
        at, count = at + count, min(2 * count, _MOST_COMPARED)
    return False
