"""State dicts that torch.save wrote: in one file, in shards, in the legacy container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reshard.testing import ReaderConformance, Sample, truth
from reshard.testing.truth import Tensors
from tests.conformance.arrays import to_torch


class TestReadingOneFile(ReaderConformance):
    format = "torch"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        torch.save(state, folder / "pytorch_model.bin")
        return folder


class TestReadingFullStateDictOfFSDP(ReaderConformance):
    format = "torch"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        torch.save(state, folder / "pytorch_model_fsdp.bin")
        return folder


class TestReadingTheLegacyContainer(ReaderConformance):
    format = "torch"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        state = {name: to_torch(array) for name, array in tensors.items()}
        file = folder / "weights.pt"
        torch.save(state, file, _use_new_zipfile_serialization=False)
        return file


class TestReadingTiedWeights(ReaderConformance):
    format = "torch"

    @pytest.fixture
    def sample(self, tmp_path: Path) -> Sample:
        tensors = truth.ordinary()
        state = {name: to_torch(array) for name, array in tensors.items()}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        torch.save({"state_dict": state, "step": 3}, folder / "pytorch_model.bin")
        return Sample(folder, tensors, {"lm_head.weight": "model.embed_tokens.weight"})


class TestReadingShards(ReaderConformance):
    format = "torch"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        weight_map = {}
        for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
            file = f"pytorch_model-{number:05d}-of-00002.bin"
            torch.save({name: to_torch(tensors[name]) for name in names}, folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        return folder
