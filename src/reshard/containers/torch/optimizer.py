"""A torch optimizer's state dict, as types.

    {"state": {0: {"step": .., "exp_avg": tensor, ..}, ..},
     "param_groups": [{"lr": .., "betas": (..), "params": [0, 1]}, ..]}

Numbers identify the parameters, in the order of the groups, or names where a framework replaced the
numbers. The optimizer decides which tensors a parameter has: `exp_avg` and `exp_avg_sq` of Adam,
`momentum_buffer` of SGD. The step is a tensor (torch), an integer beside the moments
(DeepSpeedCPUAdam), or one in the group (FusedAdam).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from reshard.containers.torch.plain import PlainData, number
from reshard.containers.torch.records import Opaque, TensorRef
from reshard.containers.torch.write import TensorBytes
from reshard.core.dtypes import FLOAT32
from reshard.core.state import WEIGHTS_ALONE, Plain, Step, Stored
from reshard.errors import FormatError, PlanError, UnsupportedError, brief

Key = int | str
# float32 counts every whole number up to here.
_MAX_STEP = 1 << 24
#: Keys of a group that are not hyperparameters.
NOT_HYPER = ("params", "param_names", "step")
# bitsandbytes: state1, qmap1, absmax1, ..; torchao's are tensors of a class of their own.
_EIGHT_BIT = ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
# One number for each element of the parameter, also where that is a scalar; what other optimizers
# keep as a tensor without dimensions is a setting of theirs.
_ELEMENTWISE = frozenset(
    {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "exp_inf", "square_avg", "sum"}
)
_STORED: tuple[Stored, ...] = ("float32", "int32", "int64")


class ParamState(Struct, frozen=True):
    """What the optimizer holds of one parameter (or of one flat tensor of several).

    `moments` are tensors by kind; sharded ones are records, which the format's room decodes.
    """

    moments: Mapping[str, TensorRef | Opaque]
    step: Step | None = None


class ParamGroup(Struct, frozen=True):
    """A parameter group: the keys of its parameters, and its hyperparameters.

    `param_names` are the names that the script gave its optimizer with the parameters
    (`AdamW(model.named_parameters())`, torch 2.6 and later), one for each key; else empty.
    """

    params: tuple[Key, ...]
    hyperparameters: Mapping[str, Plain]
    param_names: tuple[str, ...] = ()


class OptimizerDict(Struct, frozen=True):
    """An optimizer's state dict: what it holds by parameter, and the groups."""

    states: Mapping[Key, ParamState]
    groups: tuple[ParamGroup, ...]


def parse(value: object, plain: PlainData, path: Path) -> OptimizerDict:
    """A state dict as types; `plain` lists what is not plain data.

    Raises `FormatError` where it is not a state dict, `UnsupportedError` for 8-bit states.
    """
    if not isinstance(value, dict) or not isinstance(value.get("state"), dict):
        raise FormatError("its optimizer's state is not a dict.", path=path)
    raw = value.get("param_groups")
    if not isinstance(raw, list) or not all(isinstance(group, dict) for group in raw):
        raise FormatError("its optimizer's param_groups are not a list of dicts.", path=path)
    groups, steps = [], {}
    for at, group in enumerate(raw):
        params = _params(group.get("params"), path)
        settings = hyperparameters(group, plain, f"param_groups.{at}")
        groups.append(ParamGroup(params, settings, _param_names(group, len(params))))
        step = parse_step(group.get("step"), plain, path)
        if step is not None:
            steps.update(dict.fromkeys(params, step))
    states = {
        key: param_state(state, plain, path, f"state.{key}", steps.get(key))
        for key, state in value["state"].items()
        if isinstance(key, int | str)
    }
    return OptimizerDict(states, tuple(groups))


def _param_names(group: Mapping[object, object], count: int) -> tuple[str, ...]:
    names = group.get("param_names")
    if not isinstance(names, list | tuple) or len(names) != count:
        return ()
    return tuple(names) if all(isinstance(name, str) for name in names) else ()


def _params(value: object, path: Path) -> tuple[Key, ...]:
    keys = value if isinstance(value, list | tuple) else None
    if keys is None or not all(type(key) in (int, str) for key in keys):
        raise FormatError(f"the params of a group are {brief(value)}.", path=path)
    return tuple(keys)


def hyperparameters(
    group: Mapping[object, object], plain: PlainData, where: str
) -> dict[str, Plain]:
    """The settings of a group."""
    settings = {key: value for key, value in group.items() if key not in NOT_HYPER}
    return plain.mapping(settings, where)


def param_state(
    value: object, plain: PlainData, path: Path, where: str, step: Step | None = None
) -> ParamState:
    """The state of one parameter. `step` is that of its group; the parameter's own takes
    precedence.

    Raises `FormatError`, `UnsupportedError`.
    """
    if not isinstance(value, dict):
        raise FormatError(f"the state of a parameter is a {type(value).__name__}.", path=path)
    moments: dict[str, TensorRef | Opaque] = {}
    for kind, held in value.items():
        if not isinstance(kind, str) or kind == "step" or held is None:
            continue
        if kind in _EIGHT_BIT or _is_codes(held):
            raise eight_bit(path, kind)
        if (isinstance(held, Opaque) and held.is_tensor) or (
            isinstance(held, TensorRef) and (held.shape != () or kind in _ELEMENTWISE)
        ):
            moments[kind] = held
        else:
            plain.leave(f"{where}.{kind}")
    return ParamState(moments, parse_step(value.get("step"), plain, path) or step)


def _is_codes(value: object) -> bool:
    return (
        isinstance(value, TensorRef) and not value.dtype.floating and value.shape not in ((), (1,))
    )


def eight_bit(path: Path, kind: str) -> UnsupportedError:
    """The error for a quantised state, which another optimizer cannot use."""
    return UnsupportedError(
        f"the optimizer's state is quantised ({brief(kind)}), as in 8-bit optimizers, which is "
        "not supported.",
        path=path,
        hint=WEIGHTS_ALONE,
    )


def step_tensor(count: int, name: str) -> TensorBytes:
    """A step count as torch's optimizers keep it: a float32 tensor without dimensions.

    Raises `PlanError`, which names the parameter, for a count that float32 does not have.
    """
    if count > _MAX_STEP:
        raise PlanError(f"its step count, {count}, is too large for float32.", tensor=name)
    return TensorBytes(FLOAT32, (), struct.pack("<f", count))


def parse_step(value: object, plain: PlainData, path: Path) -> Step | None:
    """A step count. Raises `FormatError` where it is not one."""
    if value is None:
        return None
    stored: Stored = "int"
    count: object = value
    if isinstance(value, TensorRef) and value.shape in ((), (1,)):
        count = number(value, plain.sources)
        name = next((known for known in _STORED if known == value.dtype.name), None)
        stored = name or "float32"
    if isinstance(count, bool) or not isinstance(count, int | float):
        raise FormatError(f"its optimizer's step count is {brief(value)}.", path=path)
    if not math.isfinite(count) or count != int(count) or count < 0:
        raise FormatError(f"its optimizer's step count is {count}.", path=path)
    return Step(int(count), stored)
