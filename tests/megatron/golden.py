"""Checkpoints that megatron-core 0.16.1 wrote on the CPU (gloo), and what they hold.

golden/megatron/NAME/checkpoint/   as the trainer lays it out
golden/megatron/NAME/config.json   of the base
golden/megatron/NAME/truth.json    by the hub's names: dtype, shape, SHA-256; proven by running
                                   Megatron's model and transformers' on the same tokens
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

from tests import folders
from tests.tensors import raw

HERE = Path(__file__).parents[1] / "golden" / "megatron"
GOLDEN = sorted(path.name for path in HERE.iterdir() if path.is_dir())


def truth(name: str) -> dict[str, list[Any]]:
    """Name -> [dtype, shape, SHA-256 of the bytes]."""
    found: dict[str, list[Any]] = json.loads((HERE / name / "truth.json").read_text("utf-8"))
    return found


def base(name: str, folder: Path, **changes: object) -> Path:
    """A base model of zeros with the names, shapes and config of what the training started from."""
    config = json.loads((HERE / name / "config.json").read_text(encoding="utf-8"))
    own = {
        key: (dtype, shape)
        for key, (dtype, shape, _) in truth(name).items()
        if not key.startswith(f"model.layers.{config['num_hidden_layers']}.")
    }
    return folders.zeros(folder, folders.meta(own), {**config, **changes})


def checkpoint(name: str) -> Path:
    """The folder that a user would name: the run's."""
    return HERE / name / "checkpoint"


def copied(name: str, folder: Path) -> Path:
    """A copy of it, to be damaged."""
    shutil.copytree(checkpoint(name), folder)
    return folder


def saved(folder: Path, state: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint in Megatron-Core's format with these tensors, written by torch."""
    folder.mkdir(parents=True)
    dcp.save(dict(state), checkpoint_id=folder, no_dist=True)
    torch.save({"iteration": 10}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}', encoding="utf-8")
    return folder


def weights(folder: Path) -> Path:
    """The folder of the run's one save that holds the model's tensors."""
    found = [path.parent for path in sorted(folder.rglob("metadata.json"))]
    return next(path for path in found if "extra" not in path.parts)


def digested(folder: Path) -> dict[str, list[Any]]:
    """A Hugging Face folder as `truth` describes it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            found[name] = [dtype, list(tensor.shape), hashlib.sha256(raw(tensor)).hexdigest()]
    return found
