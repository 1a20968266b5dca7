"""Tiny models and checkpoints to be wrong about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests import zero3
from tests.models import released

State = dict[str, torch.Tensor]

ADAPTED = "model.layers.0.self_attn.q_proj"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def state(seed: int = 2, name: str = "llama") -> State:
    """The tensors of a small model by their names in released files."""
    return released.values(name, seed)


def config(name: str = "llama", **values: Any) -> dict[str, Any]:
    return {**released.config(name), **values}


def model(
    folder: Path, seed: int = 1, name: str = "llama", tensors: State | None = None, **values: Any
) -> Path:
    """A Hugging Face folder."""
    return released.write(folder, name, state(seed, name) if tensors is None else tensors, **values)


def zero(folder: Path, tensors: Mapping[str, torch.Tensor] | None = None, world: int = 2) -> Path:
    """A DeepSpeed ZeRO-3 checkpoint."""
    folder.mkdir(parents=True)
    zero3.save(folder, state() if tensors is None else tensors, world)
    return folder


def saved(path: Path, value: object) -> Path:
    """A torch.save file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return path


def adapters(rank: int = 2, before: str = "base_model.model.", **more: torch.Tensor) -> State:
    """PEFT's parameters of one module."""
    width = state()[f"{ADAPTED}.weight"].shape
    torch.manual_seed(4)
    return {
        f"{before}{ADAPTED}.lora_A.default.weight": torch.randn(rank, width[1]),
        f"{before}{ADAPTED}.lora_B.default.weight": torch.randn(width[0], rank),
        **more,
    }


def tuned() -> State:
    """The state dict of a PEFT model: base weights under adapters, and the adapters."""
    found = {}
    for name, value in state(1).items():
        name = name.replace(ADAPTED, f"{ADAPTED}.base_layer")
        found[f"base_model.model.{name}"] = value
    return {**found, **adapters()}


def adapter_config(folder: Path, **values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**content, **values}))
    return path


def adapter(folder: Path, **values: Any) -> Path:
    """An adapter folder of PEFT."""
    adapter_config(folder, **values)
    tensors = {key.replace(".default", ""): value for key, value in adapters().items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder
