"""Fields that the configs of releases have, that engines read, and that transformers 5 leaves out.

Read off what transformers 4.57 and 5.23 write, vLLM 0.33, sglang 0.5.23 and mlx-lm 0.32. Those that
read `config.json` itself (mlx-lm, transformers 4) take their defaults for what is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from reshard.naming.schema import classes_of, levels, stating_levels
from reshard.naming.structure import is_own_class

_ROTARY = "rope_parameters"
# Model types whose releases say `num_experts` where transformers 5 says `num_local_experts`.
_EXPERTS = ("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text")

#: Model type -> field of its releases -> its value.
CONSTANT: dict[str, dict[str, object]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}
#: Model type -> the positions that every reader takes where the config states none.
DEFAULTS: dict[str, dict[str, object]] = {
    "llama": {"rope_theta": 1e4}, "mistral": {"rope_theta": 1e4}, "gemma": {"rope_theta": 1e4},
    "gemma2": {"rope_theta": 1e4}, "mixtral": {"rope_theta": 1e6},
    "gemma3_text": {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
}  # fmt: skip


class Missing(Struct, frozen=True):
    """A field that a config lacks: its dotted path, the value it should have, the model type of
    its level."""

    path: str
    value: object
    model_type: str

    @property
    def name(self) -> str:
        """The field's own name."""
        return self.path.rpartition(".")[2]


def missing(config: Mapping[str, Any]) -> tuple[Missing, ...]:
    """The fields that releases of this model have and its config does not, but for those whose
    values are what every reader takes anyway."""
    if config.get("auto_map") and not _native(config):
        return ()  # nobody knows what custom code reads
    found = []
    for path, level in zip(stating_levels(config), levels(config), strict=True):
        kind = str(level.get("model_type"))
        for key, value in {**_constant(kind, level), **rotary(level)}.items():
            if key not in level and DEFAULTS.get(kind, {}).get(key) != value:
                found.append(Missing(f"{path}{key}", value, kind))
    return tuple(found)


def _native(config: Mapping[str, Any]) -> bool:
    """Whether the class of a config with remote code is one of transformers' own, as in releases
    that came before transformers had the class."""
    return any(is_own_class(name, config) for name in classes_of(config))


def _constant(kind: str, level: Mapping[str, Any]) -> dict[str, object]:
    found = dict(CONSTANT.get(kind, {}))
    if kind in _EXPERTS and "num_local_experts" in level:
        found["num_experts"] = level["num_local_experts"]
    return found


def rotary(level: Mapping[str, Any]) -> dict[str, object]:
    """What `rope_parameters` says, as transformers 4 says it."""
    stated = level.get(_ROTARY)
    return dict(_flat(stated)) if isinstance(stated, Mapping) else {}


def _flat(stated: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    whole, local = stated.get("full_attention"), stated.get("sliding_attention")
    if isinstance(local, Mapping) and "rope_theta" in local:
        yield "rope_local_base_freq", local["rope_theta"]
    if isinstance(whole, Mapping):
        stated = whole
    if "rope_theta" in stated:
        yield "rope_theta", stated["rope_theta"]
    scaling = {key: value for key, value in stated.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default" or "mrope_section" in scaling:
        yield "rope_scaling", scaling
    if "partial_rotary_factor" in stated:
        yield "partial_rotary_factor", stated["partial_rotary_factor"]
