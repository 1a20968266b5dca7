"""Two folders' tensors against each other, element by element, in blocks.

Logits alone cannot tell a model that was trained for a few steps from the same model rounded:
both differ little. The weights can: rounding leaves one side's values among the numbers of the
coarser type, and rounds the other side onto exactly them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import numpy as np

from reshard.core.dtypes import BFLOAT16, FLOAT16, DType
from reshard.core.tensors import Entry
from reshard.evaluate.report import Weights
from reshard.storage.local import Sources
from reshard.transfer.fill import Array
from reshard.transfer.passes import Readers
from reshard.transfer.reading import blocks

Relation = Literal["identical", "rounded", "different"]

# The types that models are rounded to.
_ROUNDED_TO = (BFLOAT16, FLOAT16)
_EXAMPLES = 10
# Elements of a block: 16 MiB once they are float64, in which two types are compared.
BLOCK_NUMEL = 2 << 20


def compare_weights(
    here: Mapping[str, Entry],
    there: Mapping[str, Entry],
    sources: Sources,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Weights | None:
    """Compare the tensors that both have; None if they share no name (another layout)."""
    shared = sorted(here.keys() & there.keys())
    if not shared:
        return None
    relations: dict[str, Relation] = {}
    for done, name in enumerate(shared, start=1):
        relations[name] = relate(here[name], there[name], sources)
        if on_tensor is not None:
            on_tensor(done, len(shared))
    found = list(relations.values())
    examples = [name for name in shared if relations[name] == "different"]
    examples += sorted(here.keys() ^ there.keys())
    return Weights(
        tensors=len(shared),
        identical=found.count("identical"),
        rounded=found.count("rounded"),
        different=found.count("different"),
        only_here=len(here.keys() - there.keys()),
        only_there=len(there.keys() - here.keys()),
        examples=tuple(examples[:_EXAMPLES]),
    )


def relate(here: Entry, there: Entry, sources: Sources) -> Relation:
    """How one tensor compares with the other of its name; a tensor of another shape is different.

    Reads both once if they are equal, and up to the first difference for each way in which one
    could be the other's rounding.
    """
    if here.spec.shape != there.spec.shape:
        return "different"
    reader = Readers(sources).own()

    def pairs() -> Iterator[tuple[Array, Array]]:
        # Each value as it is stored.
        sides = (
            blocks(entry, reader, entry.spec.dtype, limit=BLOCK_NUMEL * entry.spec.dtype.itemsize)
            for entry in (here, there)
        )
        return zip(*sides, strict=True)

    if all(_equal(ours, theirs) for ours, theirs in pairs()):
        return "identical"
    if not (here.spec.dtype.floating and there.spec.dtype.floating):
        return "different"
    for kind in _ROUNDED_TO:
        if all(_rounds_to(ours, theirs, kind) for ours, theirs in pairs()):
            return "rounded"
        if all(_rounds_to(theirs, ours, kind) for ours, theirs in pairs()):
            return "rounded"
    return "different"


def _equal(one: Array, other: Array) -> bool:
    """Whether all values are equal; float64 holds every smaller type's exactly."""
    if one.dtype != other.dtype and "c" not in (one.dtype.kind, other.dtype.kind):
        one, other = one.astype(np.float64), other.astype(np.float64)
    return np.array_equal(one, other)


def _rounds_to(fine: Array, coarse: Array, kind: DType) -> bool:
    """Whether `coarse` holds only numbers of `kind`, and `fine` rounds to exactly these."""
    with np.errstate(over="ignore"):
        return _equal(coarse.astype(kind.numpy), coarse) and _equal(fine.astype(kind.numpy), coarse)
