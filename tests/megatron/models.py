"""Tiny Hugging Face models of the families that Megatron-Core's names are known of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "head_dim": None,
}
# Neither a window that matters nor caps, which have no weights.
_GEMMA = {
    "query_pre_attn_scalar": 8,
    "sliding_window": 64,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
#: By model type: what a config of it states besides `_COMMON`.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {"head_dim": None},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {
        **_MOE,
        "head_dim": None,
        "shared_expert_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "qwen3_moe": {**_MOE, "head_dim": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "head_dim": 16,
    },
    "gemma": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma2": _GEMMA,
    "gemma3_text": {**_GEMMA, "rope_local_base_freq": 10000.0},
    "deepseek_v2": {**_LATENT, "topk_method": "greedy", "n_group": 1},
    "deepseek_v3": {**_LATENT, "norm_topk_prob": True, "rope_interleave": True},
}


def model(family: str, folder: Path, *, seed: int = 0, more: int = 0, **changes: object) -> Path:
    """A model of random weights, as `save_pretrained` writes it.

    `more`: layers for multi-token prediction, which transformers has none of, as released.
    """
    stated = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **FAMILIES[family],
        **changes,
    }
    given = {n: v for n, v in stated.items() if v is not None or "softcapping" in n}
    config = transformers.AutoConfig.for_model(family, **given)
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            if "inv_freq" not in name:
                tensor.copy_(torch.randn_like(tensor) * 0.2 + ("norm" in name))
    made.save_pretrained(folder)
    if more:
        _add_layers(folder, more)
    return folder


def _add_layers(folder: Path, more: int) -> None:
    """Layers after the last, each a layer like it and what predicts from it."""
    state = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    last = f"model.layers.{layers - 1}."
    own = {name.removeprefix(last): t for name, t in state.items() if name.startswith(last)}
    for index in range(layers, layers + more):
        start = f"model.layers.{index}."
        state |= {start + name: torch.randn_like(tensor) for name, tensor in own.items()}
        for name in ("enorm", "hnorm", "shared_head.norm"):
            state[f"{start}{name}.weight"] = torch.randn(width)
        state[f"{start}eh_proj.weight"] = torch.randn(width, 2 * width)
        state[f"{start}embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
        state[f"{start}shared_head.head.weight"] = state["lm_head.weight"].clone()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config["num_nextn_predict_layers"] = more
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
