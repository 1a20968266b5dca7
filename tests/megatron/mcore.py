"""Real models of megatron-core load what reshard wrote: `python -m tests.megatron.mcore FOLDER`.

FOLDER/NAME/model/        a Hugging Face model, tiny, of random weights
FOLDER/NAME/checkpoint/   what `reshard convert --to megatron` made of it
FOLDER/NAME/logits.pt     written here: what the model that loaded it says of `TOKENS`

The ranks are forked from one process. megatron-core is patched only where
it assumes a GPU; loading goes through its `dist_checkpointing.load`.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from demo.cpu_megatron import without_gpu
from tests.forking import run_ranks

TOKENS = torch.arange(12).reshape(1, 12) * 37 % 61
_MULTIPLE = 8
GEMMAS = ("gemma", "gemma2", "gemma3_text")


class Case(NamedTuple):
    """A model of a family and how it is loaded.

    `fused`: with the names of TransformerEngine. `more`: layers for multi-token prediction.
    """

    name: str
    family: str
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    fused: bool = False
    tied: bool = False
    more: int = 0

    @property
    def world(self) -> int:
        return max(self.tensor * self.pipeline, self.expert)


CASES = (
    Case("llama-tp2", "llama", tensor=2),
    Case("llama-tp2-fused", "llama", tensor=2, fused=True),
    Case("mistral-pp2", "mistral", pipeline=2),
    Case("qwen2-tied-pp2", "qwen2", pipeline=2, tied=True),
    Case("qwen3-tp2-fused", "qwen3", tensor=2, fused=True),
    Case("qwen2-moe-ep2-fused", "qwen2_moe", expert=2, fused=True),
    Case("qwen3-moe-ep2-fused", "qwen3_moe", expert=2, fused=True),
    Case("mixtral-ep2", "mixtral", expert=2),
    Case("gemma-tp2-fused", "gemma", tensor=2, fused=True, tied=True),
    Case("gemma2-tp2-fused", "gemma2", tensor=2, fused=True, tied=True),
    Case("gemma2-pp2-fused", "gemma2", pipeline=2, fused=True, tied=True),
    Case("gemma3-tp2-fused", "gemma3_text", tensor=2, fused=True, tied=True),
    Case("glm4-moe-tp2", "glm4_moe", tensor=2),
    Case("glm4-moe-ep2", "glm4_moe", expert=2),
    Case("deepseek-v2-ep2", "deepseek_v2", expert=2),
    Case("deepseek-v3-ep2", "deepseek_v3", expert=2),
    Case("deepseek-v3-mtp", "deepseek_v3", more=1),
    Case("llama-tp2-pp2-fused", "llama", tensor=2, pipeline=2, fused=True),
)


def main(folder: Path) -> None:
    import megatron.core.models.gpt  # noqa: F401, imported once, before the ranks fork

    for world in sorted({case.world for case in CASES}):

        def work(rank: int, meeting: Path, world: int = world) -> None:
            _rank(rank, world, meeting, folder)

        codes = run_ranks(world, work)
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")


def _rank(rank: int, world: int, meeting: Path, folder: Path) -> None:
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    torch.set_num_threads(1)
    without_gpu()
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    from megatron.core import parallel_state

    for case in CASES:
        if case.world != world:
            continue
        parallel_state.initialize_model_parallel(
            case.tensor, case.pipeline, expert_model_parallel_size=case.expert
        )
        place = folder / case.name
        config = json.loads((place / "model" / "config.json").read_text(encoding="utf-8"))
        model = built(config, case)
        loaded(model, place / "checkpoint")
        with torch.no_grad():
            logits = said(model, case, config)
        if logits is not None and parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(logits[..., : config["vocab_size"]], place / f"{rank}.pt")
        dist.barrier()
        if rank == 0:
            written = sorted(place.glob("*.pt"))
            written[0].rename(place / "logits.pt")
        dist.barrier()
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def loaded(model: Any, checkpoint: Path) -> None:
    """Load with megatron-core, which asks for every tensor and state that the model has."""
    from megatron.core import dist_checkpointing

    content = dist_checkpointing.load_content_metadata(str(checkpoint))
    state = {"model": model.sharded_state_dict(metadata=dict(content))}
    found = dist_checkpointing.load(state, str(checkpoint))
    model.load_state_dict(found["model"])


def built(config: dict[str, Any], case: Case) -> Any:
    """The GPTModel of a config of the hub, with weights that are not those of the checkpoint."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    latent = "kv_lora_rank" in config
    kind = MLATransformerConfig if latent else TransformerConfig
    settings = kind(**_settings(config, case))
    spec: Any = _spec(config, settings, case)
    rows = _MULTIPLE * case.tensor
    more = {}
    if case.more:
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(
            settings, spec, use_transformer_engine=False
        )
    pre = parallel_state.is_pipeline_first_stage()
    model = GPTModel(
        settings,
        spec,
        vocab_size=-(-config["vocab_size"] // rows) * rows,
        max_sequence_length=64,
        pre_process=pre,
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=case.tied,
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=_rotated(config),
        **more,
    )
    if pre and config["model_type"] in GEMMAS:  # Megatron-Bridge mixes this into the embedding
        model.embedding.register_forward_hook(
            lambda _, __, made: made * config["hidden_size"] ** 0.5
        )
    return model.eval()


def _settings(config: dict[str, Any], case: Case) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    experts = config.get("num_local_experts") or config.get("num_experts")
    experts = experts or config.get("n_routed_experts")
    dense = config.get("first_k_dense_replace", 0)
    found: dict[str, Any] = {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "ffn_hidden_size": config["intermediate_size"],
        "add_bias_linear": False,
        "add_qkv_bias": config["model_type"] in ("qwen2", "qwen2_moe", "glm4_moe"),
        "qk_layernorm": config["model_type"]
        in ("qwen3", "qwen3_moe", "glm4_moe", "deepseek_v2", "deepseek_v3", "gemma3_text"),
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "use_cpu_initialization": True,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "tensor_model_parallel_size": case.tensor,
        "pipeline_model_parallel_size": case.pipeline,
        "expert_model_parallel_size": case.expert,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    if experts:
        found |= {
            "num_moe_experts": experts,
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_ffn_hidden_size": config.get("moe_intermediate_size")
            or config["intermediate_size"],
            "moe_router_load_balancing_type": "none",
            "moe_token_dispatcher_type": "allgather",
            "moe_layer_freq": [0] * dense + [1] * (config["num_hidden_layers"] - dense)
            if dense
            else 1,
        }
    if config["model_type"] == "qwen2_moe":
        found["moe_shared_expert_intermediate_size"] = config["shared_expert_intermediate_size"]
        found["moe_shared_expert_gate"] = True
    if config.get("n_shared_experts"):
        width = config["n_shared_experts"] * config["moe_intermediate_size"]
        found["moe_shared_expert_intermediate_size"] = width
        found["moe_router_topk_scaling_factor"] = config["routed_scaling_factor"]
    if "kv_lora_rank" in config:
        found |= _latent(config)
    if config["model_type"] in ("deepseek_v3", "glm4_moe"):
        found |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_num_groups": config["n_group"],
            "moe_router_group_topk": config["topk_group"],
            "mtp_num_layers": case.more or None,
        }
    if config["model_type"] in GEMMAS:
        found["layernorm_zero_centered_gamma"] = True
        found["activation_func"] = functools.partial(F.gelu, approximate="tanh")
    if config["model_type"] == "deepseek_v2":
        found["moe_router_pre_softmax"] = True
    return found


def _rotated(config: dict[str, Any]) -> float:
    """The share of a head that rotary embeddings turn."""
    stated = config.get("rope_parameters") or config
    return float(stated.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))


