"""Models in torchtitan's and Meta's names, against the formulas that their converters use."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Box, Entry, Extent, FileRef, Fragment, TensorSpec
from reshard.core.tiling import check_tiling
from reshard.naming.titan import turn
from reshard.naming.titan_into import turn_back
from reshard.testing.gathering import gather
from tests import folders

_LAYERS, _HEADS, _KV, _SIZE, _WIDTH, _EXPERTS = 2, 4, 2, 8, 24, 3

# On the hub -> in torchtitan 0.3, and in its checkpoints of 2025 and Meta's files.
_NAMES = {
    "model.embed_tokens.weight": ("tok_embeddings.weight", "tok_embeddings.weight"),
    "model.norm.weight": ("norm.weight", "norm.weight"),
    "lm_head.weight": ("lm_head.weight", "output.weight"),
}
_LAYER = {
    "input_layernorm.weight": ("attention_norm.weight", "attention_norm.weight"),
    "post_attention_layernorm.weight": ("ffn_norm.weight", "ffn_norm.weight"),
    "self_attn.q_proj.weight": ("attention.qkv_linear.wq.weight", "attention.wq.weight"),
    "self_attn.k_proj.weight": ("attention.qkv_linear.wk.weight", "attention.wk.weight"),
    "self_attn.v_proj.weight": ("attention.qkv_linear.wv.weight", "attention.wv.weight"),
    "self_attn.o_proj.weight": ("attention.wo.weight", "attention.wo.weight"),
}
_DENSE = {
    "mlp.gate_proj.weight": ("feed_forward.w1.weight", "feed_forward.w1.weight"),
    "mlp.up_proj.weight": ("feed_forward.w3.weight", "feed_forward.w3.weight"),
    "mlp.down_proj.weight": ("feed_forward.w2.weight", "feed_forward.w2.weight"),
}
_NORMS = {
    "self_attn.q_norm.weight": ("attention.q_norm.weight", "attention.q_norm.weight"),
    "self_attn.k_norm.weight": ("attention.k_norm.weight", "attention.k_norm.weight"),
}
_INNER = "moe.routed_experts.inner_experts"
_STACKED = {
    "gate_proj": (f"{_INNER}.w1_EFD", "moe.experts.w1"),
    "up_proj": (f"{_INNER}.w3_EFD", "moe.experts.w3"),
    "down_proj": (f"{_INNER}.w2_EDF", "moe.experts.w2"),
}
_SHAPES = {
    "q_proj": (_HEADS * _SIZE, _WIDTH),
    "k_proj": (_KV * _SIZE, _WIDTH),
    "v_proj": (_KV * _SIZE, _WIDTH),
    "o_proj": (_WIDTH, _HEADS * _SIZE),
    "gate_proj": (10, _WIDTH),
    "up_proj": (10, _WIDTH),
    "down_proj": (_WIDTH, 10),
    "gate": (_EXPERTS, _WIDTH),
    "e_score_correction_bias": (_EXPERTS,),
    "q_a_proj": (6, _WIDTH),
    "q_a_layernorm": (6,),
    "q_b_proj": (_HEADS * _SIZE, 6),
    "kv_a_proj_with_mqa": (7, _WIDTH),
    "kv_a_layernorm": (5,),
    "kv_b_proj": (_HEADS * 12, 5),
    "q_norm": (_SIZE,),
    "k_norm": (_SIZE,),
    "embed_tokens": (33, _WIDTH),
    "lm_head": (33, _WIDTH),
}


_MLA = {
    "self_attn.q_a_proj.weight": "attention.wq_a.weight",
    "self_attn.q_a_layernorm.weight": "attention.q_norm.weight",
    "self_attn.q_b_proj.weight": "attention.wq_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attention.wkv_a.weight",
    "self_attn.kv_a_layernorm.weight": "attention.kv_norm.weight",
    "self_attn.kv_b_proj.weight": "attention.wkv_b.weight",
    "mlp.shared_experts.gate_proj.weight": "moe.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared_experts.w2.weight",
}
_OF_MLA = {name: (here, here) for name, here in _MLA.items()} | {
    "mlp.gate.e_score_correction_bias": ("moe.expert_bias_E", "moe.expert_bias")
}


def turned_back(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The hub's rows as Meta has them: what torchtitan's `_reverse_permute` does."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def made(model_type: str, era: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A model by the hub's names and by torchtitan's. `era` 0: of 0.3, 1: of 2025."""
    generator = torch.Generator().manual_seed(4)

    def values(name: str, *front: int) -> torch.Tensor:
        shape = _SHAPES.get(name.removesuffix(".weight").rpartition(".")[2], (_WIDTH,))
        return torch.randn(*front, *shape, generator=generator)

    hub = {name: values(name) for name in _NAMES}
    theirs = {_NAMES[name][era]: value for name, value in hub.items()}
    table = _LAYER | (_NORMS if model_type.startswith("qwen3") else {})
    table |= _DENSE if model_type in ("llama", "qwen3") else {}
    if model_type == "deepseek_v3":
        projections = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        table = {n: here for n, here in table.items() if not n.endswith(projections)} | _OF_MLA
    for layer in range(_LAYERS):
        for name, names in table.items():
            value = hub[f"model.layers.{layer}.{name}"] = values(name)
            if model_type == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                value = turned_back(value, _HEADS if "q_proj" in name else _KV)
            theirs[f"layers.{layer}.{names[era]}"] = value
        if model_type in ("llama", "qwen3"):
            continue
        router = hub[f"model.layers.{layer}.mlp.gate.weight"] = values("gate")
        theirs[f"layers.{layer}.moe.router.gate.weight"] = router
        theirs[f"layers.{layer}.moe.tokens_per_expert"] = torch.zeros(_EXPERTS)
        for name, names in _STACKED.items():
            stack = theirs[f"layers.{layer}.{names[era]}"] = values(name, _EXPERTS)
            for expert in range(_EXPERTS):
                hub[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = stack[expert]
    return hub, theirs


def base_of(hub: dict[str, torch.Tensor], folder: Path, model_type: str, **more: Any) -> Path:
    config = {
        "model_type": model_type,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV,
        "tie_word_embeddings": False,
        **more,
    }
    return folders.zeros(folder, hub, config)


@pytest.mark.heavy
@pytest.mark.parametrize("era", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "qwen3_moe", "deepseek_v3"])
def test_a_dcp_checkpoint_becomes_the_hubs(model_type: str, era: int, tmp_path: Path) -> None:
    hub, theirs = made(model_type, era)
    step = tmp_path / "step-10"
    state = {**theirs, "optimizer": {"state.norm.weight.exp_avg": torch.ones(2)}, "train_state": 5}
    dcp.save(state, checkpoint_id=step, no_dist=True)
    base = base_of(hub, tmp_path / "base", model_type)
    report = reshard.convert(step, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == hub.keys()
    assert [name for name in hub if not torch.equal(found[name], hub[name])] == []
    assert any("torchtitan's names" in rule for rule in report.rules)
    assert any("turned" in rule for rule in report.rules) == (model_type == "llama")
    assert reshard.verify(tmp_path / "out", step).num_tensors == len(hub)
    assert reshard.diff(step, tmp_path / "out").same


def test_metas_file(tmp_path: Path) -> None:
    hub, theirs = made("llama", 1)
    torch.save({**theirs, "rope.freqs": torch.ones(4)}, tmp_path / "consolidated.00.pth")
    base = base_of(hub, tmp_path / "base", "llama")
    reshard.convert(tmp_path / "consolidated.00.pth", tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [name for name in hub if not torch.equal(found[name], hub[name])] == []


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    hub, theirs = made("llama", 0)
    torch.save(theirs, tmp_path / "model.pt")
    other = base_of(hub, tmp_path / "other", "gemma2")
    known = "knows for llama, llama4, llama4_text, qwen3, qwen3_moe, deepseek_v3, gpt_oss"
    with pytest.raises(reshard.UnsupportedError, match=known):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=other)
    bare = base_of(
        hub, tmp_path / "bare", "llama", num_attention_heads=None, num_key_value_heads=None
    )
    with pytest.raises(reshard.NamesError, match="states no num_attention_heads"):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=bare)
    odd = base_of(hub, tmp_path / "odd", "llama", num_attention_heads=5)
    with pytest.raises(reshard.NamesError, match="are not 5 heads of pairs"):
        reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=odd)
    # InternLM2 has such names on the hub: its checkpoints go through as they are.
    hubs = {n if n.startswith("lm_head") else f"model.{n}": value for n, value in theirs.items()}
    own = base_of(hubs, tmp_path / "own", "internlm2")
    assert reshard.convert(tmp_path / "model.pt", tmp_path / "own-out", base=own).verified
    # A bias that the router was balanced with is no part of the hub's model: named, not dropped.
    hub, theirs = made("qwen3_moe", 0)
    torch.save({**theirs, "layers.0.moe.expert_bias": torch.ones(3)}, tmp_path / "moe.pt")
    base = base_of(hub, tmp_path / "moe", "qwen3_moe")
    with pytest.raises(reshard.NamesError, match=r"layers\.0\.moe\.expert_bias"):
        reshard.convert(tmp_path / "moe.pt", tmp_path / "out", base=base)


