"""What differs between tensors that belong together, element by element, in a stream."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from msgspec import Struct
from msgspec.structs import asdict

from reshard.core.dtypes import FLOAT32, DType
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, TensorSpec, blocks
from reshard.errors import VerificationError
from reshard.progress import Progress
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader, fill, page_aligned

Kind = Literal["values", "shape", "dtype", "only in the first", "only in the second"]

_BLOCK = 4 << 20


class Difference(Struct, frozen=True):
    """A tensor that is not the same on both sides.

    For `values`: how many of its elements differ, and the largest and the mean difference of
    those that are finite on both sides.
    """

    name: str
    kind: Kind
    first: str
    second: str
    differing: int = 0
    numel: int = 0
    largest: float = 0.0
    mean: float = 0.0

    def __str__(self) -> str:
        if self.kind != "values":
            return f"{self.kind}: {' and '.join(filter(None, (self.first, self.second)))}"
        return (
            f"{self.differing} of {self.numel} elements differ, by {self.largest:.3g} at most and "
            f"{self.mean:.3g} on average"
        )


class Comparison(Struct, frozen=True):
    """Two checkpoints: `num_equal` tensors are the same bit for bit, the others are listed.

    `findings` are those of both; where a path named a folder above, which checkpoint was taken.
    """

    num_equal: int
    differences: tuple[Difference, ...]
    bytes_read: int
    findings: tuple[Finding, ...] = ()

    def __repr__(self) -> str:
        return f"<Comparison: {self.num_equal} tensors equal, {len(self.differences)} differ>"

    @property
    def same(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "num_equal": self.num_equal,
            "differences": [asdict(difference) for difference in self.differences],
            "findings": [finding.to_json() for finding in self.findings],
        }


class Pair(Struct, frozen=True):
    """One file or folder of both sides: the tensors of each, by the second's names.

    `name` is that of a file beside the model, empty for the model itself.
    """

    name: str
    first: Mapping[str, Entry]
    second: Mapping[str, Entry]


def compare(
    pairs: list[Pair],
    sources: Sources,
    progress: Progress | None = None,
    *,
    either: bool = False,
) -> Comparison:
    """Compare every tensor, the first side's rounded to the second's dtypes.

    With `either`, whichever side has the wider dtype is rounded to the other's, so that the result
    does not depend on which is the first; of two dtypes of one width, the rounding that makes the
    tensors equal is taken.

    Memory: three blocks of 4 MiB and what assembling a block takes.
    """
    rounded: Counter[tuple[str, str, str]] = Counter()
    reader = Reader(sources, Ledger(()), page_aligned(_BLOCK).data)
    buffers = page_aligned(_BLOCK), page_aligned(_BLOCK)
    total = sum(made.spec.nbytes for pair in pairs for made in pair.first.values())
    done = num_equal = 0
    differences = []
    for pair in pairs:
        prefix = f"{pair.name}: " if pair.name else ""
        for name, made in pair.first.items():
            other = pair.second.get(name)
            found = _difference(prefix + name, made, other, reader, buffers, either=either)
            if other is not None and not isinstance(found, Difference):
                num_equal += 1
                for side, dtype in (("first", made.spec.dtype), ("second", other.spec.dtype)):
                    if found != dtype and found.itemsize <= dtype.itemsize:
                        rounded[side, str(dtype), str(found)] += 1
            elif isinstance(found, Difference):
                differences.append(found)
            done += made.spec.nbytes
            if progress is not None:
                progress(done, total)
        differences += [
            Difference(prefix + name, "only in the second", "", described(entry.spec))
            for name, entry in pair.second.items()
            if name not in pair.first
        ]
    findings = tuple(
        Finding(
            "rounded", f"{count} tensors are equal once the {side}'s {wide} is rounded to {to}."
        )
        for (side, wide, to), count in rounded.items()
    )
    return Comparison(num_equal, tuple(differences), reader.bytes_read, findings)


def described(spec: TensorSpec) -> str:
    """A tensor's dtype and shape in a difference."""
    return f"{spec.dtype} {spec.shape}"


def _difference(
    name: str,
    made: Entry,
    other: Entry | None,
    reader: Reader,
    buffers: tuple[Array, Array],
    *,
    either: bool,
) -> Difference | DType:
    """What differs, or the dtype in which both are equal bit for bit.

    Where a value is beyond the range of that dtype, elements are counted that differ unrounded.
    """
    if other is None:
        return Difference(name, "only in the first", described(made.spec), "")
    mine, theirs = made.spec, other.spec
    if mine.shape != theirs.shape:
        return Difference(name, "shape", str(mine.shape), str(theirs.shape))
    common = _common(mine.dtype, theirs.dtype, either=either)
    if not common:
        return Difference(name, "dtype", str(mine.dtype), str(theirs.dtype))
    differences = []
    for dtype in common:
        try:
            found = _values(name, made, other, dtype, reader, buffers)
        except VerificationError:  # a value of one is beyond the range of the other's dtype
            continue
        if found is None:
            return dtype
        differences.append(found)
    wide = max(mine.dtype, theirs.dtype, FLOAT32, key=lambda dtype: dtype.itemsize)
    beyond = None if differences else _values(name, made, other, wide, reader, buffers)
    return differences[0] if beyond is None else beyond


def _common(mine: DType, theirs: DType, *, either: bool) -> list[DType]:
    """The dtypes in which the two may be compared; the narrower where one is."""
    if not either:
        return [theirs] if mine.rounds_to(theirs) else []
    found = {d.name: d for d in (mine, theirs) if mine.rounds_to(d) and theirs.rounds_to(d)}
    least = min((dtype.itemsize for dtype in found.values()), default=0)
    return [found[name] for name in sorted(found) if found[name].itemsize == least]


def _values(
    name: str,
    made: Entry,
    other: Entry,
    dtype: DType,
    reader: Reader,
    buffers: tuple[Array, Array],
) -> Difference | None:
    """The elements that differ once both are of `dtype`; None where none does."""
    mine, theirs = (buffer.view(dtype.numpy) for buffer in buffers)
    differing, largest, summed, finite = 0, 0.0, 0.0, 0
    for box in blocks(other.spec.shape, len(mine)):
        one, two = mine[: box.numel], theirs[: box.numel]
        fill(made, box, one, reader)
        fill(other, box, two, reader)
        unlike = _unlike(one, two)
        if not unlike.any():
            continue
        differing += int(unlike.sum())
        gaps = _gaps(one[unlike], two[unlike])
        if gaps.size:
            largest = max(largest, float(gaps.max()))
            summed += float(gaps.sum())
            finite += gaps.size
    if not differing:
        return None
    mean = summed / finite if finite else 0.0
    text = str(dtype)
    return Difference(name, "values", text, text, differing, other.spec.numel, largest, mean)


def _unlike(one: Array, two: Array) -> Array:
    """Which elements differ in any bit."""
    bits = np.dtype((np.void, one.dtype.itemsize))
    if one.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.asarray(one.view(bits) != two.view(bits))


def _gaps(one: Array, two: Array) -> Array:
    """How far elements are apart, of those that are finite on both sides."""
    wide = np.complex128 if one.dtype.kind == "c" else np.float64
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(one.astype(wide) - two.astype(wide))
    return gaps[np.isfinite(gaps)]
