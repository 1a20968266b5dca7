"""Quantised models, written by the real quantisers, and the numbers that their codes stand for.

kind           written by                                 the numbers by
blocks         transformers' Fp8Quantize                  transformers' own loading on the CPU
tensor, row    compressed-tensors' compressor             transformers' own loading on the CPU
mxfp4          random codes and scales, as gpt-oss's      transformers' own loading on the CPU
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

State = dict[str, torch.Tensor]

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BLOCK = [32, 32]


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**TEXT, **changes}, dtype="bfloat16")
    model: nn.Module = transformers.LlamaForCausalLM(config).bfloat16()
    return model


def qwen3_moe() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(**TEXT, **_EXPERTS, head_dim=16, dtype="bfloat16")
    model: nn.Module = transformers.Qwen3MoeForCausalLM(config).bfloat16()
    return model


def blocks(folder: Path, model: nn.Module, *, scale_fmt: str = "float") -> Path:
    """DeepSeek-style fp8: every linear weight but the head's and the routers'."""
    model.save_pretrained(folder)
    return in_blocks(folder, BLOCK, scale_fmt)


def in_blocks(
    folder: Path, block: list[int], scale_fmt: str = "float", left_out: Sequence[str] = ()
) -> Path:
    """The same of a model that is in the folder, whose sizes are multiples of the block's.

    left_out: the ends of the modules' names whose matrices stay plain, in place of all but
    `..proj`. The config then names them, and not `scale_fmt`.
    """
    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt)
    quantise = Fp8Quantize(FineGrainedFP8HfQuantizer(config))
    state: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if left_out:
            linear = value.ndim > 1 and not module.endswith(tuple(left_out))
        else:
            linear = module.endswith("proj")
        state.update(quantise.convert({name: value}) if linear else {name: value})
    stated: dict[str, Any] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": block,
        "activation_scheme": "dynamic",
        "modules_to_not_convert": list(left_out or ["lm_head"]),
    }
    if not left_out:
        stated["scale_fmt"] = scale_fmt
    return written(folder, state, stated)


def compressed(folder: Path, model: nn.Module, strategy: str) -> Path:
    """compressed-tensors' fp8 with one scale a `tensor`, a row (`channel`) or a `block`.

    The library needs Python 3.11.
    """
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": strategy}
    if strategy == "block":
        weights["block_structure"] = BLOCK
    activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    config = library.QuantizationConfig(
        config_groups={
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": activations,
            }
        },
        ignore=["lm_head"],
        format="float-quantized",
        quantization_status=library.QuantizationStatus.COMPRESSED,
    )
    library.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            _calibrate(module, strategy)
    compressors.ModelCompressor(quantization_config=config).compress_model(model)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    model.config.save_pretrained(folder)
    stated = json.loads(config.model_dump_json(exclude_none=True))
    return written(folder, state, {"quant_method": "compressed-tensors", **stated})


def _calibrate(module: Any, strategy: str) -> None:
    """The scales that a calibration gives: the largest value of each part over 448."""
    size = module.weight.detach().abs().float()
    if strategy == "tensor":
        largest = size.max().reshape(module.weight_scale.shape)
    elif strategy == "channel":
        largest = size.amax(1, keepdim=True)
    else:
        rows, columns = BLOCK
        tiles = size.reshape(size.shape[0] // rows, rows, size.shape[1] // columns, columns)
        largest = tiles.amax(dim=(1, 3))
    module.weight_scale.data.copy_((largest / 448).to(module.weight_scale.dtype))


def gpt_oss(folder: Path) -> Path:
    """gpt-oss with random MXFP4 experts."""
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        **{**TEXT, "head_dim": 16},
        num_local_experts=3,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        dtype="bfloat16",
    )
    model = transformers.GptOssForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    state: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            state[name] = value
            continue
        experts, columns, rows = value.shape
        shape = (experts, rows, columns // 32)
        state[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        state[f"{name}_scales"] = torch.randint(115, 123, shape, dtype=torch.uint8)
    stated = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.embed_tokens", "lm_head"],
    }
    return written(folder, state, stated)


def written(folder: Path, state: Mapping[str, torch.Tensor], stated: Mapping[str, Any]) -> Path:
    save_file(dict(state), folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": stated}, indent=2))
    return folder


def loaded(folder: Path) -> Any:
    """The model as transformers loads it on the CPU: quantised weights as bfloat16."""
    options = {}
    stated = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if stated.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
