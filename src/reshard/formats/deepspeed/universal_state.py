"""The state in a universal checkpoint: one file for each parameter and kind.

    zero/<parameter>/{fp32,exp_avg,exp_avg_sq}.pt    {"param": tensor}, or the tensor itself, flat
    zero/<parameter>/step.pt                         the step's tensor; not of a ZeRO-3 save
    zero/optimizer_state.pt                          param_groups; of ZeRO-3 rank 0's whole state,
                                                     whose first step is that of all parameters

The model file's lists say which parameters a group has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from reshard.containers.torch import TorchFile
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.optimizer import eight_bit, hyperparameters, parse_step
from reshard.containers.torch.plain import PlainData
from reshard.core.catalog import Catalog
from reshard.core.state import Group, Step, TrainingState
from reshard.core.tensors import Entry, Record
from reshard.errors import FormatError, IncompleteError
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.place import Location
from reshard.formats.deepspeed.universal import master, stored
from reshard.formats.deepspeed.wrapped import scaling
from reshard.storage.local import child
from reshard.storage.paths import is_file, matching

_STEP, _MASTER = "step", "fp32"
_OPTIMIZER = "optimizer_state.pt"
_AGAIN = "Copy the whole folder, or make the universal checkpoint again."


def read(location: Location, saved: Saved, catalog: Catalog, plain: PlainData) -> TrainingState:
    """The state of every parameter that the model file lists.

    Raises `IncompleteError` where a kind of moment that others have is missing of one.
    """
    zero = location.folder / "zero"
    groups = saved.model[0].groups
    names = [tuple(group) for group in groups]
    every = [name for group in names for name in group]
    moments: dict[str, dict[str, Entry]] = {}
    steps: dict[str, Step] = {}
    records: list[Record] = []
    for name in every:
        folder = child(zero, name)
        for path in sorted(matching(folder, "*.pt")):
            kind = path.stem
            if kind == _MASTER:
                continue
            file = read_torch(plain.sources.open(child(folder, path.name)))
            if kind == _STEP:
                found = parse_step(_value(file), plain, path)
                steps.update({} if found is None else {name: found})
                continue
            tensor = stored(file, path)
            if not tensor.dtype.floating:
                raise eight_bit(path, kind)
            shape = catalog.entries[name].spec.shape
            moments.setdefault(kind, {})[name] = master(name, shape, tensor, path)
            records += file.records
    top = _optimizer(zero, plain)
    if not steps and (step := _first_step(top, plain, zero)) is not None:
        steps = dict.fromkeys(every, step)
    _check_complete(zero, moments, steps, names)
    _check_steps(zero, steps, names)
    return TrainingState(
        moments=moments,
        masters={name: catalog.entries[name] for name in every},
        steps=steps,
        groups=_groups(top, names, plain),
        scaler=scaling(top, plain),
        records=tuple(records),
        source="a universal checkpoint",
    )


def _value(file: TorchFile) -> object:
    return file.value.get("param") if isinstance(file.value, dict) else file.value


def _optimizer(zero: Path, plain: PlainData) -> dict[str, Any]:
    path = zero / _OPTIMIZER
    if not is_file(path):
        raise IncompleteError(
            "it is missing, so the hyperparameters of the groups are unknown.",
            path=path,
            hint=_AGAIN,
        )
    value = read_torch(plain.sources.open(child(zero, _OPTIMIZER))).value
    return value if isinstance(value, dict) else {}


def _first_step(top: dict[str, Any], plain: PlainData, zero: Path) -> Step | None:
    inner = top.get("optimizer_state_dict")
    states = inner.get("state") if isinstance(inner, dict) else None
    first = next(iter(states.values()), None) if isinstance(states, dict) else None
    value = first.get("step") if isinstance(first, dict) else None
    return parse_step(value, plain, zero / _OPTIMIZER)


def _groups(
    top: dict[str, Any], names: list[tuple[str, ...]], plain: PlainData
) -> tuple[Group, ...]:
    """The parameter groups: each covers some of the lists of the model file, by their numbers."""
    raw = top.get("param_groups")
    stated = [group for group in raw if isinstance(group, dict)] if isinstance(raw, list) else []
    covers = [list(group.get("params") or ()) for group in stated]
    numbers = [number for cover in covers for number in cover]
    if sorted(numbers, key=str) != sorted(range(len(names)), key=str):
        return tuple(Group(group) for group in names)
    return tuple(
        Group(
            tuple(name for number in cover for name in names[number]),
            hyperparameters(group, plain, f"param_groups.{at}"),
        )
        for at, (group, cover) in enumerate(zip(stated, covers, strict=True))
    )


def _check_complete(
    zero: Path,
    moments: dict[str, dict[str, Entry]],
    steps: dict[str, Step],
    names: list[tuple[str, ...]],
) -> None:
    """Within a group of parameters all have the same kinds of moments, and all or none a step."""
    held: list[tuple[str, Any]] = [*moments.items(), *([(_STEP, steps)] if steps else [])]
    for kind, table in held:
        for group in names:
            absent = [name for name in group if name not in table]
            if absent and len(absent) < len(group):
                raise IncompleteError(
                    f"its {kind} is missing, although other parameters of its group have theirs.",
                    path=zero / absent[0] / f"{kind}.pt",
                    tensor=absent[0],
                    hint=_AGAIN,
                )


def _check_steps(zero: Path, steps: dict[str, Step], names: list[tuple[str, ...]]) -> None:
    """DeepSpeed updates a list of parameters as one flat tensor, which has had one number of
    steps."""
    for group in names:
        first = steps.get(group[0]) if group else None
        for name in group:
            if first is not None and steps[name].count != first.count:
                raise FormatError(
                    f"its step count is {steps[name].count}, but that of {group[0]} in the same "
                    f"flat tensor is {first.count}: files of different saves are mixed.",
                    path=zero / name / f"{_STEP}.pt",
                    tensor=name,
                    hint=_AGAIN,
                )