def test_turned_heads_give_the_same_attention() -> None:
    """Meta's rotary embedding on its rows scores as the hub's does on the turned ones."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(_SIZE, _WIDTH, generator=generator, dtype=torch.float64) for _ in "qk"]
    inputs = torch.randn(5, _WIDTH, generator=generator, dtype=torch.float64)
    angles = torch.outer(torch.arange(5.0), 10_000.0 ** -(torch.arange(4.0) / 4)).double()
    scores = []
    for metas in (True, False):
        rotated = []
        for weight in weights:
            rows = inputs @ (turned_back(weight, 1) if metas else weight).T
            if metas:
                pairs = torch.view_as_complex(rows.reshape(5, 4, 2))
                turning = torch.polar(torch.ones_like(angles), angles)
                rotated.append(torch.view_as_real(pairs * turning).flatten(1))
            else:
                cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
                half = torch.cat((-rows[:, 4:], rows[:, :4]), 1)
                rotated.append(rows * cos + half * sin)
        scores.append(rotated[0] @ rotated[1].T)
    assert torch.allclose(scores[0], scores[1])


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, (1 << 17) - 1), st.integers(0, 7))
def test_heads_are_turned_in_any_parts(heads: int, pairs: int, across: int, along: int) -> None:
    """Rows torn apart anywhere (before those whose bit is set), and columns, as FSDP and tensor
    parallelism tear them."""
    shape = (2 * heads * pairs, 4)
    rows = [0, *(row for row in range(1, shape[0]) if across >> row & 1), shape[0]]
    columns = [0, *(column for column in range(1, 4) if along >> column - 1 & 1), 4]
    whole = np.arange(shape[0] * 4, dtype=np.float32).reshape(shape)
    content, fragments = b"", []
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            part = whole[top:bottom, left:right].tobytes()
            extent = Extent(FileRef("x"), len(content), len(part))
            box = Box(shape, (top, left), (bottom - top, right - left))
            fragments.append(Fragment(box, extent, FLOAT32))
            content += part
    given_entry = Entry(TensorSpec("q", FLOAT32, shape), tuple(fragments))
    for made, expected in (
        (turn(given_entry, heads), whole.reshape(heads, pairs, 2, 4).transpose(0, 2, 1, 3)),
        (turn_back(given_entry, heads), whole.reshape(heads, 2, pairs, 4).transpose(0, 2, 1, 3)),
        (turn_back(turn(given_entry, heads), heads), whole),
    ):
        check_tiling(made)
        assert np.array_equal(gather(made, {"x": content}), expected.reshape(shape))
