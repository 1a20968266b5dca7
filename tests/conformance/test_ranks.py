"""Rank files: written by torch.save, each tensor whole in every file, and by ranks of FSDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reshard.testing import ReaderConformance, Sample
from reshard.testing.truth import Tensors
from tests.conformance.arrays import to_numpy, to_torch
from tests.ranks.conftest import Ranks, ranks

__all__ = ["ranks"]


class TestReading(ReaderConformance):
    format = "ranks"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        for rank in range(2):
            torch.save(state, folder / f"model_rank{rank}.pt")
        return folder


class _OfRanks(ReaderConformance):
    format = "ranks"
    save: str

    @pytest.fixture
    def sample(self, ranks: Ranks, tmp_path: Path) -> Sample:
        truth = load_file(ranks.truth(self.save))
        path = ranks.copy(self.save, tmp_path / "checkpoint")
        return Sample(path, {name: to_numpy(tensor) for name, tensor in truth.items()})


@pytest.mark.heavy
class TestReadingShardsOfFsdp2(_OfRanks):
    save = "odd-w4"


class TestReadingShardsOfVerl(_OfRanks):
    save = "odd-verl"
    dispensable = ("fsdp_config.json",)
