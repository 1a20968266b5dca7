"""The hyperparameters that `--hyperparameters` gives, where the checkpoint lacks some.

[{"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}]    one for each group
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from reshard.core.findings import Finding
from reshard.core.hyperparameters import NEEDED, SWITCHES, lacking
from reshard.core.state import Plain, TrainingState
from reshard.errors import OptionError, brief, listed
from reshard.storage import strict_json

# What a scheduler adds, and what DeepSpeed's FusedAdam has besides.
_OTHERS = ("initial_lr", "bias_correction")
_MAXIMA = "max_exp_avg_sq"


def with_given(state: TrainingState, path: Path) -> TrainingState:
    """The state with the settings of a JSON file.

    Raises `OptionError` where the checkpoint states all of them itself, or others, or the file is
    not such a list.
    """
    if state.hyperparameters_known and not any(lacking(state, group) for group in state.groups):
        raise OptionError(
            "hyperparameters: the checkpoint already holds them.",
            hint="Leave out --hyperparameters.",
            option="hyperparameters",
        )
    settings = _parsed(path, len(state.groups))
    if any(group.get("amsgrad") for group in settings) and _MAXIMA not in state.moments:
        raise _wrong(path, f"amsgrad is true, and the checkpoint holds no {_MAXIMA}")
    groups = []
    for at, (group, given) in enumerate(zip(state.groups, settings, strict=True)):
        for key, value in given.items():
            stated = group.hyperparameters.get(key, value)
            stated = tuple(stated) if isinstance(stated, list) else stated
            if stated != value:
                why = f"the {key} of group {at} is {brief(value)}, the checkpoint's {brief(stated)}"
                raise _wrong(path, why)
        groups.append(replace(group, hyperparameters={**group.hyperparameters, **given}))
    return replace(
        state, groups=tuple(groups), findings=(*state.findings, *_unknown(path, settings))
    )


def _parsed(path: Path, count: int) -> list[dict[str, Plain]]:
    """The objects of `count` groups, each with what AdamW needs."""
    value: Any = strict_json.read_value(path)
    if not isinstance(value, list) or not all(isinstance(group, dict) for group in value):
        raise _wrong(path, "it is not a list of objects")
    if len(value) != count:
        raise _wrong(path, f"it is of {len(value)} parameter groups, the checkpoint has {count}")
    for at, group in enumerate(value):
        for key in (*NEEDED, *(key for key in group if key in SWITCHES or key == "initial_lr")):
            if not _sound(key, group.get(key)):
                raise _wrong(path, f"the {key} of group {at} is {brief(group.get(key))}")
        if "params" in group:
            raise _wrong(path, f"group {at} lists params, which the checkpoint states itself")
    return [{**group, "betas": tuple(group["betas"])} for group in value]


def _sound(key: str, value: object) -> bool:
    """Whether torch's AdamW accepts a value; NaN, which JSON of Python may hold, is below nothing.

    `foreach` and `fused` may be null.
    """
    if key in SWITCHES:
        return isinstance(value, bool) or (value is None and SWITCHES[key] is None)
    if key != "betas":
        return _is_number(value, sys.float_info.max)
    return isinstance(value, list) and len(value) == 2 and all(_is_number(b, 1.0) for b in value)


def _is_number(value: object, limit: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < limit


def _unknown(path: Path, settings: Sequence[Mapping[str, Plain]]) -> Iterator[Finding]:
    known = (*NEEDED, *SWITCHES, *_OTHERS)
    found = dict.fromkeys(key for group in settings for key in group if key not in known)
    told = []
    for key in found:
        near = get_close_matches(key, known, 1)
        told.append(f"{key!r} (is {near[0]} meant?)" if near else repr(key))
    if told:
        yield Finding(
            "hyperparameters-unknown",
            f"{path.name} holds {listed(told)}, which torch's AdamW does not have: reshard writes "
            "it, but AdamW ignores it.",
            path.name,
        )


def _wrong(path: Path, why: str) -> OptionError:
    return OptionError(
        f"hyperparameters: {why}.",
        path=path,
        hint='Write a list with an object for each group: [{"lr": 1e-5, "betas": [0.9, 0.999], '
        '"eps": 1e-8, "weight_decay": 0.1}].',
        option="hyperparameters",
    )
