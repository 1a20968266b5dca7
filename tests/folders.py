"""Hugging Face folders and torch files that tests make and change."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def zeros(folder: Path, like: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> Path:
    """A model folder of zeros, with these names, shapes and dtypes (of `meta` tensors too)."""
    folder.mkdir(parents=True)
    tensors = {n: torch.zeros(value.shape, dtype=value.dtype) for n, value in like.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def meta(described: Mapping[str, tuple[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Tensors without storage, from their dtypes and shapes."""
    return {
        name: torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (dtype, shape) in described.items()
    }


def edit_config(folder: Path, **values: object) -> None:
    """Change fields of config.json; None removes one."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **values}
    removed = {key for key, value in values.items() if value is None}
    kept = {key: value for key, value in config.items() if key not in removed}
    path.write_text(json.dumps(kept), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of model.safetensors."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_saved(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a torch.save file holds."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
