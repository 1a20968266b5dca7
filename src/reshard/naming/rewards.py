"""LightRFT's reward models and critics: the heads beside the backbone, and their export.

A scalar reward model (SRM) keeps its backbone under `model.` and, for each head type t (`H`: the
width of the language model):

    {t}_head.0.weight [H, H]   {t}_head.0.bias [H]     linear, then
    {t}_head.1.weight [H]                              RMSNorm, SiLU,
    {t}_head.3.weight [1, H]                           linear, sigmoid
    {t}_attnpool.query [H]   .k.weight [H, H]   .v.weight [H, H]     attention pooling, 4 heads
    {t}_logit_scale [1]                                              scale_for_train

A critic keeps one head beside its backbone (`value_heads.py`). Which heads there are, the pooling
and the scale can be read from the names; the probing layer and the order of the heads cannot, so
options state them. (lightrft/models: srm_vl.py, srm_al.py, critics.)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any, Literal

from msgspec import Struct

from reshard.core.tensors import Entry, Shape
from reshard.errors import IncompleteError, NamesError
from reshard.naming import value_heads
from reshard.naming.schema import levels
from reshard.naming.search import unwrap, unwrapped
from reshard.naming.value_heads import ValueHead

ModelType = Literal["vision2seq", "grm", "srm_vl", "srm_al", "critic"]
Pooling = Literal["attn", "last"]

#: The tensors beside the backbone: the heads, and what a loader must know about them.
REWARD_HEAD = "reward_head.safetensors"
REWARD_CONFIG = "reward_config.json"

#: Heads of the attention pooling; LightRFT fixes the number.
POOLING_HEADS = 4

# Suffix after the head type -> shape, where True is the width H and False one.
_HEAD = {
    "_head.0.weight": (True, True),
    "_head.0.bias": (True,),
    "_head.1.weight": (True,),
    "_head.3.weight": (False, True),
}
_POOL = {
    "_attnpool.query": (True,),
    "_attnpool.k.weight": (True, True),
    "_attnpool.v.weight": (True, True),
}
_SCALE = {"_logit_scale": (False,)}
_SUFFIXES = (*_HEAD, *_POOL, *_SCALE)


class RewardHeads(Struct, frozen=True):
    """The heads of a scalar reward model. `tensors` are by LightRFT's names, `width` is H."""

    tensors: Mapping[str, Entry]
    types: tuple[str, ...]
    pooling: Pooling
    scaled: bool
    width: int


class ModelParts(Struct, frozen=True):
    """A checkpoint split into its backbone, by the checkpoint's names, and its heads.

    `rewards` are the heads of a scalar reward model, `value` is the head of a critic; at most one
    of them is set.
    """

    backbone: Mapping[str, Entry]
    rewards: RewardHeads | None = None
    value: ValueHead | None = None


class RewardOptions(Struct, frozen=True):
    """What the user stated about a reward model or critic; None: nothing.

    `types` also gives the order of the heads. `value_head` is what precedes the names of a critic's
    head: `score`, `v_head.summary`.
    """

    pooling: Pooling | None = None
    scaled: bool | None = None
    types: tuple[str, ...] | None = None
    value_head: str | None = None

    @property
    def says_heads(self) -> bool:
        """Whether the user stated anything about a scalar reward model's heads."""
        return any(said is not None for said in (self.pooling, self.scaled, self.types))


def split(
    entries: Mapping[str, Entry],
    base: Container[str] = (),
    value_head: str | None = None,
    allows: Callable[[str], bool] = lambda _: False,
) -> ModelParts:
    """Find the heads by their names and shapes, and separate them from the backbone.

    `base` are the names of the base model: a head that it has is a part of the backbone. `allows`
    says which names the user leaves out; they are not heads unless `value_head` names them.

    Raises `IncompleteError` for a head of which a tensor is missing, `NamesError` for shapes that
    do not agree or a `value_head` that is not there.
    """
    heads: dict[str, Entry] = {}
    backbone: dict[str, Entry] = {}
    for clean, (name, entry) in zip(unwrapped(entries), entries.items(), strict=True):
        kind, suffix = _head_type(clean)
        if (
            suffix
            and "." not in kind
            and not (clean in base or allows(clean) or clean.startswith(f"{value_head}."))
        ):
            heads[clean] = entry.renamed(clean)
        else:
            backbone[name] = entry
    rewards = _rewards(heads) if heads else None
    if rewards is not None:
        return ModelParts(backbone, rewards)
    found = value_heads.find(backbone, base, value_head, allows)
    if found is None:
        return ModelParts(backbone)
    value, owners = found
    return ModelParts({n: entry for n, entry in backbone.items() if n not in owners}, value=value)


