"""Megatron-Core's checkpoints: items and metadata by torch's DCP, the files beside them by hand.

Those that Megatron-Core itself wrote are in `tests/megatron`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from reshard.testing import ReaderConformance, WriterConformance
from reshard.testing.truth import Tensors
from tests.conformance.arrays import loaded_by_dcp, to_torch

_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TestReading(ReaderConformance):
    format = "megatron"
    unread = ("common.pt",)

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        args = argparse.Namespace(num_layers=2, hidden_size=32)
        torch.save({"args": args, "iteration": 10}, folder / "common.pt")
        (folder / "metadata.json").write_text(json.dumps(_BACKEND), encoding="utf-8")
        return folder


class TestWriting(WriterConformance):
    """What megatron-core itself makes of it is in `tests/megatron/test_into.py`."""

    to = "megatron"

    def load(self, folder: Path) -> Tensors:
        return loaded_by_dcp(folder)
