"""Llama 4 and layers for multi-token prediction in torchtitan's names, by the formulas of its
converters (models/llama4 of 2025, models/deepseek_v3 of 0.3)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.naming.schema import Schema
from reshard.naming.titan import translated
from tests.megatron.models import model as megatron_model
from tests.naming.test_titan_into import State, loaded

_LLAMA4 = {
    "embed_tokens.weight": "tok_embeddings.weight",
    "norm.weight": "norm.weight",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "feed_forward.router.weight": "moe.router.gate.weight",
}
_SIDES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def _llama4(folder: Path, *, seed: int = 0) -> tuple[Path, State]:
    """A tiny model with a dense layer and one of experts, and its tensors by the hub's names."""
    config = transformers.Llama4TextConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=3,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    made = transformers.Llama4ForCausalLM(config)
    with torch.no_grad():
        for tensor in made.parameters():
            tensor.copy_(torch.randn_like(tensor))
    made.save_pretrained(folder)
    return folder, dict(load_file(folder / "model.safetensors"))


def _to_titan(hub: State, era: int) -> State:
    """What torchtitan's converter makes of it; `era` 1: the names of 2025."""
    found: State = {}
    for name, tensor in hub.items():
        plain = name.removeprefix("model.")
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", plain)
        start, inner = (f"layers.{match[1]}.", match[2]) if match else ("", plain)
        projection = re.fullmatch(r"self_attn\.([qkv])_proj\.weight", inner)
        side = re.fullmatch(r"feed_forward\.(shared_expert\.)?(\w+_proj)\.weight", inner)
        if name == "lm_head.weight":
            found[("lm_head.weight", "output.weight")[era]] = tensor
        elif projection:
            part = ("qkv_linear.", "")[era]
            found[f"{start}attention.{part}w{projection[1]}.weight"] = tensor
        elif side:
            part = "moe.shared_experts" if side[1] else "feed_forward"
            found[f"{start}{part}.{_SIDES[side[2]]}.weight"] = tensor
        elif inner == "feed_forward.experts.down_proj":
            found[f"{start}moe.experts.w2"] = tensor.transpose(1, 2).contiguous()
        elif inner == "feed_forward.experts.gate_up_proj":
            gate, up = tensor.chunk(2, dim=-1)
            found[f"{start}moe.experts.w1"] = gate.transpose(1, 2).contiguous()
            found[f"{start}moe.experts.w3"] = up.transpose(1, 2).contiguous()
        else:
            found[start + _LLAMA4[inner]] = tensor
    return found


@pytest.mark.parametrize("era", [0, 1])
def test_llama4_both_ways(era: int, tmp_path: Path) -> None:
    model, hub = _llama4(tmp_path / "model")
    theirs = _to_titan(hub, era)
    bias = {"layers.1.moe.expert_bias": torch.ones(3)}
    dcp.save({**theirs, **bias}, checkpoint_id=tmp_path / "run", no_dist=True)
    base, _ = _llama4(tmp_path / "base", seed=1)
    report = reshard.convert(tmp_path / "run", tmp_path / "out", base=base)
    assert any("left out what the hub's model has not" in rule for rule in report.rules)
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert back.keys() == hub.keys()
    assert [name for name in hub if not torch.equal(back[name], hub[name])] == []
    reshard.convert(model, tmp_path / "there", to="dcp", names="torchtitan")
    state = loaded(tmp_path / "there", theirs)
    assert [name for name in theirs if not torch.equal(state[name], theirs[name])] == []
    assert reshard.verify(tmp_path / "there", model).num_tensors


def test_a_half_of_gate_and_up(tmp_path: Path) -> None:
    _, hub = _llama4(tmp_path / "model")
    theirs = _to_titan(hub, 1)
    del theirs["layers.1.moe.experts.w3"]
    dcp.save(theirs, checkpoint_id=tmp_path / "run", no_dist=True)
    with pytest.raises(reshard.NamesError, match="only a part of it"):
        reshard.convert(tmp_path / "run", tmp_path / "out", base=tmp_path / "model")


def test_a_table_with_a_half_makes_what_it_can(tmp_path: Path) -> None:
    """As of an optimizer that trained gate and not up: what is made of both is left out."""
    folder, hub = _llama4(tmp_path / "model")
    dcp.save(_to_titan(hub, 1), checkpoint_id=tmp_path / "run", no_dist=True)
    entries = reshard.open(tmp_path / "run").catalog.entries
    schema = Schema({}, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    names = translated(entries, schema).names
    assert names is not None
    table = {name: entry for name, entry in entries.items() if not name.endswith("experts.w3")}
    lost = names.make(entries).keys() - names.make(table).keys()
    assert len(lost) == 1
    assert lost == {name for name in hub if name.endswith("experts.gate_up_proj")}


def _deepseek(hub: State) -> State:
    """DeepSeek-V3's extra layer as torchtitan 0.3 has it."""
    own = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "mtp_norm"}
    return {f"mtp_layers.0.{here}.weight": hub[f"model.layers.2.{name}.weight"]
            for name, here in own.items()}  # fmt: skip


def test_layers_for_multi_token_prediction_both_ways(tmp_path: Path) -> None:
    model = megatron_model("deepseek_v3", tmp_path / "model", more=1)
    hub = dict(load_file(model / "model.safetensors"))
    reshard.convert(model, tmp_path / "there", to="dcp", names="torchtitan")
    theirs = _deepseek(hub)
    state = loaded(tmp_path / "there", theirs)
    assert [name for name in theirs if not torch.equal(state[name], theirs[name])] == []
    names = {n for entry in reshard.open(tmp_path / "there").catalog.entries.values()
             for n in entry.names}  # fmt: skip
    assert "mtp_layers.0.attention.wkv_a.weight" in names
    assert "mtp_layers.0.moe.routed_experts.inner_experts.w1_EFD" in names
    base = megatron_model("deepseek_v3", tmp_path / "base", seed=1, more=1)
    reshard.convert(tmp_path / "there", tmp_path / "back", base=base)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == hub.keys()
    assert [name for name in hub if not torch.equal(back[name], hub[name])] == []
    held = load_file(base / "model.safetensors")
    few = {n: t for n, t in held.items() if not n.startswith("model.layers.2.")}
    save_file(few, base / "model.safetensors", metadata={"format": "pt"})
    report = reshard.convert(tmp_path / "there", tmp_path / "more", base=base)
    assert "layers-beyond-base" in [found.code for found in report.findings]
    more = load_file(tmp_path / "more" / "model.safetensors")
    assert torch.equal(more["model.layers.2.eh_proj.weight"], hub["model.layers.2.eh_proj.weight"])


def test_copies_that_are_none_are_refused(tmp_path: Path) -> None:
    model = megatron_model("deepseek_v3", tmp_path / "model", more=1)
    hub = dict(load_file(model / "model.safetensors"))
    hub["model.layers.2.embed_tokens.weight"] += 1
    save_file(hub, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(reshard.PlanError, match=r"differs from 'model\.embed_tokens"):
        reshard.convert(model, tmp_path / "there", to="dcp", names="torchtitan")
