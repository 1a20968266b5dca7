"""A tensor's digest, as a tree, so that its parts can be hashed separately and in any order.

    leaves   64 MiB each of the tensor's row-major bytes, the last one shorter: xxh3-128 of each
    tensor   of one leaf: that leaf's digest; of several: xxh3-128 of theirs, one after another

Digests are written as hexadecimal, and joined as the 16 bytes that these stand for.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from reshard.core.dtypes import DType
from reshard.core.tensors import TensorSpec

#: Bytes of a leaf. Every dtype's size divides it.
LEAF_NBYTES = 64 << 20


def leaf_numel(dtype: DType) -> int:
    """Elements of a leaf."""
    return LEAF_NBYTES // dtype.itemsize


def leaves(spec: TensorSpec) -> int:
    """How many leaves a tensor has."""
    return -(-spec.nbytes // LEAF_NBYTES)


def joined(digests: Sequence[bytes]) -> str:
    """The digest of a tensor whose leaves have these; of a tensor without bytes, that of none.

    >>> joined([xxhash.xxh3_128_digest(b"x")]) == xxhash.xxh3_128_hexdigest(b"x")
    True
    """
    if len(digests) == 1:
        return digests[0].hex()
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
