"""The optimizer's state, where it carries names: moments in the shapes of the model's tensors.

    [chained_0.]optimizer.state.exp_avg.KEY       shaped as KEY, or in blocks (see masters.py)
    common.pt    optimizer                        of several optimizers, a dict by their numbers
                   [optimizer]
                     param_groups                 settings and steps, without parameters
                     state.common_step            the step, where the groups have none

No file says which parameters a group has. Megatron-Core makes the groups by rules, and each states
what the rule gave it: `is_expert_parallel` for the experts that several ranks share, `wd_mult` 0
for biases and tensors of one dimension, `is_decoupled_lr` for embedding and output layer. Groups
that these do not tell apart are refused. Read off megatron-core 0.12 and 0.16 (optimizer/
__init__.py, optimizer.py, distrib_optimizer.py) and files that they wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.containers import torch as torchfile
from reshard.containers.dcp.chunked import find_tensors
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.torch.optimizer import eight_bit, hyperparameters, parse_step
from reshard.containers.torch.plain import PlainData
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.state import WEIGHTS_ALONE, Group, ReadState, Step, TrainingState
from reshard.core.tensors import Entry, Shape
from reshard.errors import FormatError, UnsupportedError
from reshard.formats.megatron import masters
from reshard.formats.signs import MCORE_COMMON
from reshard.naming.megatron_into import leading_axes
from reshard.storage.local import Sources
from reshard.storage.paths import is_file

_KEY = regex(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_EXPERTS = ".mlp.experts."
_EMBEDDING_OR_OUTPUT = regex(r"(?:.*\.)?(?:embedding|output_layer)\..+")
# What Megatron-Core states in a group, which is no setting of the optimizer.
_RULES = frozenset(
    {"wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr", "default_config", "max_lr",
     "min_lr", "pre_wd_mult", "pre_lr_mult"}
)  # fmt: skip
# Parts of common.pt that belong to a schedule and to random numbers of Megatron's own.
_LEFT_OUT = ("opt_param_scheduler", "lr_scheduler", "rng_state", "rerun_state_machine")
_COUNTERS = ("iteration", "num_floating_point_operations_so_far")
_CONSUMED = "consumed_train_samples"


class _RawGroup(Struct, frozen=True):
    """A group of one of the optimizers: all that it states, and its step."""

    stated: Mapping[str, Any]
    step: Step | None


def reader(
    folder: Path, metadata: Metadata, entries: Mapping[str, Entry], sources: Sources
) -> ReadState | None:
    """What reads the state that belongs to these tensors; None where there is none."""
    keys = (*metadata.tensors, *metadata.objects)
    if not any(masters.OPTIMIZER.fullmatch(key) for key in keys):
        return None
    return ReadState(lambda: _read(folder, metadata, entries, sources))


def _read(
    folder: Path, metadata: Metadata, entries: Mapping[str, Entry], sources: Sources
) -> TrainingState:
    kinds = _kinds(metadata, entries, folder)
    of_masters = kinds.pop(masters.MASTER, {})
    if not kinds:
        masters.refuse_unnamed(metadata, folder, "moments", WEIGHTS_ALONE)
        raise UnsupportedError(
            "the optimizer's state holds no moments under the names of the model's tensors.",
            path=folder,
            hint=WEIGHTS_ALONE,
        )
    keys = [key for table in (of_masters, *kinds.values()) for key in table.values()]
    found, records = find_tensors({key: key for key in keys}, {}, metadata, folder, sources)

    def shaped(table: Mapping[str, str], kind: str) -> dict[str, Entry]:
        made = {}
        for name, key in table.items():
            if not found[key].spec.dtype.floating:
                raise eight_bit(folder, kind)
            made[name] = masters.shaped(found[key], entries[name].spec.shape, folder).renamed(name)
        return made

    moments = {kind: shaped(table, kind) for kind, table in kinds.items()}
    names = list(dict.fromkeys(name for table in moments.values() for name in table))
    plain = PlainData(sources)
    common = _common(folder, sources)
    groups = _groups(common, plain, folder)
    numbers = _assigned({name: entries[name].spec.shape for name in names}, groups, folder)
    plain_groups = [_settings(group, at, plain) for at, group in enumerate(groups)]
    members: list[list[str]] = [[] for _ in groups]
    for name, number in numbers.items():
        members[number].append(name)
    steps = {name: step for name, n in numbers.items() if (step := groups[n].step) is not None}
    left = [key for key in _LEFT_OUT if common.get(key) is not None]
    left += [key for key in metadata.objects if key.startswith("rng_state")][:1]
    return TrainingState(
        moments=moments,
        masters=shaped(of_masters, masters.MASTER),
        steps=steps,
        groups=tuple(map(Group, map(tuple, members), plain_groups)),
        counters=_counters(common),
        left_out=(*dict.fromkeys(left), *plain.left_out),
        records=tuple(records),
        findings=_findings(plain_groups),
        source="a checkpoint of Megatron-Core",
    )


def _kinds(
    metadata: Metadata, entries: Mapping[str, Entry], folder: Path
) -> dict[str, dict[str, str]]:
    """The keys of the state's tensors, by kind and by the model's tensor."""
    kinds: dict[str, dict[str, str]] = {}
    for key in metadata.tensors:
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in entries:
            continue
        kind = masters.MASTER if match[1] in masters.KINDS else match[1]
        table = kinds.setdefault(kind, {})
        if match[2] in table:
            raise FormatError(
                f"it and {table[match[2]]!r} are of one tensor.", path=folder, tensor=key
            )
        table[match[2]] = key
    return kinds


def _common(folder: Path, sources: Sources) -> dict[str, Any]:
    path = folder / MCORE_COMMON
    value = torchfile.read(sources.open(path)).value if is_file(path) else None
    return value if isinstance(value, dict) else {}


def _groups(common: Mapping[str, Any], plain: PlainData, folder: Path) -> list[_RawGroup]:
    """The groups of all optimizers, in their order."""
    top = common.get("optimizer")
    ones = [top]
    if isinstance(top, dict) and top and all(isinstance(key, int) for key in top):
        ones = list(top.values())
    groups = []
    for one in ones:
        inner = one
        while isinstance(inner, dict) and "param_groups" not in inner:
            inner = inner.get("optimizer", inner.get("optimizer_state_dict"))
        if not isinstance(inner, dict) or not isinstance(inner["param_groups"], list):
            raise UnsupportedError(
                f"{MCORE_COMMON} states no parameter groups of the optimizer, so the settings of "
                "the run are unknown.",
                path=folder,
                hint=WEIGHTS_ALONE,
            )
        state = inner.get("state")
        shared = state.get("common_step") if isinstance(state, dict) else None
        for group in inner["param_groups"]:
            if not isinstance(group, dict):
                raise FormatError("a parameter group is not a dict.", path=folder / MCORE_COMMON)
            step = parse_step(group.get("step", shared), plain, folder / MCORE_COMMON)
            groups.append(_RawGroup(group, step))
    return groups


def _assigned(
    shapes: Mapping[str, Shape], groups: Sequence[_RawGroup], folder: Path
) -> dict[str, int]:
    """The group of each tensor, by the rules that Megatron-Core makes them by.

    Raises `UnsupportedError` where the rules leave a choice.
    """
    assigned = {}
    for name, shape in shapes.items():
        left = _told(list(range(len(groups))), groups, "is_expert_parallel", _EXPERTS in name)
        decays = not name.endswith(".bias") and len(shape) - leading_axes(name) != 1
        left = _told(left, groups, "wd_mult", float(decays))
        own_rate = _EMBEDDING_OR_OUTPUT.fullmatch(name) is not None
        left = _told(left, groups, "is_decoupled_lr", own_rate)
        if len(left) != 1:
            raise UnsupportedError(
                f"its optimizer has {len(groups)} parameter groups, and no file states which of "
                "them the parameter belongs to: they are not those that Megatron-Core makes by "
                "itself.",
                path=folder,
                tensor=name,
                hint=WEIGHTS_ALONE,
            )
        assigned[name] = left[0]
    return assigned


def _told(
    numbers: list[int], groups: Sequence[_RawGroup], rule: str, expected: object
) -> list[int]:
    """The groups for which a rule has this value, where it distinguishes them."""
    values = [_stated(groups[number], rule) for number in numbers]
    if len(set(values)) < 2:
        return numbers
    return [number for number, value in zip(numbers, values, strict=True) if value == expected]


def _stated(group: _RawGroup, rule: str) -> object:
    """What a group states of a rule; NeMo puts `pre_` before it."""
    default: object = 1.0 if rule == "wd_mult" else False
    value = group.stated.get(rule, group.stated.get(f"pre_{rule}", default))
    return float(value) if rule == "wd_mult" and isinstance(value, int | float) else value


def _settings(group: _RawGroup, at: int, plain: PlainData) -> dict[str, Any]:
    held: dict[object, object] = {k: v for k, v in group.stated.items() if k not in _RULES}
    return hyperparameters(held, plain, f"param_groups.{at}")


def _findings(settings: Sequence[Mapping[str, Any]]) -> tuple[Finding, ...]:
    if all(each == settings[0] for each in settings[1:]):
        return ()
    message = (
        f"which parameters its {len(settings)} groups have is not stated: biases and tensors of "
        "one dimension were taken to be those without weight decay, as Megatron-Core does by "
        "default."
    )
    return (Finding("state-groups-by-rule", message),)


def _counters(common: Mapping[str, Any]) -> dict[str, int]:
    found = {key: common[key] for key in _COUNTERS if type(common.get(key)) is int}
    args = common.get("args")
    stated = getattr(args, "state", None)
    consumed = stated.get(_CONSUMED) if isinstance(stated, dict) else None
    return {**found, **({_CONSUMED: consumed} if type(consumed) is int else {})}
