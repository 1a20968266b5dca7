"""Model folders: written by safetensors, and loaded by it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reshard.testing import ReaderConformance, WriterConformance
from reshard.testing.truth import Tensors
from tests.conformance.arrays import to_numpy, to_torch


class TestReadingOneFile(ReaderConformance):
    format = "huggingface"

    def make(self, folder: Path, tensors: Tensors) -> Path:
        save_file({n: to_torch(array) for n, array in tensors.items()}, folder / "x.safetensors")
        return folder / "x.safetensors"


class TestReadingShards(ReaderConformance):
    format = "huggingface"
    unread = ("config.json",)
    # A folder without an index is read whole.
    dispensable = ("model.safetensors.index.json",)

    def make(self, folder: Path, tensors: Tensors) -> Path:
        weight_map = {}
        for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), start=1):
            file = f"model-{number:05d}-of-00002.safetensors"
            save_file({name: to_torch(tensors[name]) for name in names}, folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        return folder


class TestWriting(WriterConformance):
    to = "hf"

    def load(self, folder: Path) -> Tensors:
        index = folder / "model.safetensors.index.json"
        files = sorted(folder.glob("*.safetensors"))
        if index.is_file():
            files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        loaded: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}
            found = load_file(file)
            assert not loaded.keys() & found.keys()
            loaded.update(found)
            if index.is_file():
                assert all(_weight_map(index)[name] == file.name for name in found)
        return {name: to_numpy(tensor) for name, tensor in loaded.items()}


def _weight_map(index: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return found
