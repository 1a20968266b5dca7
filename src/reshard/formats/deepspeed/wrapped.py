"""The optimizer that DeepSpeed wraps, in one rank's file: what it holds of each flat tensor.

optimizer_state_dict
  base_optimizer_state      ZeRO-1, 2, BF16_Optimizer: the wrapped optimizer's state dict; its
                            parameters are the flat groups. Elastic: a list, one dict a group,
                            without param_groups: the hyperparameters are nowhere
  optimizer_state_dict      ZeRO-3: the same; its parameters are the sub-groups
  loss_scaler, dynamic_loss_scale, overflow, ..     of fp16
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.containers.torch import Opaque, TensorRef
from reshard.containers.torch.optimizer import ParamState, param_state, parse
from reshard.containers.torch.plain import PlainData
from reshard.core.state import Plain
from reshard.errors import FormatError, UnsupportedError


class WrappedGroup(Struct, frozen=True):
    """A parameter group: the numbers of its flat tensors, and its hyperparameters, if stated."""

    flats: tuple[int, ...]
    hyperparameters: Mapping[str, Plain]


class Wrapped(Struct, frozen=True):
    """What one rank's file holds of the wrapped optimizer.

    `states[n]` is what it holds of flat tensor `n`; None where it holds nothing of it yet.
    """

    path: Path
    states: tuple[ParamState | None, ...]
    groups: tuple[WrappedGroup, ...]
    scaler: Mapping[str, Plain]

    def flat(self, number: int, kind: str) -> TensorRef:
        """The moment of a kind of a flat tensor. Raises `FormatError` where there is none."""
        state = self.states[number] if number < len(self.states) else None
        found = None if state is None else state.moments.get(kind)
        if not isinstance(found, TensorRef) or len(found.shape) != 1 or found.strides is not None:
            raise FormatError(
                f"the {kind} of its flat group {number} is missing or is not a flat tensor, while "
                "other ranks have it.",
                path=self.path,
                hint="Copy all files of one save.",
            )
        return found

    def kinds(self, number: int) -> tuple[str, ...]:
        """The kinds of moments of a flat tensor."""
        state = self.states[number] if number < len(self.states) else None
        return () if state is None else tuple(state.moments)


def parse_wrapped(path: Path, value: object, flats: int, plain: PlainData) -> Wrapped:
    """The wrapped optimizer in the content of an optimizer file with a number of flat tensors.

    Raises `FormatError`, `UnsupportedError`.
    """
    top = value.get("optimizer_state_dict") if isinstance(value, dict) else None
    if not isinstance(top, dict):
        raise FormatError("it holds no optimizer_state_dict.", path=path)
    base = top.get("base_optimizer_state", top.get("optimizer_state_dict"))
    scaler = scaling(top, plain)
    if isinstance(base, list):
        states = [param_state(state, plain, path, f"group {at}") for at, state in enumerate(base)]
        groups = [WrappedGroup((at,), {}) for at in range(flats)]
        return Wrapped(path, tuple(states), tuple(groups), scaler)
    optimizer = parse(base, plain, path)
    order: list[int] = []
    covering = []
    for group in optimizer.groups:
        numbers = tuple(key for key in group.params if isinstance(key, int))
        covering.append(WrappedGroup(numbers, group.hyperparameters))
        order += numbers
    if sorted(order) != list(range(flats)):
        raise FormatError(
            f"its optimizer's parameter groups cover the flat tensors {order}, and it has {flats}.",
            path=path,
            hint="The file is damaged, or of an optimizer that is not supported.",
        )
    return Wrapped(
        path, tuple(optimizer.states.get(n) for n in range(flats)), tuple(covering), scaler
    )


def scaling(top: Mapping[str, Any], plain: PlainData) -> dict[str, Plain]:
    """The loss scaler of fp16 training; in other training it scales by one and is left out."""
    scaler = top.get("loss_scaler")
    stated: dict[str, Any] = {}
    if isinstance(scaler, Opaque) and isinstance(scaler.state, dict):
        stated = scaler.state
    elif "cur_scale" in top:
        stated = {k: top[k] for k in ("cur_scale", "cur_iter", "last_overflow_iter") if k in top}
    found = plain.mapping(stated, "loss_scaler")
    if found.get("cur_scale") in (None, 1, 1.0):
        return {}
    return {**found, "dynamic": top.get("dynamic_loss_scale") is True}


def refuse_sharded(state: ParamState, path: Path, name: str) -> dict[str, TensorRef]:
    """The moments of a parameter, which must be plain tensors."""
    found = {}
    for kind, tensor in state.moments.items():
        if not isinstance(tensor, TensorRef):
            raise UnsupportedError(
                f"its {kind} is {tensor.describe()}, which is not supported.",
                path=path,
                tensor=name,
            )
        found[kind] = tensor
    return found
