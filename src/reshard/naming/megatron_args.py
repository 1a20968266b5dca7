"""What a Megatron-Core run states about its model, compared with the base's config.

Shapes do not show everything: queries of eight heads and of four heads twice as wide have the same
size, and a norm that counts from zero has the shape of one that does not. If the run's settings are
available (`args` in `common.pt`, verl's `transformer_config.json`), they must be the base's.
Settings as `TransformerConfig` and Megatron-LM's arguments name them (megatron-core 0.16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reshard.errors import NamesError, UnsupportedError

#: What configs of the hub call the number of experts.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
#: Megatron's setting -> the names that it has in configs of the hub.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_query_groups": ("num_key_value_heads",),
    "kv_channels": ("head_dim",),
    "num_experts": EXPERTS,
    "num_moe_experts": EXPERTS,
}
#: Settings under which the weights have another layout or meaning than on the hub.
REFUSED = {
    "rotary_interleaved": "rotary embeddings that pair neighbouring rows",
    "attention_output_gate": "gates among the queries",
    "moe_mlp_glu_interleave_size": "interleaved gate and up projections",
    "glu_interleave_size": "interleaved gate and up projections",
}
#: Settings under which norms hold one less than the factor that they scale by.
LESS_ONE = ("layernorm_zero_centered_gamma", "apply_layernorm_1p")
#: All settings that are looked at.
SETTINGS = (*NUMBERS, *REFUSED, *LESS_ONE, "vocab_size", "multi_latent_attention")


def check(
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    rows: int | None,
    less_one: bool = False,
) -> None:
    """Refuse a base that the run did not start from, and settings that are not supported.

    `rows` are those of the base's vocabulary; with `less_one` its norms hold one less than what
    they scale by. Raises `UnsupportedError`, `NamesError`.
    """
    _check_norms(settings, less_one)
    for name, what in REFUSED.items():
        if settings.get(name) not in (None, False, 0):
            raise UnsupportedError(
                f"the run had {name}: {what}, which are not read.",
                hint="Export it with Megatron-Bridge, or with the trainer's own conversion.",
            )
    latent = settings.get("multi_latent_attention") is True or "kv_lora_rank" in config
    for name, theirs in NUMBERS.items():
        mine = settings.get(name)
        if type(mine) is not int or (latent and name in ("num_query_groups", "kv_channels")):
            continue
        if name == "num_query_groups" and mine == 1:
            continue  # the default of Megatron-LM's argument, which counts for grouped queries only
        stated = next((config[key] for key in theirs if type(config.get(key)) is int), mine)
        if stated != mine:
            raise NamesError(
                f"the run had {name} {mine}, but the base's config says {stated}.",
                hint="Check that --base is the model that the training started from.",
            )
    size = settings.get("vocab_size")
    if rows is not None and type(size) is int and size > rows:
        raise NamesError(
            f"the run had a vocabulary of {size}, but the base's has {rows} rows.",
            hint="Name the base whose vocabulary the training had.",
        )


def _check_norms(settings: Mapping[str, Any], less_one: bool) -> None:
    """Refuse norms that are stored less one where the hub's are not, or the other way round."""
    stated = [name for name in LESS_ONE if isinstance(settings.get(name), bool)]
    held = any(settings[name] for name in stated)
    if stated and held != less_one:
        name = next((name for name in stated if settings[name]), stated[0])
        here, there = ("less one", "whole") if held else ("whole", "less one")
        raise UnsupportedError(
            f"the run had {name} {settings[name]}: norms that are stored {here}, and the base's "
            f"are stored {there}; they are not converted.",
            hint="Export it with Megatron-Bridge, or with the trainer's own conversion.",
        )
