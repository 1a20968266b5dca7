"""Checks of what the weights hold."""

from __future__ import annotations

from reshard.diagnosis.case import Case
from reshard.diagnosis.signs import Signs, some


def not_finite(case: Case) -> Signs | None:
    """NaN or infinity among the weights."""
    spoilt = case.values.not_finite
    if not spoilt:
        return None
    counts = (
        f"{name} ({found.nan} NaN, {found.infinite} infinite of {case.entry(name).spec.numel})"
        for name, found in spoilt.items()
    )
    evidence = (f"{len(spoilt)} of {len(case.folder.entries)} tensors: {some(counts)}",)
    return Signs(evidence, advice="The run diverged: convert an earlier checkpoint of it.")


def identical(case: Case) -> Signs | None:
    """Every tensor is the base's."""
    values = case.values
    if not values.compared or values.changed:
        return None
    return Signs(
        (f"all {values.compared} tensors hold the base's values",),
        advice="The trained weights are not here: convert the run's checkpoint again.",
    )
