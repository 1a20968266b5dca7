"""State dicts that torch.save wrote: in one file, in shards, in the legacy container."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reshard
from reshard.conversion.options import To
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


UNHANDLED = {
    "a sparse tensor": torch.eye(2).to_sparse(),
    "a tensor of a torch.ComplexDoubleStorage": torch.ones(2, dtype=torch.complex128),
    "repeats 1 elements": torch.ones(1).expand(1 << 30, 1 << 18),
}


@pytest.mark.parametrize("what", UNHANDLED)
@pytest.mark.parametrize("to", ["hf", "dcp"])
def test_a_tensor_that_is_not_handled_is_not_left_out(tmp_path: Path, what: str, to: To) -> None:
    (tmp_path / "run").mkdir()
    torch.save({"a": torch.ones(2), "b": UNHANDLED[what]}, tmp_path / "run" / "pytorch_model.bin")
    with pytest.raises(reshard.UnsupportedError, match=what) as caught:
        reshard.convert(tmp_path / "run", tmp_path / "out", to=to)
    assert caught.value.tensor == "b"
    assert not (tmp_path / "out").exists()


def test_an_expanded_tensor_is_written_out(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3.0).expand(2, 3)}, tmp_path / "pytorch_model.bin")
    assert reshard.open(tmp_path).tensors["a"].numpy().tolist() == [[0, 1, 2], [0, 1, 2]]
