"""Two checkpoints of any formats, tensor by tensor: `verify --against` and `diff`.

The second side's names count. Where the first has others and the second is a Hugging Face folder
with a config, the first is fitted onto it, as a conversion would be; values are compared after
rounding to the second's dtypes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from reshard import export, formats, locate
from reshard.base import CONFIG, read_base
from reshard.catalog import Catalog
from reshard.errors import VerificationError
from reshard.options import Options
from reshard.progress import Progress
from reshard.storage import Sources
from reshard.targets import Target, choose
from reshard.tensors import Entry, blocks
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Array, Reader, fill
from reshard.verification import Verified, verify_folder

PathLike = str | os.PathLike[str]
Kind = Literal["values", "shape", "dtype", "only in the first", "only in the second"]

_BLOCK = 4 << 20


@dataclass(frozen=True, slots=True)
class Difference:
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two checkpoints: `num_equal` tensors are the same bit for bit, the others are listed."""

    num_equal: int
    differences: tuple[Difference, ...]
    bytes_read: int

    @property
    def same(self) -> bool:
        return not self.differences

    def to_json(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "num_equal": self.num_equal,
            "differences": [asdict(difference) for difference in self.differences],
        }


def diff(first: PathLike, second: PathLike, *, progress: Progress | None = None) -> Comparison:
    """Compare two checkpoints of any formats, tensor by tensor.

    Memory: a few blocks of 4 MiB. Raises a `ReshardError` where one cannot be read.
    """
    with Sources() as sources:
        mine = locate.read(Path(first), sources, formats.Selection())
        theirs = locate.read(Path(second), sources, formats.Selection())
        targets = _named_alike(mine, theirs, sources)
        return _compare(targets, theirs.entries, sources, progress)


def verify(
    folder: PathLike,
    against: PathLike | None = None,
    *,
    tag: str | None = None,
    prefix: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> Verified:
    """Read a converted folder again and compare every tensor, bit for bit.

    Without `against`, with the digests in its `reshard.json`; with the checkpoint `against` that
    it was converted from (`tag` and `prefix` as for `convert`), with the checkpoint itself, read
    and rounded anew. Tensors that the conversion took from its base are not in the checkpoint and
    not compared.

    Raises `VerificationError` naming the first tensor that differs.
    """
    if against is None:
        return verify_folder(Path(folder), threads=threads, progress=progress)
    with Sources() as sources:
        source = locate.read(Path(against), sources, formats.Selection(tag, prefix, True))
        written = formats.read(Path(folder), sources, formats.Selection())
        targets = _named_alike(source, written, sources)
        found = _compare(targets, written.entries, sources, progress)
    for difference in found.differences:
        raise VerificationError(
            f"it is not what {os.fspath(against)} holds; {difference}.",
            path=folder,
            tensor=difference.name,
            hint=f"{len(found.differences)} tensors differ, {found.num_equal} are equal.",
        )
    return Verified(found.num_equal, found.bytes_read)


def _named_alike(first: Catalog, second: Catalog, sources: Sources) -> list[Target]:
    """The first side's tensors by the second's names and dtypes, as far as they can be."""
    folder = second.origin.root
    names = set(first.names())
    fits = folder.is_dir() and (folder / CONFIG).is_file() and second.format == "huggingface"
    if names >= set(second.entries) or not fits:
        by_name = {alias: e for e in first.entries.values() for alias in (e.spec.name, *e.aliases)}
        held = [(n, e) for n, e in by_name.items() if n in second.entries or n in first.entries]
        return choose(held, _castable(by_name, second.entries), "base")
    options = Options(
        folder, folder, folder, "hf", formats.Selection(), "base", 1, fill_from_base=True
    )
    exported = export.onto(first, read_base(folder, sources), options, sources)
    return [target for target in exported.model if target.spec.name not in exported.filled]


def _castable(first: Mapping[str, Entry], second: Mapping[str, Entry]) -> dict[str, Entry]:
    """The second side's tensors whose dtype the first's may be rounded to."""
    return {
        name: entry
        for name, entry in second.items()
        if name in first
        and first[name].spec.dtype.floating
        and entry.spec.dtype.floating
        and first[name].spec.dtype.itemsize >= entry.spec.dtype.itemsize > 1
    }


def _compare(
    targets: list[Target],
    second: Mapping[str, Entry],
    sources: Sources,
    progress: Progress | None,
) -> Comparison:
    reader = Reader(sources, Ledger(()), memoryview(bytearray(2 * _BLOCK)))
    total = sum(target.spec.nbytes for target in targets)
    done = 0
    differences = []
    names = {target.spec.name for target in targets}
    for target in targets:
        other = second.get(target.spec.name)
        found = _difference(target, other, reader)
        if found is not None:
            differences.append(found)
        done += target.spec.nbytes
        if progress is not None:
            progress(done, total)
    differences += [
        Difference(name, "only in the second", "", f"{entry.spec.dtype} {entry.spec.shape}")
        for name, entry in second.items()
        if name not in names
    ]
    equal = len(targets) - sum(d.name in names for d in differences)
    return Comparison(equal, tuple(differences), reader.bytes_read)


def _difference(target: Target, other: Entry | None, reader: Reader) -> Difference | None:
    spec = target.spec
    if other is None:
        return Difference(spec.name, "only in the first", f"{spec.dtype} {spec.shape}", "")
    if spec.shape != other.spec.shape:
        return Difference(spec.name, "shape", str(spec.shape), str(other.spec.shape))
    if spec.dtype != other.spec.dtype:
        return Difference(spec.name, "dtype", str(spec.dtype), str(other.spec.dtype))
    mine = np.empty(max(_BLOCK // spec.dtype.itemsize, 1), spec.dtype.numpy)
    theirs = np.empty_like(mine)
    differing, largest, summed, finite = 0, 0.0, 0.0, 0
    for box in blocks(spec.shape, len(mine)):
        one, two = mine[: box.numel], theirs[: box.numel]
        fill(target.source, box, one, reader)
        fill(other, box, two, reader)
        unlike = _unlike(one, two)
        if not unlike.any():
            continue
        differing += int(unlike.sum())
        gaps = np.abs(one[unlike].astype(np.float64) - two[unlike].astype(np.float64))
        gaps = gaps[np.isfinite(gaps)]
        if gaps.size:
            largest = max(largest, float(gaps.max()))
            summed += float(gaps.sum())
            finite += gaps.size
    if not differing:
        return None
    return Difference(
        spec.name,
        "values",
        str(spec.dtype),
        str(other.spec.dtype),
        differing,
        spec.numel,
        largest,
        summed / finite if finite else 0.0,
    )


def _unlike(one: Array, two: Array) -> Array:
    """Which elements differ in any bit."""
    bits = np.dtype((np.void, one.dtype.itemsize))
    if one.dtype.itemsize in (1, 2, 4, 8):
        bits = np.dtype(f"u{one.dtype.itemsize}")
    return np.asarray(one.view(bits) != two.view(bits))
