"""The microscaling formats (OCP MX 1.0): one power of two as the scale of each 32 codes."""

from __future__ import annotations

from reshard.core.dtypes import parse
from reshard.core.tensors import Entry

#: Codes that one scale stands for.
BLOCK = 32
#: The type of the scales; many files store them as plain bytes.
E8M0 = parse("float8_e8m0fnu")


def are_mx(codes: Entry, scales: Entry) -> bool:
    """Whether bytes are microscaled e2m1 codes, two a byte, and these are their scales."""
    if not codes.spec.shape:
        return False
    *leading, columns = codes.spec.shape
    shape = (*leading, columns * 2 // BLOCK)
    return scales.spec.dtype.name in (E8M0.name, "uint8") and scales.spec.shape == shape
