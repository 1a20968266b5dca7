"""Quantised tensors: codes times their scales, computed block by block.

codes   uint8 [rows, columns]                            x x x x | x x x
scales  [ceil(rows / block), ceil(columns / block)]      s       | t
                                                         (edges are parts of blocks)
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct

from reshard.core.dtypes import UINT8
from reshard.core.tensors import Box, Computed, Entry, Read, Shape

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

# Elements of a dequantised block: 1 MiB of float32, which a core's second-level cache holds.
_DEQUANTISED_AT_ONCE = 1 << 18

#: The types that codes are of. Of e2m1 two lie in a byte, the first in its low half.
Code = Literal["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1"]
# OCP Microscaling Formats 1.0: sign, two bits of exponent, one of mantissa.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Scaled(Computed, frozen=True):
    """A quantised tensor: each code times the scale of its block.

    `codes` are bytes (uint8) of shape `[..., rows, columns]`, of e2m1 `[..., rows, columns / 2]`.
    `scales`, of any floating type, has as many dimensions: along each, one scale stands for
    `block` elements, the last for those that are left. Computed in float32, rounded once.
    """

    codes: Entry
    scales: Entry
    block: Shape
    code: Code

    @property
    def shape(self) -> Shape:
        *leading, columns = self.codes.spec.shape
        return (*leading, columns * self._per_byte)

    @property
    def inputs(self) -> tuple[Entry, ...]:
        return (self.codes, self.scales)

    @property
    def piece_numel(self) -> int:
        return _DEQUANTISED_AT_ONCE

    @property
    def _per_byte(self) -> int:
        return 2 if self.code == "float4_e2m1" else 1

    def values(self, box: Box, read: Read) -> Array:
        """Holds the block in float32, its codes and its scales."""
        import numpy as np

        codes = self._decoded(box, read)
        ends = tuple(o + n for o, n in zip(box.offsets, box.sizes, strict=True))
        first = tuple(o // b for o, b in zip(box.offsets, self.block, strict=True))
        last = tuple(-(-end // b) for end, b in zip(ends, self.block, strict=True))
        counts = tuple(stop - start for start, stop in zip(first, last, strict=True))
        scales = read(self.scales, Box(self.scales.spec.shape, first, counts))
        for dim, (offset, end, block) in enumerate(zip(box.offsets, ends, self.block, strict=True)):
            if dim == len(box.sizes) - 1 and offset % block == 0 and block > 1:
                _multiply_columns(codes, scales, block)
                return codes
            edges = np.arange(first[dim], last[dim] + 1) * block
            scales = np.repeat(scales, np.diff(edges.clip(offset, end)), axis=dim)
        codes *= scales
        return codes

    def _decoded(self, box: Box, read: Read) -> Array:
        """The elements of `box`, not scaled."""
        if self._per_byte == 1:
            codes = read(self.codes, Box(self.codes.spec.shape, box.offsets, box.sizes), UINT8)
            return _decode(codes, self.code)
        *offsets, start = box.offsets
        *sizes, columns = box.sizes
        first, last = start // 2, -(-(start + columns) // 2)
        packed = Box(self.codes.spec.shape, (*offsets, first), (*sizes, last - first))
        both = _decode(read(self.codes, packed, UINT8), self.code)
        skipped = start - 2 * first
        return both[..., skipped : skipped + columns]


def _multiply_columns(values: Array, scales: Array, block: int) -> None:
    """Scale blocks of columns, the first of them whole; `scales` has the rows of `values`."""
    full, rest = divmod(values.shape[-1], block)
    split = full * block
    blocks = values[..., :split].reshape(*values.shape[:-1], full, block)
    blocks *= scales[..., :full, None]
    if rest:
        values[..., split:] *= scales[..., full:]


def _decode(codes: Array, code: Code) -> Array:
    """Bytes as float32 numbers: of an 8-bit type as many, of e2m1 twice as many columns."""
    import numpy as np

    if code == "float4_e2m1":
        *leading, columns = codes.shape
        packed = np.empty((*leading, columns * 2), np.float32)
        pairs = packed.reshape(-1).view(np.uint64)
        np.take(_e2m1_pairs(), codes.reshape(-1), out=pairs, mode="clip")
        return packed
    form = _float8(code, _flushes_subnormals())
    out = form.moved(codes)
    for odd, value in form.odd.items():
        places = codes == odd
        if places.any():
            out[places] = value
    return out


class _Float8(Struct, frozen=True):
    """How codes of an 8-bit type become float32: exponent and mantissa are moved by `shift` bits to
    float32's, and a multiplication by `factor`, a power of two, moves the exponent's bias.

    `odd` are the codes of which that makes another number: those of NaN and infinity. On an AMD
    EPYC it takes 0.35 ns an element; looking up pairs of codes takes 0.44, and twice that where the
    table of 512 KiB is not in a core's own cache; ml_dtypes' cast takes 5.8.
    """

    shift: int
    factor: np.float32
    odd: dict[int, np.float32]

    def moved(self, codes: Array) -> Array:
        import numpy as np

        bits = np.empty(codes.shape, np.int32)
        np.copyto(bits, codes.view(np.int8))  # the sign bit fills all above the seven others
        bits <<= self.shift
        bits &= np.int32((0x7F << self.shift) - (1 << 31))
        values = bits.view(np.float32)
        values *= self.factor
        return values


@lru_cache(maxsize=8)
def _float8(code: Code, flushes: bool) -> _Float8:
    """`flushes`: see `_flushes_subnormals`. This thread tries all codes, and notes the odd ones."""
    import ml_dtypes
    import numpy as np

    scalar: type = getattr(ml_dtypes, code)
    every = np.arange(256, dtype=np.uint8)
    numbers = every.view(scalar).astype(np.float32)
    facts = ml_dtypes.finfo(scalar)
    # Codes of exponent 1 are the first normal ones: 1.0 times the smallest normal number.
    factor = np.float32(facts.smallest_normal) / np.float32(2.0**-126)
    form = _Float8(23 - facts.nmant, factor, {})
    differ = form.moved(every).view(np.uint32) != numbers.view(np.uint32)
    return _Float8(form.shift, factor, {int(odd): numbers[odd] for odd in np.flatnonzero(differ)})


def _flushes_subnormals() -> bool:
    """Whether this thread's processor takes subnormal numbers for zero, as some libraries have it
    do (`torch.set_flush_denormal`): then `_Float8` makes zeros of subnormal codes."""
    import numpy as np

    return bool(np.float32(2.0**-149) * np.float32(2.0**120) == 0)


@lru_cache(maxsize=1)
def _e2m1_pairs() -> Array:
    """The two float32 numbers of each byte of e2m1, as one 64-bit word."""
    import numpy as np

    single = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
    both = np.arange(256)
    table: Array = np.stack([single[both & 0xF], single[both >> 4]], axis=1)
    return table.view(np.uint64).reshape(-1)
