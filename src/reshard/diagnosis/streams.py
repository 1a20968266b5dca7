"""Passes over the weights, a block at a time: which are not finite, which are the base's.

Memory: each thread holds a block of at most 8 MiB twice and a scratch buffer of 4 MiB.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from reshard.core.dtypes import DType
from reshard.core.tensors import Entry, blocks
from reshard.errors import VerificationError
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer import finite
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader, fill
from reshard.transfer.finite import NotFinite

_BLOCK = 4 << 20
# A trained tensor differs from the base's within its first elements: the first look is short.
_FIRST_LOOK = 64 << 10
# A tensor stored in another order is read over and over, once a block: fewer, larger blocks.
_STRIDED_BLOCK = 8 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


def not_finite(
    entries: Mapping[str, Entry],
    sources: Sources,
    *,
    threads: int,
    progress: Progress | None = None,
) -> dict[str, NotFinite]:
    """The tensors that hold NaN or infinity, by name. Reads every byte of floating tensors."""
    chosen = [entry for entry in entries.values() if finite.has_special(entry.spec.dtype)]
    total = sum(entry.spec.nbytes for entry in chosen)
    count = _Counter(total, progress)

    def look(entry: Entry, reader: Reader) -> NotFinite:
        found = NotFinite()
        for part in _parts(entry, entry.spec.dtype, reader, _BLOCK):
            found += finite.not_finite(part, entry.spec.dtype)
            count.add(part.nbytes)
        return found

    results = _each(chosen, look, sources, threads)
    return {
        entry.spec.name: result for entry, result in zip(chosen, results, strict=True) if result
    }


def same(
    pairs: Sequence[tuple[Entry, Entry]],
    sources: Sources,
    *,
    threads: int,
    progress: Progress | None = None,
) -> list[bool]:
    """Of each pair of equal shapes, whether the second, cast to the first's dtype, is the first.

    It reads up to the first difference, so very little of a trained tensor. A value of the second
    that the first's dtype cannot hold is a difference.
    """
    count = _Counter(sum(mine.spec.nbytes for mine, _ in pairs), progress)

    def look(pair: tuple[Entry, Entry], reader: Reader) -> bool:
        mine, theirs = pair
        equal = theirs.spec.dtype.rounds_to(mine.spec.dtype)
        try:
            equal = equal and _agree(pair, reader, _FIRST_LOOK, short=True)
            equal = equal and _agree(pair, reader, _BLOCK)
        except VerificationError:  # a value is beyond the range of the first's dtype
            equal = False
        count.add(mine.spec.nbytes)
        return equal

    return _each(list(pairs), look, sources, threads)


def _agree(pair: tuple[Entry, Entry], reader: Reader, limit: int, *, short: bool = False) -> bool:
    """Whether two tensors agree, or with `short` their first `limit` bytes."""
    mine, theirs = pair
    dtype = mine.spec.dtype
    if any(fragment.strides for fragment in mine.fragments + theirs.fragments):
        limit = _STRIDED_BLOCK
    ours, others = (_parts(made, dtype, reader, limit) for made in pair)
    for one, other in zip(ours, others, strict=True):
        if not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            return False
        if short:
            break
    return True


def _parts(source: Entry, dtype: DType, reader: Reader, limit: int) -> Iterator[Array]:
    """The tensor's elements in row-major order as `dtype`, in one buffer of `limit` bytes."""
    buffer = np.empty(min(limit // dtype.itemsize, source.spec.numel), dtype.numpy)
    for box in blocks(source.spec.shape, max(len(buffer), 1)):
        part = buffer[: box.numel]
        fill(source, box, part, reader)
        yield part


class _Counter:
    """Adds up the bytes of several threads and reports the sum."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._progress is not None:
                self._progress(self._done, self._total)


def _each(
    items: Sequence[Item],
    look: Callable[[Item, Reader], Result],
    sources: Sources,
    threads: int,
) -> list[Result]:
    """`look` at each item, in threads that have one reader each."""
    own = threading.local()

    def start() -> None:
        own.reader = Reader(sources, Ledger(()), memoryview(bytearray(_BLOCK)))

    with ThreadPoolExecutor(threads, thread_name_prefix="reshard", initializer=start) as pool:
        return list(pool.map(lambda item: look(item, own.reader), items))
