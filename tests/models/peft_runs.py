"""A tiny model with adapters of the real PEFT, what PEFT makes of it, and its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import released

peft = pytest.importorskip("peft")

ALPHA, RANK = 8, 4
LINEAR = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 27).reshape(2, 12)
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 3}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "everything": {"target_modules": "all-linear"},
}


class Run:
    """A tiny Llama with adapters, its base folder, and its checkpoint as one torch file."""

    def __init__(self, settings: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
        self.dtype = dtype
        values = {k: (v / 4).to(dtype) for k, v in released.values("llama", seed=0).items()}
        self.base = released.write(folder / "base", "llama", values)
        self.model = self.fresh()
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **{"target_modules": LINEAR, **settings})
        self.model = peft.get_peft_model(self.model, config).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.randn_like(parameter) / 4 + 0.1)
        self.checkpoint = folder / "run" / "model.pt"
        self.checkpoint.parent.mkdir()
        torch.save(self.model.state_dict(), self.checkpoint)
        self.config = folder / "config"
        self.model.peft_config["default"].save_pretrained(self.config)

    def fresh(self) -> Any:
        """The base model as transformers loads it."""
        return released.load(self.base, "LlamaForCausalLM", self.dtype)

    def merged(self) -> released.State:
        """What PEFT merges: the state dict of a plain model."""
        other = peft.get_peft_model(self.fresh(), self.model.peft_config["default"])
        other.load_state_dict(self.model.state_dict())
        found: released.State = other.merge_and_unload().state_dict()
        return found

    def logits(self) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = self.model(IDS).logits
        return found


Get = Callable[..., Run]
