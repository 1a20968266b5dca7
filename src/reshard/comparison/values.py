"""Compare paired tensors element by element, in a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from reshard.comparison.measures import Array, Change, Meter, counted
from reshard.comparison.result import Compared, Comparison, described
from reshard.comparison.spectrum import energies
from reshard.core.dtypes import FLOAT32, DType
from reshard.core.findings import Finding
from reshard.core.strides import blocks
from reshard.core.tensors import Box, Entry
from reshard.errors import VerificationError
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Reader, fill, page_aligned

_BLOCK = 4 << 20


class Pair(Struct, frozen=True):
    """One file or folder of both sides: the tensors of each, by the second's names.

    `name` is that of a file beside the model, empty for the model itself.
    """

    name: str
    first: Mapping[str, Entry]
    second: Mapping[str, Entry]


class Method(Struct, frozen=True):
    """How two tensors are compared.

    `either`: whichever side has the wider dtype is rounded to the other's, so that the result does
    not depend on which is the first; of two dtypes of one width, the rounding that makes the
    tensors equal is taken. Else the first is rounded to the second's. `norms`: equal tensors are
    measured too. `spectrum`: so is the rank of the changes.
    """

    either: bool = False
    norms: bool = False
    spectrum: bool = False


def compare(
    pairs: list[Pair],
    sources: Sources,
    progress: Progress | None = None,
    *,
    method: Method | None = None,
) -> Comparison:
    """Compare every tensor.

    Memory: three blocks of 4 MiB and what assembling a block takes.
    """
    rounded: Counter[tuple[str, str, str]] = Counter()
    work = _Work(sources, Method() if method is None else method)
    total = sum(made.spec.nbytes for pair in pairs for made in pair.first.values())
    done = 0
    tensors = []
    for pair in pairs:
        prefix = f"{pair.name}: " if pair.name else ""
        for name, made in pair.first.items():
            other = pair.second.get(name)
            found = work.compared(prefix + name, made, other)
            tensors.append(found)
            if other is not None and found.kind == "equal":
                for side, dtype in (("first", made.spec.dtype), ("second", other.spec.dtype)):
                    if (
                        found.first != str(dtype)
                        and found.nbytes <= made.spec.numel * dtype.itemsize
                    ):
                        rounded[side, str(dtype), found.first] += 1
            done += made.spec.nbytes
            if progress is not None:
                progress(done, total)
        tensors += [
            Compared(prefix + name, "only in the second", "", described(entry.spec))
            for name, entry in pair.second.items()
            if name not in pair.first
        ]
    findings = tuple(
        Finding(
            "rounded", f"{count} tensors are equal once the {side}'s {wide} is rounded to {to}."
        )
        for (side, wide, to), count in rounded.items()
    )
    return Comparison(
        tuple(tensors), work.reader.bytes_read, findings, sizes=counted(work.exponents)
    )


class _Work:
    """The buffers in which tensors are compared, and what was counted over all of them."""

    def __init__(self, sources: Sources, method: Method) -> None:
        self.method = method
        self.reader = Reader(sources, Ledger(()), page_aligned(_BLOCK).data)
        self.exponents = Meter().exponents
        self._buffers = page_aligned(_BLOCK), page_aligned(_BLOCK)

    def compared(self, name: str, entry: Entry, other: Entry | None) -> Compared:
        """Two tensors, or the first alone, compared."""
        if other is None:
            return Compared(name, "only in the first", described(entry.spec), "")
        mine, theirs = entry.spec, other.spec
        if mine.shape != theirs.shape:
            return Compared(name, "shape", str(mine.shape), str(theirs.shape))
        common = _common(mine.dtype, theirs.dtype, either=self.method.either)
        if not common:
            return Compared(name, "dtype", str(mine.dtype), str(theirs.dtype))
        change, dtype, counts = self._nearest(entry, other, common)
        self.exponents += counts
        text, nbytes = str(dtype), mine.numel * dtype.itemsize
        if not change.differing:
            return Compared(name, "equal", text, text, mine.shape, nbytes, change)
        if self.method.spectrum and change.moved and dtype.numpy.kind != "c":
            energy = energies(lambda: self._changes(entry, other, dtype), mine.shape, change.moved)
            change = replace(change, energy=energy)
        return Compared(name, "values", text, text, mine.shape, nbytes, change)

    def _nearest(
        self, entry: Entry, other: Entry, common: list[DType]
    ) -> tuple[Change, DType, Array]:
        """What differs, in the dtype of `common` in which the two are equal, else in the first.

        Where a value of one is beyond the range of all of them, both are compared unrounded.
        """
        first = None
        for dtype in common:
            counts = np.zeros_like(self.exponents)
            try:
                change = self._measured(entry, other, dtype, counts)
            except VerificationError:  # beyond the range of `dtype`
                continue
            if not change.differing:
                return change, dtype, counts
            first = first or (change, dtype, counts)
        if first is not None:
            return first
        wide = max(entry.spec.dtype, other.spec.dtype, FLOAT32, key=lambda dtype: dtype.itemsize)
        counts = np.zeros_like(self.exponents)
        return self._measured(entry, other, wide, counts), wide, counts

    def _measured(self, entry: Entry, other: Entry, dtype: DType, counts: Array) -> Change:
        """The elements that differ once both are of `dtype`."""
        meter = Meter(norms=self.method.norms, exponents=counts)
        for _, one, two in self._blocks(entry, other, dtype):
            meter.add(one, two)
        return meter.result()

    def _blocks(
        self, entry: Entry, other: Entry, dtype: DType
    ) -> Iterator[tuple[Box, Array, Array]]:
        """Both tensors in blocks, as flat arrays of `dtype`, which the next block overwrites."""
        mine, theirs = (buffer.view(dtype.numpy) for buffer in self._buffers)
        for box in blocks(other.spec.shape, len(mine)):
            one, two = mine[: box.numel], theirs[: box.numel]
            fill(entry, box, one, self.reader)
            fill(other, box, two, self.reader)
            yield box, one, two

    def _changes(self, entry: Entry, other: Entry, dtype: DType) -> Iterator[tuple[Box, Array]]:
        """The change in blocks, as float32; 0 where an element is not finite on a side."""
        wide = np.float64 if dtype.itemsize > 4 else np.float32
        for box, one, two in self._blocks(entry, other, dtype):
            with np.errstate(over="ignore", invalid="ignore"):
                gap = (one.astype(wide) - two.astype(wide)).astype(np.float32)
            yield box, np.where(np.isfinite(gap), gap, 0).reshape(box.sizes)


def _common(mine: DType, theirs: DType, *, either: bool) -> list[DType]:
    """The dtypes in which the two may be compared; the narrower where one is."""
    if not either:
        return [theirs] if mine.rounds_to(theirs) else []
    found = {d.name: d for d in (mine, theirs) if mine.rounds_to(d) and theirs.rounds_to(d)}
    least = min((dtype.itemsize for dtype in found.values()), default=0)
    return [found[name] for name in sorted(found) if found[name].itemsize == least]
