"""What Megatron-Core calls the tensors of a layer, by model type. **This is the table to extend.**

A family needs a run: megatron-core's model and transformers' must give the same logits
(`tests/megatron`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct, field

from reshard.errors import UnsupportedError, listed

_QK_NORMS = {
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}
_MLA = {
    "self_attention.linear_q_proj.weight": "self_attn.q_proj.weight",
    "self_attention.linear_q_down_proj.weight": "self_attn.q_a_proj.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "self_attn.q_a_layernorm.weight",
    "self_attention.linear_q_up_proj.weight": "self_attn.q_b_proj.weight",
    "self_attention.linear_kv_down_proj.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "self_attention.kv_layernorm.weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attn.kv_a_layernorm.weight",
    "self_attention.linear_kv_up_proj.weight": "self_attn.kv_b_proj.weight",
}


class Family(Struct, frozen=True):
    """What a model type has of its own.

    `names` go before `NAMES`. `moe` is what the hub calls the part with experts, and `expert` the
    gate, up and down projection of one; `shared` is the part of the shared experts. Norms are
    `less_one` there as well as on the hub: they scale by one more than they hold.
    """

    names: Mapping[str, str] = field(default_factory=dict)
    latent: bool = False
    moe: str = "mlp"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    less_one: bool = False


# Megatron-Bridge's modules put these norms after the projections.
_GEMMA = {
    "pre_mlp_layernorm.weight": "pre_feedforward_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_feedforward_layernorm.weight",
    "self_attention.linear_proj.post_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.post_layernorm.weight": "post_feedforward_layernorm.weight",
}
_DEEPSEEK = Family(
    {**_MLA, "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias"},
    latent=True,
    shared="mlp.shared_experts",
)
#: By model type.
FAMILIES = {
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(_QK_NORMS),
    "qwen2_moe": Family(
        {"mlp.shared_experts.gate_weight": "mlp.shared_expert_gate.weight"},
        shared="mlp.shared_expert",
    ),
    "qwen3_moe": Family(_QK_NORMS),
    "mixtral": Family(
        {"mlp.router.weight": "block_sparse_moe.gate.weight"},
        moe="block_sparse_moe",
        expert=("w1", "w3", "w2"),
    ),
    "glm4_moe": Family(
        {**_QK_NORMS, "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias"},
        shared="mlp.shared_experts",
    ),
    "gemma": Family(less_one=True),
    "gemma2": Family(_GEMMA, less_one=True),
    "gemma3_text": Family({**_GEMMA, **_QK_NORMS}, less_one=True),
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
}


def family_of(config: Mapping[str, Any], *, writing: bool = False) -> Family:
    """The family of a base's config, or of a model to be written by Megatron-Core's names.

    Raises `UnsupportedError` where it is not known.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = f"are known of {listed(list(FAMILIES), len(FAMILIES))}, not of {kind!r}."
        raise UnsupportedError(
            f"Megatron-Core's names {known}"
            if writing
            else f"its tensors have the names of Megatron-Core, which {known}",
            hint="Import it with Megatron-Bridge."
            if writing
            else "Export it with Megatron-Bridge, or with the trainer's own conversion.",
        )
    if config.get("rope_interleave") is False:
        raise UnsupportedError(
            "the base's config says rope_interleave: false, and Megatron-Core's latent attention "
            "pairs neighbouring rows.",
            hint="Name the base as it was released.",
        )
    return FAMILIES[kind]
