"""Two folders' tensors against each other, element by element, in blocks.

Logits alone cannot tell a model that was trained for a few steps from the same model rounded:
both differ little. The weights can: rounding leaves one side's values among the numbers of the
coarser type, and rounds the other side onto exactly them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from reshard.evaluate.report import Weights as WeightsFound
from reshard.evaluate.scan import Weights, rows_per_block

Relation = Literal["identical", "rounded", "different"]

# The types that models are rounded to, and whether one side's values are all of that type.
_ROUNDED_TO = (torch.bfloat16, torch.float16)
_EXAMPLES = 10


def compare_weights(
    here: Weights, there: Weights, on_tensor: Callable[[int, int], None] | None = None
) -> WeightsFound | None:
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
    return WeightsFound(
        tensors=len(shared),
        identical=found.count("identical"),
        rounded=found.count("rounded"),
        different=found.count("different"),
        only_here=len(ours - theirs),
        only_there=len(theirs - ours),
        examples=tuple(examples[:_EXAMPLES]),
    )


def relate(here: Weights, there: Weights, name: str) -> Relation:
    """What one tensor is to its namesake; a tensor of another shape is different."""
    shape = here.shape(name)
    if shape != there.shape(name):
        return "different"
    identical = True
    rounded = dict.fromkeys(_ROUNDED_TO, (True, True, True))
    rows = rows_per_block(shape)
    for one, other in zip(here.blocks(name, rows), there.blocks(name, rows), strict=True):
        equal = _equal(one, other)
        identical = identical and equal
        if not (one.is_floating_point() and other.is_floating_point()):
            if not equal:
                return "different"
            continue
        rounded = {
            kind: _and(state, _rounding(one, other, kind)) for kind, state in rounded.items()
        }
        if not identical and not any(_holds(state) for state in rounded.values()):
            return "different"
    return "identical" if identical else "rounded"


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether all values are equal; float64 holds every smaller type's exactly."""
    if one.dtype != other.dtype:
        one, other = one.double(), other.double()
    equal: bool = torch.equal(one, other)
    return equal


State = tuple[bool, bool, bool]


def _rounding(one: torch.Tensor, other: torch.Tensor, kind: torch.dtype) -> State:
    """Whether both round to the same, whether the first is of that type, whether the second is."""
    first, second = one.to(kind), other.to(kind)
    return (
        torch.equal(first, second),
        _equal(first, one),
        _equal(second, other),
    )


def _and(one: State, other: State) -> State:
    return (one[0] and other[0], one[1] and other[1], one[2] and other[2])


def _holds(state: State) -> bool:
    """One side is the other, rounded."""
    same, first, second = state
    return same and (first or second)
