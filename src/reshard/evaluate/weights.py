"""Two folders' tensors against each other, element by element, in blocks.

Logits alone cannot tell a model that was trained for a few steps from the same model rounded:
both differ little. The weights can: rounding leaves one side's values among the numbers of the
coarser type, and rounds the other side onto exactly them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch

from reshard.evaluate.report import Weights
from reshard.evaluate.scan import WeightFiles, rows_per_block

Relation = Literal["identical", "rounded", "different"]

# The types that models are rounded to.
_ROUNDED_TO = (torch.bfloat16, torch.float16)
_EXAMPLES = 10


def compare_weights(
    here: WeightFiles, there: WeightFiles, on_tensor: Callable[[int, int], None] | None = None
) -> Weights | None:
    """Compare the tensors that both have; None if they share no name (another layout)."""
    ours, theirs = set(here.names()), set(there.names())
    shared = sorted(ours & theirs)
    if not shared:
        return None
    relations: dict[str, Relation] = {}
    for done, name in enumerate(shared, start=1):
        relations[name] = relate(here, there, name)
        if on_tensor is not None:
            on_tensor(done, len(shared))
    found = list(relations.values())
    examples = [name for name in shared if relations[name] == "different"]
    examples += sorted(ours ^ theirs)
    return Weights(
        tensors=len(shared),
        identical=found.count("identical"),
        rounded=found.count("rounded"),
        different=found.count("different"),
        only_here=len(ours - theirs),
        only_there=len(theirs - ours),
        examples=tuple(examples[:_EXAMPLES]),
    )


def relate(here: WeightFiles, there: WeightFiles, name: str) -> Relation:
    """What one tensor is to its namesake; a tensor of another shape is different.

    Reads both once if they are equal, and up to the first difference for each way in which one
    could be the other's rounding.
    """
    shape = here.shape(name)
    if shape != there.shape(name):
        return "different"

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        rows = rows_per_block(shape)
        return zip(here.blocks(name, rows), there.blocks(name, rows), strict=True)

    if all(_equal(ours, theirs) for ours, theirs in pairs()):
        return "identical"
    for kind in _ROUNDED_TO:
        if all(_rounds_to(ours, theirs, kind) for ours, theirs in pairs()):
            return "rounded"
        if all(_rounds_to(theirs, ours, kind) for ours, theirs in pairs()):
            return "rounded"
    return "different"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all values are equal; float64 holds every smaller type's exactly."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    equal: bool = torch.equal(one, other)
    return equal


def _rounds_to(fine: torch.Tensor, coarse: torch.Tensor, kind: torch.dtype) -> bool:
    """Whether `coarse` holds only numbers of `kind`, and `fine` rounds to exactly these."""
    if not (fine.is_floating_point() and coarse.is_floating_point()):
        return False
    return _equal(coarse.to(kind), coarse) and _equal(fine.to(kind), coarse)
