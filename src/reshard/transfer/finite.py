"""Whether a block of elements holds NaN, infinity or what is below zero, by its bits.

Seen as integers, infinities and NaNs are the largest signed values (sign bit clear) and the largest
unsigned ones (sign bit set): two maxima show them, at 20 GB/s per core, so every block of a
conversion is checked as it passes.
"""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from reshard.core.dtypes import DType
from reshard.core.state import is_square
from reshard.core.tensors import TensorSpec
from reshard.transfer.fill import Array


class NotFinite(Struct, frozen=True, array_like=True):
    """How many of a tensor's elements are NaN, how many infinite, and of a moment that is never
    below zero, how many are."""

    nan: int = 0
    infinite: int = 0
    negative: int = 0

    def __add__(self, other: NotFinite) -> NotFinite:
        return NotFinite(
            self.nan + other.nan, self.infinite + other.infinite, self.negative + other.negative
        )

    def __bool__(self) -> bool:
        return bool(self.nan or self.infinite or self.negative)


class _Bits(Struct, frozen=True):
    """A floating type's exponent: all its bits set means NaN, or infinity if `mantissa` is 0."""

    itemsize: int
    exponent: int
    mantissa: int


# IEEE 754, and for float8 the OCP specification (e4m3fn has one NaN and no infinity; e8m0fnu, a
# scale, is an exponent without a sign).
_BITS = {
    "float64": _Bits(8, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
    "float32": _Bits(4, 0x7F80_0000, 0x007F_FFFF),
    "complex64": _Bits(4, 0x7F80_0000, 0x007F_FFFF),
    "float16": _Bits(2, 0x7C00, 0x03FF),
    "bfloat16": _Bits(2, 0x7F80, 0x007F),
    "float8_e5m2": _Bits(1, 0x7C, 0x03),
    "float8_e4m3fn": _Bits(1, 0x7F, 0x7F),
    "float8_e8m0fnu": _Bits(1, 0xFF, 0xFF),
}


def has_special(dtype: DType) -> bool:
    """Whether elements of a type may be NaN or infinite, as `not_finite` knows it."""
    return dtype.name in _BITS


def not_finite(block: Array, dtype: DType) -> NotFinite:
    """How many elements of a contiguous block are NaN or infinite; none of a type without such."""
    bits = _BITS.get(dtype.name)
    if bits is None or not block.size:
        return NotFinite()
    unsigned = block.view(f"u{bits.itemsize}")
    sign = 1 << (8 * bits.itemsize - 1)
    signed = bits.exponent < sign and block.view(f"i{bits.itemsize}").max() >= bits.exponent
    if not signed and unsigned.max() < (sign | bits.exponent):
        return NotFinite()
    special = unsigned[(unsigned & bits.exponent) == bits.exponent]
    nan = int(np.count_nonzero(special & bits.mantissa))
    return NotFinite(nan, special.size - nan)


def spoilt(block: Array, spec: TensorSpec) -> NotFinite:
    """What cannot be right in a contiguous block of a tensor; of a moment by its name."""
    found = not_finite(block, spec.dtype)
    return found + _negative(block, spec.dtype) if is_square(spec.name) else found


def _negative(block: Array, dtype: DType) -> NotFinite:
    """How many elements of a contiguous block are below zero; -0 and NaN are not."""
    bits = _BITS.get(dtype.name)
    sign = 0 if bits is None else 1 << (8 * bits.itemsize - 1)
    if bits is None or bits.exponent >= sign or not block.size:
        return NotFinite()
    unsigned = block.view(f"u{bits.itemsize}")
    if unsigned.max() <= sign:
        return NotFinite()
    below = (unsigned > sign) & (unsigned <= (sign | bits.exponent))
    return NotFinite(negative=int(np.count_nonzero(below)))
