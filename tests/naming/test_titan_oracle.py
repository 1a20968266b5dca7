"""torchtitan's own converters, where it is installed: they make of what reshard writes what reshard
reads it as.

It needs more than its declared packages on a machine without a GPU: pip install --no-deps
torchtitan, and tyro, spmd_types and triton, which its imports ask for.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.megatron.models import model

pytest.importorskip("torchtitan.models.utils", reason="torchtitan is not installed")

_ADAPTERS = {
    "llama": ("llama3", "Llama3StateDictAdapter"),
    "qwen3": ("qwen3", "Qwen3StateDictAdapter"),
    "qwen3_moe": ("qwen3", "Qwen3StateDictAdapter"),
    "deepseek_v3": ("deepseek_v3", "DeepSeekV3StateDictAdapter"),
}
# Names of 2025, which the converters of 0.3 do not know.
_OLDER = re.compile(r"output\.weight|.*\.attention\.w[kv]\..*|.*\.moe\.experts\..*|.*\.expert_bias")


def _adapter(family: str, more: int) -> Any:
    """The converter for a model of `tests.megatron.models`."""
    room, name = _ADAPTERS[family]
    module = importlib.import_module(f"torchtitan.models.{room}.state_dict_adapter")
    experts = SimpleNamespace(num_experts=4)
    attention = SimpleNamespace(
        n_heads=4, n_kv_heads=2, head_dim=8 if family == "llama" else 16, q_lora_rank=12
    )
    mixed = family in ("qwen3_moe", "deepseek_v3")
    layer = SimpleNamespace(attention=attention, moe=experts if mixed else None)
    config = SimpleNamespace(
        layers=[layer] * 2, mtp_layers=[layer] * more, dim=32, enable_weight_tying=False
    )
    made = getattr(module, name)(config, None)
    made._validate_hf_rope_config = lambda *_, **__: None  # of a config that is whole
    return made


def _own_names(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """What was written, by the names of torchtitan 0.3."""
    opened = reshard.open(folder)
    found = {}
    for name, entry in opened.catalog.entries.items():
        tensor = torch.from_numpy(opened.tensors[name].numpy().copy())
        for own in entry.names:
            latent = family == "deepseek_v3"
            older = _OLDER.fullmatch(own) or (not latent and ".attention.wq." in own)
            if not older and not (latent and "qkv_linear" in own):
                found[own] = tensor
    return found


@pytest.mark.parametrize(
    ("family", "more"),
    [("llama", 0), ("qwen3", 0), ("qwen3_moe", 0), ("deepseek_v3", 0), ("deepseek_v3", 1)],
)
def test_its_converters_agree_both_ways(family: str, more: int, tmp_path: Path) -> None:
    made = model(family, tmp_path / "model", more=more)
    hub = dict(load_file(made / "model.safetensors"))
    copies = {n for n in hub if n.endswith((".2.embed_tokens.weight", "shared_head.head.weight"))}
    reshard.convert(made, tmp_path / "there", to="dcp", names="torchtitan")
    theirs = _adapter(family, more).to_hf(_own_names(tmp_path / "there", family))
    assert theirs.keys() == hub.keys() - copies
    assert [name for name in theirs if not torch.equal(theirs[name], hub[name])] == []
    own = _adapter(family, more).from_hf({n: t for n, t in hub.items() if n not in copies})
    saved = {name: tensor.contiguous() for name, tensor in own.items()}
    dcp.save(saved, checkpoint_id=tmp_path / "run", no_dist=True)
    base = model(family, tmp_path / "base", seed=1, more=more)
    reshard.convert(tmp_path / "run", tmp_path / "back", base=base)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == hub.keys()
    assert [name for name in hub if not torch.equal(back[name], hub[name])] == []
