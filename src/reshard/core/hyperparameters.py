"""The settings of torch's optimizers: those in a state dict, and those that DeepSpeed's lack.

`set_optimizer_state_dict` asks a checkpoint for every key that the running optimizer has, and
ignores others. DeepSpeedCPUAdam and FusedAdam keep five of the eleven; the others are switches of
torch's own, whose defaults say what those optimizers do. A value that decides the training (`lr`,
`betas`, `eps`, `weight_decay`) is never invented. torch 2.13, torch/optim/adam.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from reshard.core.state import WEIGHTS_ALONE, Group, Plain, TrainingState
from reshard.errors import PlanError, listed

#: What AdamW's state dict must state itself.
NEEDED = ("lr", "betas", "eps", "weight_decay")
#: What else it holds.
SWITCHES: Mapping[str, Plain] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
_ADAM = frozenset({"exp_avg", "exp_avg_sq"})


def is_adam(state: TrainingState, group: Group) -> bool:
    """Whether the parameters of a group have the moments of Adam or AdamW."""
    # DeepSpeedCPULion keeps the moments of Adam, too, one of them unused; it divides by nothing.
    if group.hyperparameters and "eps" not in group.hyperparameters:
        return False
    tables = [state.moments.get(kind, {}) for kind in _ADAM]
    names = state.held.intersection(group.names)
    return all(name in table for table in tables for name in names)


def lacking(state: TrainingState, group: Group) -> list[str]:
    """What a group's parameters cannot be trained on without, and it does not state."""
    needed = NEEDED if is_adam(state, group) else ("lr",)
    return [key for key in needed if key not in group.hyperparameters]


def completed(state: TrainingState) -> TrainingState:
    """The state whose groups have every key that torch's AdamW asks for, `initial_lr` among them.

    Of another optimizer the groups are as they are, but for `initial_lr`. Raises `PlanError` where
    something is missing that a run cannot go on without: a setting, a step, all moments.
    """
    _check_held(state)
    lrs = base_lrs(state)
    groups = [
        _completed(state, at, None if lrs is None else lrs[at]) for at in range(len(state.groups))
    ]
    return replace(state, groups=tuple(groups))


def joined(groups: Iterable[Group]) -> tuple[Group, ...]:
    """The groups, of which those with the same settings are one, where the first of them stood.

    Settings are the same if they are written the same: 0 and 0.0 are two.
    """
    found: dict[str, tuple[Mapping[str, Plain], list[str]]] = {}
    for group in groups:
        settings = group.hyperparameters
        written = repr(sorted(map(repr, settings.items())))
        found.setdefault(written, (settings, []))[1].extend(group.names)
    return tuple(Group(tuple(names), settings) for settings, names in found.values())


def base_lrs(state: TrainingState) -> Sequence[float] | None:
    """The learning rates that the scheduler starts from, one for each group; None: not known."""
    found = None if state.scheduler is None else state.scheduler.get("base_lrs")
    if not isinstance(found, list | tuple) or len(found) != len(state.groups):
        return None
    rates = [rate for rate in found if isinstance(rate, int | float)]
    return rates if len(rates) == len(found) else None


def _completed(state: TrainingState, at: int, base_lr: float | None) -> Group:
    group = state.groups[at]
    settings = dict(group.hyperparameters)
    if missing := lacking(state, group):
        raise PlanError(
            f"the checkpoint does not hold the {listed(missing)} of parameter group {at}, of "
            f"{len(group.names)} parameters ({listed(group.names, 2)}).",
            hint="Pass --hyperparameters with a JSON file of them, a list with an object for each "
            'group: [{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}].',
        )
    if is_adam(state, group):
        settings = {**SWITCHES, **settings, "betas": _pair(settings["betas"], at)}
    if "initial_lr" not in settings:
        settings["initial_lr"] = settings["lr"] if base_lr is None else base_lr
    return replace(group, hyperparameters=settings)


def _pair(betas: Plain, at: int) -> tuple[Plain, ...]:
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise PlanError(f"the betas of parameter group {at} are not two numbers: {betas!r}.")
    return tuple(betas)


def _check_held(state: TrainingState) -> None:
    """Some parameters must have moments, and those of Adam a step."""
    if not state.moments:
        raise PlanError(
            "the optimizer has not made a step: it holds no moments.", hint=WEIGHTS_ALONE
        )
    without = [
        name
        for group in state.groups
        if is_adam(state, group)
        for name in group.names
        if name in state.held and name not in state.steps
    ]
    if without:
        raise PlanError(
            f"it does not state the step counts of {len(without)} parameters, which Adam needs to "
            f"correct their moments: {listed(without, 4)}.",
            hint=WEIGHTS_ALONE,
        )
