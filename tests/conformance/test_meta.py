"""Meta's own files of Llama: what torch loads of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from reshard.testing import ReaderConformance, WriterConformance
from reshard.testing.truth import Tensors
from tests.conformance.arrays import to_numpy, to_torch


class TestReading(ReaderConformance):
    format = "meta"
    dispensable = ("params.json",)

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        torch.save(state, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps({"dim": 32}), encoding="utf-8")
        return folder


class TestWriting(WriterConformance):
    to = "meta"

    def load(self, folder: Path) -> Tensors:
        state = torch.load(folder / "consolidated.00.pth", weights_only=True)
        return {name: to_numpy(tensor) for name, tensor in state.items()}
