"""Reading a tensor as a stream of blocks: its digest, whether it equals another, its values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import xxhash

from reshard.core.digests import joined, leaf_numel, leaves
from reshard.core.dtypes import DType
from reshard.core.fragments import longest
from reshard.core.rearrange import blocks_of_range
from reshard.core.tensors import Entry, Extent, Record
from reshard.errors import VerificationError
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader, fill, page_aligned

_BLOCK = 4 << 20
_FIRST = 64 << 10


def digest(entry: Entry, sources: Sources) -> str:
    """A tensor's digest (`core.digests`), read in blocks of 4 MiB."""
    return joined([leaf_digest(entry, index, sources) for index in range(leaves(entry.spec))])


#: Digests of bytes of files that were read: by path, offset and number of bytes.
Known = Mapping[tuple[str, int, int], bytes]


def leaf_digest(entry: Entry, index: int, sources: Sources, known: Known | None = None) -> bytes:
    """The digest of one of its leaves.

    Where a leaf is one stretch of a file whose digest is `known`, it is not read again.
    """
    leaf = leaf_numel(entry.spec.dtype)
    stop = min((index + 1) * leaf, entry.spec.numel)
    if known and len(entry.fragments) == 1:
        (fragment,) = entry.fragments
        extent, size = fragment.extent, entry.spec.dtype.itemsize
        plain = fragment.strides is None and fragment.dtype == entry.spec.dtype
        if plain and isinstance(extent, Extent) and extent.file.codec is None:
            at = extent.offset + index * leaf * size
            found = known.get((extent.file.path, at, (stop - index * leaf) * size))
            if found is not None:
                return found
    hasher = xxhash.xxh3_128()
    for block in _stream(entry, sources, start=index * leaf, stop=stop):
        hasher.update(block.data)
    return hasher.digest()


def plain_digest(entry: Entry, sources: Sources) -> str:
    """xxh3-128 of a tensor's row-major bytes, as reshard stated it before digests were trees."""
    hasher = xxhash.xxh3_128()
    for block in _stream(entry, sources):
        hasher.update(block.data)
    return hasher.hexdigest()


def equal(one: Entry, other: Entry, sources: Sources) -> bool:
    """Whether two tensors of one dtype and shape hold the same bytes; stops where they differ."""
    if (one.spec.dtype, one.spec.shape) != (other.spec.dtype, other.spec.shape):
        return False
    pairs = zip(_stream(one, sources), _stream(other, sources), strict=True)
    return all(np.array_equal(mine, theirs) for mine, theirs in pairs)


def first_bytes(entry: Entry, sources: Sources) -> bytes:
    """The first 64 KiB of a tensor's row-major bytes, or all: most tensors that differ do there."""
    stop = min(entry.spec.numel, _FIRST // entry.spec.dtype.itemsize)
    return b"".join(block.tobytes() for block in _stream(entry, sources, stop=stop))


def same_values(one: Entry, other: Entry, sources: Sources) -> bool:
    """Whether two tensors of one shape hold the same values, rounded to the narrower dtype."""
    if one.spec.shape != other.spec.shape:
        return False
    narrow = min(one.spec.dtype, other.spec.dtype, key=lambda dtype: dtype.itemsize)
    if not (one.spec.dtype.rounds_to(narrow) and other.spec.dtype.rounds_to(narrow)):
        return False
    streams = (_stream(entry, sources, narrow) for entry in (one, other))
    try:
        return all(np.array_equal(mine, theirs) for mine, theirs in zip(*streams, strict=True))
    except VerificationError:  # a value is beyond the range of the narrower
        return False


def _stream(
    entry: Entry,
    sources: Sources,
    dtype: DType | None = None,
    *,
    start: int = 0,
    stop: int | None = None,
    ledger: Ledger | None = None,
) -> Iterator[Array]:
    """Elements `[start, stop)` as row-major bytes of `dtype`, a block at a time, in one buffer."""
    # Most tensors of a mixture of experts are far smaller than a block.
    reader = Reader(sources, ledger or Ledger(()), page_aligned(min(_BLOCK, longest(entry))).data)
    for block in blocks(entry, reader, dtype or entry.spec.dtype, start=start, stop=stop):
        yield block.view(np.uint8)


def blocks(
    entry: Entry,
    reader: Reader,
    dtype: DType,
    *,
    limit: int = _BLOCK,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Array]:
    """Elements `[start, stop)` in row-major order as `dtype`, in one buffer of `limit` bytes.

    A block is one-dimensional and is overwritten by the next.
    """
    spec = entry.spec
    end = spec.numel if stop is None else stop
    room = min(limit // dtype.itemsize, end - start) * dtype.itemsize
    buffer = page_aligned(room).view(dtype.numpy)
    for box in blocks_of_range(spec.shape, start, end, max(len(buffer), 1)):
        block = buffer[: box.numel]
        fill(entry, box, block, reader)
        yield block


def read_array(entry: Entry, sources: Sources, records: Iterable[Record] = ()) -> Array:
    """A tensor's elements as an array of its shape.

    `records` are checksums of its files: `FormatError` where the bytes that pass are not those.
    """
    spec = entry.spec
    ledger = Ledger(records)
    out = np.empty(spec.numel, spec.dtype.numpy)
    start = 0
    for block in _stream(entry, sources, ledger=ledger):
        values = block.view(spec.dtype.numpy)
        out[start : start + len(values)] = values
        start += len(values)
    ledger.check(sources)
    return out.reshape(spec.shape)
