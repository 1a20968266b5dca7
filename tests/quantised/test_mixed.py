"""Bases that mix codes and plain tensors, and layers that predict more tokens (MTP)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import FineGrainedFP8Config

import reshard
from reshard.cli import app as cli
from reshard.cli.lightrft import hf2fsdp
from tests.quantised import makers
from tests.quantised.makers import State
from tests.tensors import assert_same

FP8 = torch.float8_e4m3fn
_QUANTISER = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(weight_block_size=makers.BLOCK))
# Of the layer that predicts one more token, beside the usual ones: DeepSeek-V3's names.
_MTP = {
    "embed_tokens.weight": (64, 64),
    "enorm.weight": (64,),
    "hnorm.weight": (64,),
    "eh_proj.weight": (64, 128),
    "shared_head.norm.weight": (64,),
    "shared_head.head.weight": (64, 64),
}
#: Modules that the config leaves out: one in each layer, and what DeepSeek keeps plain.
_LEFT_OUT = ("kv_b_proj", "eh_proj", "lm_head", "shared_head.head", "gate", "embed_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DeepSeek-V3 of two layers and an MTP layer, fp8 in blocks, some modules plain."""
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        **{**makers.TEXT, "num_key_value_heads": 4}, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=32,
        q_lora_rank=32, qk_rope_head_dim=32, v_head_dim=16, qk_nope_head_dim=32,
        num_nextn_predict_layers=1, dtype="bfloat16",
    )  # fmt: skip
    made: Path = tmp_path_factory.mktemp("mixed") / "model"
    transformers.DeepseekV3ForCausalLM(config).bfloat16().save_pretrained(made)
    plain = load_file(made / "model.safetensors")
    plain |= {
        name.replace("layers.1.", "layers.2."): torch.randn(value.shape).to(value.dtype) / 8
        for name, value in plain.items()
        if "layers.1." in name
    }
    plain |= {f"model.layers.2.{n}": (torch.randn(s) / 8).bfloat16() for n, s in _MTP.items()}
    save_file(plain, made / "model.safetensors", {"format": "pt"})
    return makers.in_blocks(made, makers.BLOCK, left_out=_LEFT_OUT)


def numbers(folder: Path) -> State:
    """The files' tensors, codes dequantised by transformers' own function."""
    state: State = load_file(folder / "model.safetensors")
    dequantise = Fp8Dequantize(_QUANTISER)
    found: State = {}
    for name, value in state.items():
        if value.dtype == FP8:
            scale = state[f"{name}_scale_inv"]
            found[name] = dequantise._dequantize_one(value, scale, torch.bfloat16)
        elif not name.endswith("_scale_inv"):
            found[name] = value
    return found


def test_the_base_is_a_mixture(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    for layer in (1, 2):
        own = {n: v.dtype for n, v in state.items() if f"layers.{layer}." in n and v.ndim == 2}
        assert {FP8, torch.bfloat16} <= set(own.values())
    found = reshard.inspect(folder)
    assert found.codes is not None
    count = sum(value.dtype == FP8 for value in state.values())
    assert found.codes.kinds == {"fp8 in blocks of 32 x 32": count}


def test_a_mixture_becomes_the_16_bit_model(folder: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", numbers(folder)
    reshard.convert(folder, out, dtype="bfloat16")
    assert_same(load_file(out / "model.safetensors"), expected)
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["num_nextn_predict_layers"] == 1
    # All but the MTP layer are what transformers loads, and so are the logits.
    ids = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        assert torch.equal(makers.loaded(out)(ids).logits, makers.loaded(folder)(ids).logits)


def test_a_run_without_the_mtp_layer(folder: Path, tmp_path: Path) -> None:
    """A loaded model does not hold it: it comes from the base, dequantised."""
    expected = numbers(folder)
    state = {n: v.float() + 1 for n, v in expected.items() if ".layers.2." not in n}
    torch.save(state, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=folder)
    trained = {n: state[n].bfloat16() if n in state else value for n, value in expected.items()}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(found, trained)
    assert not [n for n in found if "scale" in n]


def test_a_run_with_the_mtp_layer(folder: Path, tmp_path: Path) -> None:
    state = {name: value.float() + 1 for name, value in numbers(folder).items()}
    torch.save(state, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=folder)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert_same(found, {name: value.bfloat16() for name, value in state.items()})


def test_into_training(folder: Path, tmp_path: Path) -> None:
    expected = numbers(folder)
    reshard.convert(folder, tmp_path / "dcp", to="dcp", names="disk")
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp")
    assert_same(found, expected)


def test_into_a_loaded_model(folder: Path, tmp_path: Path) -> None:
    arguments = ["--hf_checkpoint", str(folder), "--output", str(tmp_path / "dcp")]
    assert cli.run(hf2fsdp.command, [*arguments, "--names", "memory"]) == 0
    expected = makers.loaded(folder).state_dict()
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(found, checkpoint_id=tmp_path / "dcp")
    assert_same(found, expected)


def test_diff_and_doctor(folder: Path, tmp_path: Path) -> None:
    reshard.convert(folder, tmp_path / "out")
    assert reshard.diff(folder, tmp_path / "out").differences == ()
    wrong = {"scales-left-over", "codes-unreadable", "quantisation-contradicts-config"}
    for place in (folder, tmp_path / "out"):
        names = {finding.code for finding in reshard.doctor(place).findings}
        assert not names & wrong