def _latent(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rope_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "moe_router_dtype": "fp32",
    }


def _spec(config: dict[str, Any], settings: Any, case: Case) -> Any:
    """Megatron-core's own spec, or the one with TransformerEngine's names."""
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )

    from tests.megatron import fused

    if config.get("first_k_dense_replace"):  # layers that differ
        spec = get_gpt_decoder_block_spec(
            settings, use_transformer_engine=False, normalization="RMSNorm"
        )
        for layer in spec.layer_specs if "kv_lora_rank" in config else ():
            layer.submodules.self_attention.submodules.core_attention = fused.LatentAttention
        return spec
    norms = settings.qk_layernorm
    if case.fused:
        return fused.block(
            settings,
            norms=norms,
            experts=settings.num_moe_experts is not None,
            after=config["model_type"] in ("gemma2", "gemma3_text"),
        )
    return get_gpt_layer_local_spec(
        num_experts=settings.num_moe_experts, qk_layernorm=norms, normalization="RMSNorm"
    )


def said(model: Any, case: Case, config: dict[str, Any]) -> torch.Tensor | None:
    """The logits of `TOKENS`, in the ranks of the last stage; the stages pass on what they make."""
    from megatron.core import parallel_state

    length = TOKENS.shape[1]
    positions = torch.arange(length).unsqueeze(0)
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(group)
    stage = ranks.index(dist.get_rank())
    if stage > 0:
        passed = torch.empty(length, 1, config["hidden_size"])
        dist.recv(passed, ranks[stage - 1])
        model.set_input_tensor(passed)
    if case.more:  # it makes the labels of further tokens only
        model.mtp_process, model.config.mtp_num_layers = False, None
    made: torch.Tensor = model(TOKENS, positions, mask)
    if stage < len(ranks) - 1:
        dist.send(made.contiguous(), ranks[stage + 1])
        return None
    return made


if __name__ == "__main__":
    main(Path(sys.argv[1]))
