"""Writes the key tables under `layouts/<version>/`: what the installed transformers really does.

    python tests/naming/make_layouts.py OUT        once for each transformers version

For each family a tiny random model of the real class is built, and saved with `save_pretrained`.
The table holds names and shapes only:

    {"class": ..., "config": the saved config.json,
     "memory": {name: shape} of `state_dict()`,
     "disk": {name: the memory tensor with the same bytes, or the shape where there is none}}

Runs under transformers 4.51 to 5.x (the file uses nothing newer); the tests read the tables, so
they need no old transformers. All sizes differ from each other, so that no wrong shape fits.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
UNTIED = {**TEXT, "tie_word_embeddings": False}
TIED = {**TEXT, "tie_word_embeddings": True}
EXPERTS = {**UNTIED, "moe_intermediate_size": 12, "num_experts": 3, "num_experts_per_tok": 2,
           "decoder_sparse_step": 1, "shared_expert_intermediate_size": 20}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 28,
    "projection_dim": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SIGLIP = {**{k: v for k, v in CLIP.items() if k != "projection_dim"},
          "model_type": "siglip_vision_model", "vision_use_head": False}  # fmt: skip
ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
QWEN2_VISION = {
    "depth": 1,
    "embed_dim": 24,
    "hidden_size": 32,
    "num_heads": 4,
    "mlp_ratio": 2,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
QWEN2_5_VISION = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
    "window_size": 16,
    "fullatt_block_indexes": [0],
}
QWEN3_VISION = {
    "depth": 1,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
VL_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
             "vision_end_token_id": 93}  # fmt: skip
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 6,
    "image_size": 16,
    "patch_size": 8,
}
INTERNVL = {
    "text_config": {**UNTIED, "model_type": "qwen2"},
    "vision_config": {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1,
                      "num_attention_heads": 4, "image_size": [16, 16], "patch_size": [8, 8]},
    "image_token_id": 90,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAVA = {
    "vision_config": CLIP,
    "text_config": {**UNTIED, "model_type": "llama"},
    "image_token_index": 90,
    "tie_word_embeddings": False,
    "vision_feature_layer": -1,
}

# name of the table: (model class, config class, keyword arguments of the config).
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", UNTIED),
    "llama_tied": ("LlamaForCausalLM", "LlamaConfig", TIED),
    "llama_backbone": ("LlamaModel", "LlamaConfig", UNTIED),
    "llama_classifier": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**UNTIED, "num_labels": 1},
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", UNTIED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", TIED),
    "mistral": ("MistralForCausalLM", "MistralConfig", UNTIED),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", TEXT),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", TEXT),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", TEXT),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        {**UNTIED, **ROPE, **VL_TOKENS, "vision_config": QWEN2_VISION},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {**UNTIED, **ROPE, **VL_TOKENS, "vision_config": QWEN2_5_VISION},
    ),
    "qwen2_5_vl_tied": (
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        {**TIED, **ROPE, **VL_TOKENS, "vision_config": QWEN2_5_VISION},
    ),
    "qwen2_5_vl_backbone": (
        "AutoModel",
        "Qwen2_5_VLConfig",
        {**UNTIED, **ROPE, **VL_TOKENS, "vision_config": QWEN2_5_VISION},
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {**VL_TOKENS, "text_config": {**TIED, **ROPE}, "vision_config": QWEN3_VISION,
         "tie_word_embeddings": True},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3VLMoeConfig",
        {**VL_TOKENS, "text_config": {**EXPERTS, **ROPE}, "vision_config": QWEN3_VISION,
         "tie_word_embeddings": False},
    ),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA),
    "llava_backbone": ("AutoModel", "LlavaConfig", LLAVA),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {**LLAVA, "image_grid_pinpoints": [[16, 32], [32, 16]]},
    ),
    "llava_next_mixtral": (
        "LlavaNextForConditionalGeneration",
        "LlavaNextConfig",
        {**LLAVA, "image_grid_pinpoints": [[16, 32], [32, 16]],
         "text_config": {**UNTIED, "model_type": "mixtral", "num_local_experts": 3,
                         "num_experts_per_tok": 2}},
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        {"text_config": TEXT, "vision_config": SIGLIP, "mm_tokens_per_image": 4,
         "image_token_index": 90, "boi_token_index": 91, "eoi_token_index": 92},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {"text_config": {**UNTIED, "model_type": "mistral"}, "vision_config": PIXTRAL,
         "image_token_index": 90, "tie_word_embeddings": False},
    ),
    "internvl": ("InternVLForConditionalGeneration", "InternVLConfig", INTERNVL),
    "internvl_moe": (
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        {**INTERNVL, "text_config": {**EXPERTS, "model_type": "qwen3_moe"}},
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        "Qwen2AudioConfig",
        {
            "audio_config": {"model_type": "qwen2_audio_encoder", "d_model": 24,
                             "encoder_layers": 1, "encoder_attention_heads": 4,
                             "encoder_ffn_dim": 28, "num_mel_bins": 8,
                             "max_source_positions": 16},
            "text_config": {**UNTIED, "model_type": "qwen2"},
            "audio_token_index": 90,
        },
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig",
                {**UNTIED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", EXPERTS),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", EXPERTS),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {**UNTIED, "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 10,
         "kv_lora_rank": 6, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
         "num_key_value_heads": 4},
    ),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", {**UNTIED, "num_local_experts": 3}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {**UNTIED, "moe_intermediate_size": 12, "moe_num_experts": 3, "moe_k": 2,
         "moe_layer_start_index": 0},
    ),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig",
                {**UNTIED, "num_local_experts": 3, "num_experts_per_tok": 2}),
}  # fmt: skip


def build(class_name: str, config_name: str, arguments: dict[str, Any]) -> Any:
    """A tiny model with random weights, no two tensors of it alike."""
    config = getattr(transformers, config_name)(**arguments)
    torch.manual_seed(0)
    if class_name == "AutoModel":
        model = transformers.AutoModel.from_config(config)
    else:
        model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        # The state dict only: rotary frequencies are buffers too, and no one saves them.
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return model


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def table(model: Any) -> dict[str, Any]:
    memory = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        disk = saved(Path(folder))
        config = json.loads((Path(folder) / "config.json").read_text())

    def origin(tensor: torch.Tensor) -> str | list[int]:
        name: str
        for name, value in memory.items():
            if value.shape == tensor.shape and torch.equal(value, tensor):
                return name
        return list(tensor.shape)

    return {
        "class": type(model).__name__,
        "config": config,
        "memory": {name: list(value.shape) for name, value in memory.items()},
        "disk": {name: origin(value) for name, value in disk.items()},
    }


def dumps(content: dict[str, Any]) -> str:
    """JSON with one tensor a line."""
    lines = ["{"]
    for key in ("class", "config"):
        lines.append(f' "{key}": {json.dumps(content[key], sort_keys=True)},')
    for key in ("memory", "disk"):
        rows = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(content[key].items())]
        lines.append(
            f' "{key}": {{\n' + ",\n".join(rows) + "\n }" + ("," if key == "memory" else "")
        )
    return "\n".join([*lines, "}", ""])


def main() -> None:
    version = ".".join(transformers.__version__.split(".")[:2])
    out = Path(sys.argv[1]) / version
    out.mkdir(parents=True, exist_ok=True)
    for name, (class_name, config_name, arguments) in FAMILIES.items():
        config_class = getattr(transformers, config_name, None)
        automatic = transformers.AutoModel._model_mapping
        if config_class is None or (class_name == "AutoModel" and config_class not in automatic):
            print(f"{version} has no {class_name} of {config_name}: skipped")
            continue
        content = table(build(class_name, config_name, arguments))
        (out / f"{name}.json").write_text(dumps(content))
        print(version, name, content["class"], len(content["memory"]), len(content["disk"]))


if __name__ == "__main__":
    main()
