"""DCP checkpoints: written by `torch.distributed.checkpoint`, and loaded by it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import checkpoint as dcp

from reshard.testing import ReaderConformance, Sample, WriterConformance
from reshard.testing.truth import Tensors
from tests.conformance.arrays import loaded_by_dcp, to_numpy, to_torch
from tests.fsdp.conftest import Oracle, oracle

__all__ = ["oracle"]


class TestReading(ReaderConformance):
    format = "dcp"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        dcp.save(state, checkpoint_id=folder, no_dist=True)
        return folder


class TestReadingWhatSeveralRanksSaved(ReaderConformance):
    format = "dcp"

    @pytest.fixture
    def sample(self, oracle: Oracle, tmp_path: Path) -> Sample:
        from safetensors.torch import load_file

        truth = load_file(oracle["odd-w3"].truth)
        path = oracle.copy("odd-w3", tmp_path / "checkpoint")
        return Sample(path, {name: to_numpy(tensor) for name, tensor in truth.items()})


class TestWriting(WriterConformance):
    to = "dcp"

    def load(self, folder: Path) -> Tensors:
        return loaded_by_dcp(folder)
