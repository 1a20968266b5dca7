"""Experts that DeepSpeed's AutoEP split, under the names that the loaded model has without it.

    <block>.experts.w1 [E, I, H], .w3 [E, I, H]    <block>.experts.gate_up_proj [E, 2I, H]
    <block>.experts.w2 [E, H, I]                   <block>.experts.down_proj [E, H, I]
    <block>.router.gate.weight                     <block>.gate.weight
    <block>.router.e_score_correction_bias         <block>.gate.e_score_correction_bias
    <block>.shared_experts.**                      <block>.shared_expert.**, where the base says so
    <block>.shared_experts_gate.weight             <block>.shared_expert_gate.weight

That is the layout of transformers 5, which the families' tables know. Read off DeepSpeed 0.19.8
(module_inject/auto_ep_layer.py, auto_ep_presets/, moe/ep_repack.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from reshard.core.arrangement import Arrangement, Concat, Whole
from reshard.core.regex import regex
from reshard.core.tensors import Shape
from reshard.errors import IncompleteError, NamesError
from reshard.naming.beginnings import heads
from reshard.naming.scanning import any_contains
from reshard.naming.schema import Schema
from reshard.naming.search import unwrap, unwrapped

_GATE, _DOWN, _UP = "w1", "w2", "w3"
_EXPERTS = regex(rf"(.+)\.experts\.({_GATE}|{_DOWN}|{_UP})")
# The router is stored as the layer's `router`, and once more under the family's own name.
_ROUTER = regex(r"(?:router|gate)\.gate\.(weight|bias)")
_BIAS = regex(r"(?:router|gate)\.e_score_correction_bias")


def blocks(shapes: Mapping[str, Shape], schema: Schema) -> frozenset[str]:
    """The modules whose experts AutoEP split, by names without wrappers' parts; none where the base
    has such names itself."""
    names = unwrapped(shapes)
    if not any_contains(names, (".experts.",)):
        return frozenset()
    plain = dict(zip(names, shapes.values(), strict=True))
    if any(_EXPERTS.fullmatch(name) for name in schema.specs):
        return frozenset()
    found = {
        match[1]
        for name, shape in plain.items()
        if len(shape) == 3 and (match := _EXPERTS.fullmatch(name)) is not None
    }
    return frozenset(block for block in found if f"{block}.router.gate.weight" in plain)


def arrangements(
    shapes: Mapping[str, Shape], modules: frozenset[str], schema: Schema
) -> dict[str, Arrangement]:
    """The tensors by the loaded model's names, each as an arrangement of those that `shapes` names.

    `modules` are the `blocks`. Raises `IncompleteError` where an expert's matrix is missing,
    `NamesError` where two tensors would get one name.
    """
    shared = any(".shared_expert." in name for name in schema.specs)
    outputs: dict[str, Arrangement] = {}
    experts: dict[str, dict[str, str]] = {}
    for name in shapes:
        plain = unwrap(name)
        expert = _EXPERTS.fullmatch(plain)
        if expert is not None and expert[1] in modules:
            experts.setdefault(expert[1], {})[expert[2]] = name
            continue
        _put(outputs, _renamed(plain, modules, shared=shared), Whole(name), name)
    for block, held in experts.items():
        lacking = {_GATE, _DOWN, _UP} - held.keys()
        if lacking:
            raise IncompleteError("it is missing.", tensor=f"{block}.experts.{min(lacking)}")
        gate_up = Concat((Whole(held[_GATE]), Whole(held[_UP])), 1)
        _put(outputs, f"{block}.experts.gate_up_proj", gate_up, held[_GATE])
        _put(outputs, f"{block}.experts.down_proj", Whole(held[_DOWN]), held[_DOWN])
    return outputs


def _renamed(name: str, modules: frozenset[str], *, shared: bool) -> str:
    """The name in the loaded model; tensors outside the blocks keep theirs."""
    block = next((head for head in heads(name) if head in modules), None)
    if block is None:
        return name
    rest = name.removeprefix(f"{block}.")
    gate = _ROUTER.fullmatch(rest)
    if gate is not None:
        rest = f"gate.{gate[1]}"
    elif _BIAS.fullmatch(rest):
        rest = "gate.e_score_correction_bias"
    elif rest.startswith("shared_experts_gate."):
        rest = f"shared_expert_gate.{rest.partition('.')[2]}"
    elif shared and rest.startswith("shared_experts."):
        rest = f"shared_expert.{rest.partition('.')[2]}"
    return f"{block}.{rest}"


def _put(outputs: dict[str, Arrangement], name: str, arrangement: Arrangement, source: str) -> None:
    if name in outputs:
        raise NamesError(f"it and another tensor are both {name!r} without AutoEP.", tensor=source)
    outputs[name] = arrangement
