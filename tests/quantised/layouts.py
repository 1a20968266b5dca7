"""Quantised models laid out as other libraries write them, with the numbers that they stand for.

layout             read off                                        the numbers by
mxfp4-pack         compressed-tensors' own compressor              its decompressor
DeepSeek-V4        the release's names; e2m1 experts as int8       transformers' own loading
FBGEMM             transformers 5.23, integrations/fbgemm_fp8.py   code times scale in float32
ModelOpt           torch/export/quant_utils.py, vLLM's loader      code times scale in float32
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

from tests.quantised import makers
from tests.quantised.makers import State

FP8 = torch.float8_e4m3fn
_LARGEST = 448.0


class Laid(NamedTuple):
    """A quantised model's folder, and its tensors as bfloat16 by the files' names."""

    folder: Path
    numbers: State


#: A weight's name without `.weight` and its values -> what the files hold for it, and the numbers.
Codes = Callable[[str, torch.Tensor], tuple[State, torch.Tensor]]


def _rows(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """FBGEMM: a scale for each row, and the bound of the activations'."""
    scale = weight.float().abs().amax(1, keepdim=True) / _LARGEST
    codes = (weight.float() / scale).to(FP8)
    state = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.input_scale_ub": torch.tensor([1200.0]),
    }
    return state, codes.float() * scale