def _head_type(name: str) -> tuple[str, str]:
    """The head type and the suffix of a reward head's tensor; the suffix is empty for others."""
    for suffix in _SUFFIXES if name.endswith(_SUFFIXES) else ():
        if name.endswith(suffix) and len(name) > len(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _rewards(tensors: Mapping[str, Entry]) -> RewardHeads:
    types = tuple(dict.fromkeys(_head_type(name)[0] for name in tensors))
    pooled = any(_head_type(name)[1] in _POOL for name in tensors)
    scaled = any(_head_type(name)[1] in _SCALE for name in tensors)
    first = tensors.get(f"{types[0]}_head.0.weight")
    width = first.spec.shape[-1] if first is not None and first.spec.shape else 0
    for suffix, dims in {
        **_HEAD,
        **(_POOL if pooled else {}),
        **(_SCALE if scaled else {}),
    }.items():
        expected: Shape = tuple(width if wide else 1 for wide in dims)
        for kind in types:
            entry = tensors.get(kind + suffix)
            if entry is None:
                raise IncompleteError(
                    f"the reward head {kind!r} has no such tensor; the heads are {types}.",
                    tensor=kind + suffix,
                    hint=_critic(kind),
                )
            if entry.spec.shape != expected:
                raise NamesError(
                    f"its shape is {entry.spec.shape}, a reward head of width {width} has "
                    f"{expected} here.",
                    tensor=kind + suffix,
                    hint=_critic(kind),
                )
    return RewardHeads(tensors, types, "attn" if pooled else "last", scaled, width)


def _critic(kind: str) -> str:
    return f"If it is a critic's head of several layers, pass --value-head {kind}_head."


def check(parts: ModelParts, model_type: ModelType | None, options: RewardOptions) -> ModelParts:
    """Compare what the names say with what the user said; the heads come in the user's order.

    Without a `model_type` the checkpoint's own counts, and options about heads need heads.

    Raises `NamesError` where they disagree, with the flag that would agree.
    """
    fitting = _model_types(parts)
    if model_type is None and parts.rewards is None and options.says_heads:
        raise NamesError(
            "the checkpoint holds no reward heads, but the options describe some.",
            hint="Leave out --pooling_method, --scale_for_train and --heads_types.",
        )
    if model_type is not None and model_type not in fitting:
        held = "no reward or value head"
        if parts.rewards is not None:
            held = f"reward heads ({', '.join(parts.rewards.types)})"
        elif parts.value is not None:
            held = f"a value head ({parts.value.name})"
        raise NamesError(
            f"the checkpoint holds {held}, but the model type is {model_type!r}.",
            hint=f"Pass --model-type {' or '.join(fitting)}.",
        )
    if parts.rewards is None:
        return parts
    return ModelParts(parts.backbone, _check_heads(parts.rewards, options))


def _model_types(parts: ModelParts) -> tuple[ModelType, ...]:
    """The model types that a checkpoint with these parts can be of."""
    if parts.rewards is not None:
        audio = any("audio_tower" in name.split(".") for name in parts.backbone)
        return ("srm_al",) if audio else ("srm_vl",)
    return ("vision2seq", "grm") if parts.value is None else ("critic",)


def _check_heads(heads: RewardHeads, options: RewardOptions) -> RewardHeads:
    if options.pooling not in (None, heads.pooling):
        raise NamesError(
            f"the checkpoint {'has' if heads.pooling == 'attn' else 'has no'} attention pooling, "
            f"but the pooling method is {options.pooling!r}.",
            hint=f"Pass --pooling_method {heads.pooling}.",
        )
    if options.scaled not in (None, heads.scaled):
        verb = "Pass" if heads.scaled else "Leave out"
        raise NamesError(
            f"the checkpoint has {'a' if heads.scaled else 'no'} logit scale.",
            hint=f"{verb} --scale_for_train.",
        )
    types = heads.types if options.types is None else options.types
    if sorted(types) != sorted(heads.types):
        raise NamesError(
            f"the checkpoint's heads are {', '.join(heads.types)}, but the option names "
            f"{', '.join(types)}.",
            hint=f"Pass --heads_types {' '.join(heads.types)}.",
        )
    return RewardHeads(heads.tensors, tuple(types), heads.pooling, heads.scaled, heads.width)


def lightrft_state(parts: ModelParts) -> dict[str, Entry]:
    """The state dict that LightRFT loads strictly: backbone and heads by the names of training."""
    heads = {} if parts.rewards is None else parts.rewards.tensors
    return {**{unwrap(n): e.renamed(unwrap(n)) for n, e in parts.backbone.items()}, **heads}


def reward_config(
    heads: RewardHeads, probing_layer: int, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of `reward_config.json`. `config` is the base's, to check the layer against.

    Raises `NamesError` for a probing layer that the backbone does not have, or a width that is
    not the backbone's.
    """
    layers = _stated(config, "num_hidden_layers")
    # LightRFT's own bound: the states after the last layer are not among those it probes.
    if layers is not None and not -layers <= probing_layer < layers:
        raise NamesError(
            f"the backbone has {layers} layers, probing layer {probing_layer} is not among them.",
            hint=f"Pass --probing_layer between {-layers} and {layers - 1}.",
        )
    width = _stated(config, "hidden_size")
    if width not in (None, heads.width):
        raise NamesError(
            f"the heads have width {heads.width}, but the base model has {width}.",
            hint="Check that --base is the model that the training started from.",
        )
    return {
        "head_types": list(heads.types),
        "pooling_method": heads.pooling,
        "num_heads": POOLING_HEADS,
        "probing_layer": probing_layer,
        "scale_for_train": heads.scaled,
        "hidden_size": heads.width,
    }


def _stated(config: Mapping[str, Any], key: str) -> int | None:
    """A number of the language model's config: the inner config counts before the top level."""
    for level in reversed(levels(config)):
        if isinstance(level.get(key), int):
            return int(level[key])
    return None
