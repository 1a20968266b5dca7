"""Comparison of the training state of two checkpoints: moments are tensors like any other.

Moments of a kind are one more table of the two sides, so that a comparison sums them by layer as it
does the weights: `exp_avg: model.layers.3`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from msgspec.structs import replace

from reshard.comparison.result import Compared
from reshard.comparison.values import Pair
from reshard.conversion.base_model import Base
from reshard.conversion.options import Options
from reshard.conversion.output_model import OutputModel
from reshard.conversion.planning import carried_along
from reshard.conversion.training import with_state
from reshard.core.catalog import Catalog
from reshard.core.state import Group, TrainingState
from reshard.errors import PlanError, brief
from reshard.storage.local import Sources


def both(first: Catalog, second: Catalog) -> tuple[TrainingState, TrainingState]:
    """The states of two checkpoints. Raises `PlanError` where one holds none."""
    found = []
    for catalog in (first, second):
        state = catalog.training_state()
        if state is None:
            raise PlanError(
                "it holds no training state to compare.",
                path=catalog.origin.root,
                hint="Leave out --optimizer.",
            )
        found.append(state)
    return found[0], found[1]


def of_output(
    source: Catalog,
    written: Catalog,
    options: Options,
    sources: Sources,
    planned: tuple[Base, OutputModel] | None,
) -> tuple[TrainingState, TrainingState]:
    """The state of a checkpoint as its conversion carried it, and that of the output.

    `planned` are the base and the plan onto it, where a base is given. Raises `PlanError` where the
    names were changed and none is.
    """
    catalog, state = with_state(source, replace(options, optimizer=True))
    there = written.training_state()
    if state is None or there is None:
        raise PlanError("it holds no training state.", path=written.origin.root)
    if set(state.names) != set(there.names):
        if planned is None:
            raise PlanError(
                "the names in its optimizer's state differ from the checkpoint's.",
                path=written.origin.root,
                hint="Pass --base, the base of the conversion.",
            )
        base, output = planned
        # What was asked for of the output's groups, as --hyperparameters, is not asked for here.
        output = carried_along(output, state, catalog, base, options, sources, completed=False)
        state = output.state or state
    return state, there


def pairs(first: TrainingState, second: TrainingState) -> list[Pair]:
    """The moments of both, a table for each kind."""
    kinds = dict.fromkeys((*first.moments, *second.moments))
    return [Pair(kind, first.moments.get(kind, {}), second.moments.get(kind, {})) for kind in kinds]


def settings(
    first: TrainingState, second: TrainingState, *, completed: bool = False
) -> Iterator[Compared]:
    """The steps and the groups' settings, each equal or not; of settings only what differs.

    With `completed` the second is the first with more hyperparameters, which are not compared, and
    groups with equal settings may be one group of it, as in a flattened state.
    """
    merged = completed and len(second.groups) < len(first.groups)
    for name in dict.fromkeys((*first.steps, *second.steps)):
        yield _setting(f"step: {name}", *(_count(state, name) for state in (first, second)))
    mine, theirs = (_by_parameter(state) for state in (first, second))
    said: set[tuple[str, str, str]] = set()
    for name in dict.fromkeys((*mine, *theirs)):
        pair = mine.get(name), theirs.get(name)
        for key, *values in _differing(*pair, completed=completed, merged=merged):
            if (key, *values) not in said:  # once for each group, by its first parameter
                said.add((key, values[0], values[1]))
                yield Compared(f"group of {name}: {key}", "setting", values[0], values[1])


def _setting(name: str, first: str, second: str) -> Compared:
    return Compared(name, "equal" if first == second else "setting", first, second)


def _count(state: TrainingState, name: str) -> str:
    step = state.steps.get(name)
    return "none" if step is None else str(step.count)


def _by_parameter(state: TrainingState) -> Mapping[str, Group]:
    return {name: group for group in state.groups for name in group.names}


def _differing(
    first: Group | None, second: Group | None, *, completed: bool, merged: bool
) -> Iterator[tuple[str, str, str]]:
    if first is None or second is None:
        yield "group", _held(first), _held(second)
        return
    apart = set(first.names) - set(second.names) if merged else {*first.names} ^ {*second.names}
    if apart:
        yield "parameters", str(len(first.names)), str(len(second.names))
    mine, theirs = first.hyperparameters, second.hyperparameters
    for key in dict.fromkeys((*mine, *(() if completed else theirs))):
        values = [_listed(settings.get(key, "none")) for settings in (mine, theirs)]
        if values[0] != values[1]:
            yield key, values[0], values[1]


def _held(group: Group | None) -> str:
    return "none" if group is None else "one"


def _listed(value: object) -> str:
    return brief(list(value) if isinstance(value, tuple) else value)
