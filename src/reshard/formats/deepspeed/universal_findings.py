"""What a user should know of a universal checkpoint before a run goes on from it.

Each is a fact about DeepSpeed's own loaders (0.19.8), which no file can change: what they leave as
the script made it, what they match by position, and where stage 3 goes on wrongly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from reshard.core.findings import Finding
from reshard.core.state import Group, TrainingState
from reshard.core.tensors import Entry, Shape
from reshard.errors import listed

# The DeepSpeed whose loaders these are facts about.
VERSION = "0.19.8"
# Elements of a rank's parameters from which stage 3 makes several sub-groups (`sub_group_size`).
_SUB_GROUP_NUMEL = 1_000_000_000
#: What stage 3 opens of a parameter, by name (runtime/zero/stage3.py).
_STAGE3 = frozenset({"exp_avg", "exp_avg_sq"})
_MOMENTUM = "momentum_buffer"
# Named of a group, to tell it from the others.
_NAMED = 2


def of(
    state: TrainingState,
    groups: Sequence[Group],
    shapes: Mapping[str, Shape],
    rest: Sequence[Entry],
) -> tuple[Finding, ...]:
    """The findings on a state that is written; `rest` is what no optimizer updates."""
    return (
        *_unrestored(rest),
        *_positions(groups),
        *_stage3(state, groups, shapes),
        *_muon(state, groups),
        *_schedule(state),
    )


def _unrestored(rest: Sequence[Entry]) -> Iterator[Finding]:
    frozen = [entry.spec.name for entry in rest if entry.kind != "buffer"]
    buffers = [entry.spec.name for entry in rest if entry.kind == "buffer"]
    counted = [
        f"{len(names)} {what}{'s' * (len(names) > 1)} ({listed(names, 3)})"
        for names, what in ((frozen, "frozen parameter"), (buffers, "buffer"))
        if names
    ]
    if counted:
        yield Finding(
            "universal-unrestored",
            f"DeepSpeed does not restore {' and '.join(counted)} from a universal checkpoint; they "
            "lie in mp_rank_00_model_states.pt, under 'module'.",
        )


def _positions(groups: Sequence[Group]) -> Iterator[Finding]:
    """DeepSpeed pairs the script's groups with the file's as they come, and drops what is over."""
    if len(groups) < 2:
        return
    told = "; ".join(
        f"{number}: {len(group.names)} parameters, {listed(group.names, _NAMED)}"
        for number, group in enumerate(groups)
    )
    yield Finding(
        "universal-groups",
        f"DeepSpeed matches parameter groups by their position: the script must make these "
        f"{len(groups)}, in this order ({told}).",
    )


def _stage3(
    state: TrainingState, groups: Sequence[Group], shapes: Mapping[str, Shape]
) -> Iterator[Finding]:
    numel = sum(math.prod(shape) for shape in shapes.values())
    whole = all(state.steps[name].stored == "int" for name in state.steps)
    wrong = []
    if any(group.hyperparameters != groups[0].hyperparameters for group in groups):
        wrong.append("gives every parameter group the settings of the first")
    if state.steps and not whole and (len(groups) > 1 or numel > _SUB_GROUP_NUMEL):
        wrong.append("counts one step for all sub-groups, so that it grows several times as fast")
    others = sorted(state.moments.keys() - _STAGE3)
    if others or not state.moments.keys() >= _STAGE3:
        wrong.append(
            f"restores exp_avg and exp_avg_sq alone (here: {listed(sorted(state.moments))})"
        )
    if wrong:
        # The lines of the documentation put settings and steps right, not moments.
        fix = "Load it with ZeRO stage 1 or 2." if others else ""
        yield Finding(
            "universal-stage3",
            f"loaded by ZeRO stage 3, DeepSpeed {VERSION} {' and '.join(wrong)}; stages 1 and "
            "2 restore it right.",
            fix=fix,
        )


def _muon(state: TrainingState, groups: Sequence[Group]) -> Iterator[Finding]:
    """DeepSpeed cuts every moment as the masters are cut; where its optimizer is not offloaded,
    Muon takes what it finds for the momentum of whole parameters."""
    if _MOMENTUM in state.moments and any(g.hyperparameters.get("use_muon") for g in groups):
        yield Finding(
            "universal-muon",
            f"DeepSpeed {VERSION} cuts Muon's {_MOMENTUM} into equal parts for the ranks, and Muon "
            "takes a rank's part for the momentum of whole parameters: it fails, or goes on from "
            "another's momentum. With one rank, or offloaded to the CPU, it is right.",
        )


def _schedule(state: TrainingState) -> Iterator[Finding]:
    if state.scheduler is None:
        yield Finding(
            "universal-no-schedule",
            "it holds no state of a learning rate schedule; DeepSpeed fails (AttributeError) in "
            "a script that has one, unless the script passes load_lr_scheduler_states=False.",
        )
    if state.scaler.get("dynamic"):
        yield Finding(
            "universal-loss-scale",
            "the loss scale is not carried over: an fp16 run starts again with the loss scale of "
            "its config.",
        )