def _tensor(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """ModelOpt `FP8`: scalars, and the scales of the cache in the projections."""
    scale = weight.float().abs().max() / _LARGEST
    codes = (weight.float() / scale).to(FP8)
    state = {
        f"{name}.weight": codes,
        f"{name}.weight_scale": scale,
        f"{name}.input_scale": torch.tensor(0.02),
    }
    for side in "kv":
        if name.endswith(f"{side}_proj"):
            state[f"{name}.{side}_scale"] = torch.tensor(0.5)
    return state, codes.float() * scale


def _channel(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """ModelOpt `FP8_PER_CHANNEL_PER_TOKEN`: a vector of scales."""
    state, exact = _rows(name, weight)
    scale = state[f"{name}.weight_scale"].reshape(-1)
    return {f"{name}.weight": state[f"{name}.weight"], f"{name}.weight_scale": scale}, exact


def _four_dimensions(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """ModelOpt `FP8_PB_WO`: blocks of 128 x 128, the scales as [rows, 1, columns, 1]."""
    rows, columns = weight.shape
    grid = (-(-rows // 128), 1, -(-columns // 128), 1)
    scale = torch.rand(grid) / 100 + 0.01
    each = scale[:, 0, :, 0].repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    codes = (weight.float() / each).clamp(-_LARGEST, _LARGEST).to(FP8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * each


def _micro(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
    """ModelOpt `MXFP8`: the bytes of powers of two, each for 32 columns."""
    rows, columns = weight.shape
    scale = torch.randint(110, 120, (rows, columns // 32), dtype=torch.uint8)
    each = (scale.float() - 127).exp2().repeat_interleave(32, 1)
    codes = (weight.float() / each).clamp(-_LARGEST, _LARGEST).to(FP8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale}, codes.float() * each


def _llama(folder: Path, codes: Codes, stated: dict[str, Any] | None, width: int = 96) -> Laid:
    """A Llama whose projections but the first layer's attention are codes. `width` is its MLP's."""
    makers.llama(intermediate_size=width).save_pretrained(folder)
    state: State = {}
    numbers: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        plain = not name.endswith("proj.weight") or "layers.0.self_attn" in name
        if plain:
            state[name] = numbers[name] = value
            continue
        held, exact = codes(name.removesuffix(".weight"), value)
        state |= held
        numbers[name] = exact.bfloat16()
    _save(folder, state, stated)
    return Laid(folder, numbers)


def _save(folder: Path, state: State, stated: dict[str, Any] | None) -> None:
    kept = {name: value.contiguous() for name, value in state.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if stated is not None:
        config["quantization_config"] = stated
    path.write_text(json.dumps(config))


def fbgemm(folder: Path) -> Laid:
    stated = {
        "quant_method": "fbgemm_fp8",
        "activation_scale_ub": 1200.0,
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"],
    }
    return _llama(folder, _rows, stated)


def fbgemm_experts(folder: Path) -> Laid:
    """Llama 4: experts stacked and transposed, a scale for each of what are columns then."""
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **makers.TEXT, intermediate_size_mlp=96, head_dim=16, num_local_experts=3,
        num_experts_per_tok=1, moe_layers=[1], dtype="bfloat16",
    )  # fmt: skip
    transformers.Llama4ForCausalLM(config).bfloat16().save_pretrained(folder)
    state: State = {}
    numbers: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        state[name] = numbers[name] = value
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        scale = value.float().abs().amax(1, keepdim=True) / _LARGEST
        state[name] = (value.float() / scale).to(FP8)
        state[f"{name}_scale"] = scale
        numbers[name] = (state[name].float() * scale).bfloat16()
    assert len(state) == len(numbers) + 2
    _save(folder, state, {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]})
    return Laid(folder, numbers)


def modelopt(
    algorithm: str, codes: Codes, *, beside: bool = False, width: int = 96
) -> Callable[[Path], Laid]:
    """`beside`: as versions before 0.31 say it, in hf_quant_config.json alone."""

    def make(folder: Path) -> Laid:
        stated = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
        made = _llama(folder, codes, None if beside else stated, width)
        own = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": []}
        document = {"producer": {"name": "modelopt"}, "quantization": own}
        (folder / "hf_quant_config.json").write_text(json.dumps(document))
        return made

    return make


def packed(folder: Path) -> Laid:
    """compressed-tensors' `mxfp4-pack-quantized`, by its own compressor."""
    scheme, compressor = _library("mxfp4_pack_quantized", "MXFP4")

    def codes(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        rows, columns = weight.shape
        scale = torch.randint(-8, -4, (rows, columns // 32)).float().exp2().bfloat16()
        own = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        exact = compressor.decompress(dict(own), scheme)["weight"]
        return {f"{name}.{leaf}": value for leaf, value in own.items()}, exact

    return _llama(folder, codes, _stated("mxfp4-pack-quantized", scheme))


def nvfp4(folder: Path) -> Laid:
    """compressed-tensors' `nvfp4-pack-quantized`, which is not read."""
    scheme, compressor = _library("nvfp4_pack_quantized", "NVFP4A16")

    def codes(name: str, weight: torch.Tensor) -> tuple[State, torch.Tensor]:
        rows, columns = weight.shape
        own = {
            "weight": weight,
            "weight_scale": torch.rand(rows, columns // 16),
            "weight_global_scale": torch.tensor([200.0]),
        }
        made = compressor.compress(own, scheme)
        return {f"{name}.{leaf}": value for leaf, value in made.items()}, weight

    return _llama(folder, codes, _stated("nvfp4-pack-quantized", scheme))


def _library(form: str, preset: str) -> tuple[Any, Any]:
    """A scheme of compressed-tensors and its compressor. The library needs Python 3.11."""
    library = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    formats = pytest.importorskip("compressed_tensors.config").CompressionFormat
    scheme = library.preset_name_to_scheme(preset, ["Linear"])
    return scheme, compressors.BaseCompressor.get_value_from_registry(getattr(formats, form).value)


def _stated(form: str, scheme: Any) -> dict[str, Any]:
    group = json.loads(scheme.model_dump_json(exclude_none=True))
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def deepseek_v4(folder: Path) -> Laid:
    """fp8 in blocks and experts of two e2m1 codes a byte (int8), all scales E8M0 by `.scale`."""
    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(
        vocab_size=64, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, head_dim=32, q_lora_rank=32, num_experts_per_tok=2,
        n_routed_experts=3, max_position_embeddings=64, sliding_window=16, o_groups=2,
        o_lora_rank=32, index_n_heads=2, index_head_dim=32, index_topk=8, hc_mult=2,
        num_nextn_predict_layers=0, dtype="bfloat16",
    )  # fmt: skip
    model = transformers.DeepseekV4ForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    settings = FineGrainedFP8Config(weight_block_size=makers.BLOCK, scale_fmt="ue8m0")
    quantise = Fp8Quantize(FineGrainedFP8HfQuantizer(settings))
    state: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if ".ffn.experts." in name:
            rows, columns = value.shape
            state[name] = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
            scale = torch.randint(115, 123, (rows, columns // 32), dtype=torch.uint8)
            state[f"{module}.scale"] = scale.view(torch.float8_e8m0fnu)
        elif module.endswith((".wq_a", ".wkv", ".wo_b", ".w1", ".w2", ".w3")):
            own = quantise.convert({name: value})
            state[name] = own[name]
            state[f"{module}.scale"] = own[f"{name}_scale_inv"]
        else:
            state[name] = value
    stated = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": makers.BLOCK,
        "scale_fmt": "ue8m0",
    }
    _save(folder, state, stated)
    # transformers 5.23 cannot save this model once it was loaded from codes.
    model.load_state_dict(makers.loaded(folder).state_dict())
    numbers = folder.parent / "by-transformers"
    model.save_pretrained(numbers)
    return Laid(folder, load_file(numbers / "model.safetensors"))


READ: dict[str, Callable[[Path], Laid]] = {
    "mxfp4-pack": packed,
    "DeepSeek-V4": deepseek_v4,
    "FBGEMM": fbgemm,
    "FBGEMM, experts": fbgemm_experts,
    "ModelOpt FP8": modelopt("FP8", _tensor),
    "ModelOpt FP8, said beside": modelopt("FP8", _tensor, beside=True),
    "ModelOpt FP8, channels": modelopt("FP8_PER_CHANNEL_PER_TOKEN", _channel),
    "ModelOpt FP8, blocks": modelopt("FP8_PB_WO", _four_dimensions, width=200),
    "ModelOpt MXFP8": modelopt("MXFP8", _micro),
}
