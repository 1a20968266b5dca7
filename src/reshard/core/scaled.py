"""Quantised tensors: codes times their scales, computed block by block.

codes   uint8 [rows, columns]                            x x x x | x x x
scales  [ceil(rows / block), ceil(columns / block)]      s       | t
                                                         (edges are parts of blocks)
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

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
    """Bytes as float32 numbers: of an 8-bit type as many, of e2m1 twice as many columns.

    Two at a time: a table of all pairs of 8-bit codes is 512 KiB, and looking up pairs takes 0.9 ns
    an element on an AMD EPYC, looking up single ones 1.7, ml_dtypes' own cast 5.8.
    """
    import numpy as np

    pairs = _pairs(code)
    *leading, columns = codes.shape
    if code == "float4_e2m1":
        out = np.empty((*leading, columns * 2), np.float32)
        np.take(pairs, codes.reshape(-1), out=out.reshape(-1).view(np.uint64), mode="clip")
        return out
    out = np.empty(codes.shape, np.float32)
    flat, found = codes.reshape(-1), out.reshape(-1)
    even = len(flat) // 2 * 2
    twos = flat[:even].view(np.uint16)
    np.take(pairs, twos, out=found[:even].view(np.uint64), mode="clip")
    if even < len(flat):
        # The pair of a code with itself.
        found[even] = pairs[int(flat[even]) * 257 : int(flat[even]) * 257 + 1].view(np.float32)[0]
    return out


@lru_cache(maxsize=8)
def _pairs(code: Code) -> Array:
    """The two float32 numbers of each pair of codes, as one 64-bit word."""
    import ml_dtypes
    import numpy as np

    if code == "float4_e2m1":
        single = np.array([*_E2M1, *(-value for value in _E2M1)], np.float32)
        both = np.arange(256)
        low, high = single[both & 0xF], single[both >> 4]
    else:
        scalar: type = getattr(ml_dtypes, code)
        single = np.arange(256, dtype=np.uint8).view(scalar).astype(np.float32)
        low, high = single[np.arange(65536, dtype=np.uint16).view(np.uint8).reshape(-1, 2)].T
    table: Array = np.stack([low, high], axis=1).view(np.uint64).reshape(-1)
    return table
