"""Checks of the values of an optimizer's moments, after all have passed.

A mean of squares is never below zero, and no two moments are equal bit for bit unless both are
zero: what is not so lies in another's place, as after a copy of a file under a wrong name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import xxhash

from reshard.core.digests import LEAF_NBYTES, joined
from reshard.core.findings import Finding
from reshard.core.state import STATE_TABLE, TrainingState, tensor_name
from reshard.core.tensors import TensorSpec
from reshard.errors import VerificationError, listed
from reshard.transfer.outcome import Outcome

# Moments of fewer elements may well be equal.
_MIN_NUMEL = 8
# AMSGrad's greatest mean of squares is the mean itself while that rises.
_MAXIMUM = "max_exp_avg_sq"
_HINT = "Copy the checkpoint again, or use another save. The weights alone: leave out --optimizer."
# torch 2.13 gathers both into one buffer on the CPU (torch/distributed/fsdp/_optim_utils.py).
_FSDP1 = (
    "FSDP1's FULL_STATE_DICT on the CPU causes this: save with SHARDED_STATE_DICT. In all other "
    "cases a file is damaged. Copy the checkpoint again, or use another save. The weights alone: "
    "leave out --optimizer."
)


def check_values(state: TrainingState | None, outcome: Outcome) -> None:
    """Raise `VerificationError` where a mean of squares holds what is below zero, or where it is
    the same as the mean itself.
    """
    for (table, name), found in outcome.not_finite.items():
        if table == STATE_TABLE and found.negative:
            raise VerificationError(
                f"{found.negative} of its values are negative, but a second moment cannot be: it "
                "is another tensor, or damaged.",
                tensor=f"{table}: {name}",
                hint=_HINT,
            )
    for kinds in _same(state, outcome, across=False):
        raise VerificationError(
            f"it equals {kinds[1]} bit for bit: one of the two is a copy of the other.",
            tensor=f"{STATE_TABLE}: {kinds[0]}",
            hint=_FSDP1,
        )


def alike(state: TrainingState | None, outcome: Outcome) -> list[Finding]:
    """The finding that moments of one kind are those of several parameters."""
    found = [" = ".join(names) for names in _same(state, outcome, across=True)]
    if not found:
        return []
    return [Finding("state-alike", f"moments are equal bit for bit: {listed(found)}.")]


def _same(
    state: TrainingState | None, outcome: Outcome, *, across: bool
) -> Iterator[tuple[str, ...]]:
    """The moments that have one digest: of one parameter, or `across` parameters of one kind."""
    groups: dict[tuple[str, str], list[str]] = {}
    specs: dict[str, TensorSpec] = {}
    for kind, table in ({} if state is None else state.moments).items():
        if kind == _MAXIMUM and not across:
            continue
        for name, entry in table.items():
            key = tensor_name(kind, name)
            digest = outcome.digests.get((STATE_TABLE, key))
            if digest is not None and entry.spec.numel >= _MIN_NUMEL:
                specs[key] = entry.spec
                groups.setdefault((kind if across else name, digest), []).append(key)
    for (_, digest), keys in groups.items():
        if len(keys) > 1 and digest != _zeros(specs[keys[0]].nbytes):
            yield tuple(keys)


@cache
def _zeros(nbytes: int) -> str:
    """The digest of a tensor of zeros."""
    whole, rest = divmod(nbytes, LEAF_NBYTES)
    leaf = xxhash.xxh3_128_digest(bytes(LEAF_NBYTES)) if whole else b""
    last = [xxhash.xxh3_128_digest(bytes(rest))] if rest else []
    return joined([leaf] * whole + last)
