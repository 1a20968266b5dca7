"""Passes over the weights, a block at a time: what they hold, which of two models are equal.

Memory: each thread holds a block of at most 8 MiB twice and a scratch buffer of 4 MiB.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import xxhash
from msgspec import Struct

from reshard.core.dtypes import DType
from reshard.core.fragments import strided
from reshard.core.tensors import Entry, Shape
from reshard.errors import VerificationError
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer import finite
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader
from reshard.transfer.finite import NotFinite
from reshard.transfer.reading import blocks
from reshard.transfer.threads import each

_BLOCK = 4 << 20
# A trained tensor differs from the base's within its first elements: the first look is short.
_FIRST_LOOK = 64 << 10
# A tensor stored in another order is read over and over, once a block: fewer, larger blocks.
_STRIDED_BLOCK = 8 << 20


class Facts(Struct, frozen=True):
    """What one pass over a tensor shows.

    `value` is what all elements are, where there are several and they are one finite number. Of a
    pass that measures, `rms` is the root of the mean square of finite real elements and `digest`
    that of the tensor's bytes.
    """

    name: str
    shape: Shape
    numel: int
    special: NotFinite = NotFinite()
    value: float | None = None
    rms: float = 0.0
    digest: bytes = b""

    @property
    def is_matrix(self) -> bool:
        """Whether it has rows and columns: fresh norms and biases, which have not, hold one value
        throughout."""
        return len([size for size in self.shape if size > 1]) > 1


class ByValue(Struct, frozen=True):
    """Tensors whose values look wrong, each in the first list that it belongs to.

    `zero` and `constant` are matrices that hold one value throughout, `vectors` the others that do:
    fresh biases are zero and fresh norms one, where training left them alone.
    """

    not_finite: list[Facts]
    empty: list[Facts]
    zero: list[Facts]
    constant: list[Facts]
    vectors: list[Facts]


def by_value(tensors: Iterable[Facts]) -> ByValue:
    """Sort tensors by what a pass over them showed."""
    looks = ByValue([], [], [], [], [])
    for tensor in tensors:
        if tensor.special:
            looks.not_finite.append(tensor)
        elif not tensor.numel:
            looks.empty.append(tensor)
        elif tensor.value is not None:
            if not tensor.is_matrix:
                looks.vectors.append(tensor)
            else:
                (looks.constant if tensor.value else looks.zero).append(tensor)
    return looks


def scan(
    entries: Iterable[Entry],
    sources: Sources,
    *,
    threads: int,
    progress: Progress | None = None,
    heard: Callable[[int, int], None] | None = None,
    measures: bool = False,
    ledger: Ledger | None = None,
) -> list[Facts]:
    """Examine every element of every tensor. `progress` counts bytes, `heard` counts tensors.

    The bytes that pass are noted in `ledger`.
    """
    chosen = list(entries)
    count = _Counter(sum(entry.spec.nbytes for entry in chosen), progress)
    readers = Readers(sources, ledger)

    def look(entry: Entry) -> Facts:
        spec = entry.spec
        special, same = NotFinite(), _Same(spec.dtype)
        size = _Size(spec.dtype) if measures else None
        for block in blocks(entry, readers.own(), spec.dtype, limit=_BLOCK):
            bad = finite.not_finite(block, spec.dtype)
            special += bad
            same.add(block)
            if size is not None:
                size.add(block, finite=not bad)
            count.add(block.nbytes)
        value = same.value if spec.numel > 1 and not special else None
        rms, digest = (0.0, b"") if size is None else (size.rms, size.digest)
        return Facts(spec.name, spec.shape, spec.numel, special, value, rms, digest)

    return each(chosen, look, threads, heard)


def not_finite(
    entries: Mapping[str, Entry],
    sources: Sources,
    *,
    threads: int,
    progress: Progress | None = None,
) -> dict[str, NotFinite]:
    """The tensors that hold NaN or infinity, by name. Reads every byte of floating tensors."""
    chosen = [entry for entry in entries.values() if finite.has_special(entry.spec.dtype)]
    found = scan(chosen, sources, threads=threads, progress=progress)
    return {facts.name: facts.special for facts in found if facts.special}


class _Same:
    """Whether all elements so far are one: of the same bits, or zeros of either sign."""

    def __init__(self, dtype: DType) -> None:
        self._bits = f"u{dtype.itemsize}" if dtype.itemsize in (1, 2, 4, 8) else ""
        self._known = bool(self._bits) and dtype.numpy.kind != "c"
        self._negative = 1 << (8 * dtype.itemsize - 1) if dtype.floating else 0
        self._first: int | None = None
        self.value: float | None = None

    def add(self, block: Array) -> None:
        if not (self._known and block.size):
            return
        bits = block.view(self._bits)
        if self._first is None:
            self._first, self.value = int(bits[0]), float(block[0])
        if int(bits[-1]) == self._first or not self.value:  # nearly always it ends here
            alike = bits == self._first
            if not self.value and self._negative:
                alike |= bits == self._first ^ self._negative
            if alike.all():
                return
        self._known, self.value = False, None


class _Size:
    """How large the elements so far are, and the digest of their bytes."""

    def __init__(self, dtype: DType) -> None:
        self._real = dtype.floating and dtype.numpy.kind != "c"
        self._squares, self._numel = 0.0, 0
        self._hasher = xxhash.xxh3_128()

    def add(self, block: Array, *, finite: bool) -> None:
        """Note a block; one that holds what is not finite counts for the digest alone."""
        self._hasher.update(block.view(np.uint8).data)
        if self._real and finite:
            with np.errstate(over="ignore"):
                values = block.astype(np.float64 if block.dtype.itemsize > 4 else np.float32)
                self._squares += float(np.dot(values, values))
            self._numel += block.size

    @property
    def rms(self) -> float:
        return math.sqrt(self._squares / self._numel) if self._numel else 0.0

    @property
    def digest(self) -> bytes:
        return self._hasher.digest()


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
    readers = Readers(sources)

    def look(pair: tuple[Entry, Entry]) -> bool:
        mine, theirs = pair
        equal = theirs.spec.dtype.rounds_to(mine.spec.dtype)
        try:
            equal = equal and _agree(pair, readers.own(), _FIRST_LOOK, short=True)
            equal = equal and _agree(pair, readers.own(), _BLOCK)
        except VerificationError:  # a value is beyond the range of the first's dtype
            equal = False
        count.add(mine.spec.nbytes)
        return equal

    return each(pairs, look, threads)


def _agree(pair: tuple[Entry, Entry], reader: Reader, limit: int, *, short: bool = False) -> bool:
    """Whether two tensors agree, or with `short` their first `limit` bytes."""
    mine, theirs = pair
    dtype = mine.spec.dtype
    if strided(mine) or strided(theirs):
        limit = _STRIDED_BLOCK
    ours, others = (blocks(made, reader, dtype, limit=limit) for made in pair)
    for one, other in zip(ours, others, strict=True):
        if not np.array_equal(one.view(np.uint8), other.view(np.uint8)):
            return False
        if short:
            break
    return True


class Readers:
    """A reader for each thread."""

    def __init__(self, sources: Sources, ledger: Ledger | None = None) -> None:
        self._sources = sources
        self._ledger = Ledger(()) if ledger is None else ledger
        self._local = threading.local()

    def own(self) -> Reader:
        """The reader of the thread that asks."""
        reader: Reader | None = getattr(self._local, "reader", None)
        if reader is None:
            reader = Reader(self._sources, self._ledger, memoryview(bytearray(_BLOCK)))
            self._local.reader = reader
        return reader


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
