"""Checkpoints of very many small tensors, whose names and places take more than their values.

python -m benchmarks.many FOLDER --tensors 200000

FOLDER/hf     a Hugging Face folder: shards of 10,000 tensors, and their index
FOLDER/dcp    one rank's save of torch.distributed.checkpoint, a torch.save file each tensor
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint import metadata as dcp

from benchmarks import giants

#: Names of a mixture of experts, as most tensors of large models have them.
_EXPERTS, _PARTS = 384, ("gate_proj", "up_proj", "down_proj")
#: Elements of a tensor, in bfloat16.
NUMEL = 32
_SHARD = 10_000


def names(count: int) -> Iterator[str]:
    """The names of `count` tensors."""
    for number in range(count):
        expert, part = divmod(number, len(_PARTS))
        layer, place = divmod(expert, _EXPERTS)
        yield f"model.layers.{layer}.mlp.experts.{place}.{_PARTS[part]}.weight"


def make_hf(folder: Path, count: int) -> None:
    """A folder as `save_pretrained` writes it, shards of at most 10,000 tensors."""
    folder.mkdir(parents=True)
    every = list(names(count))
    shards = [every[start : start + _SHARD] for start in range(0, count, _SHARD)]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        nbytes = 2 * NUMEL
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for place, name in enumerate(shard):
            where = [place * nbytes, (place + 1) * nbytes]
            header[name] = {"dtype": "BF16", "shape": [NUMEL], "data_offsets": where}
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        values = torch.arange(len(shard) * NUMEL).bfloat16().view(torch.int16).numpy()
        (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + values.tobytes())
    index = {"metadata": {"total_size": count * NUMEL * 2}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def make_dcp(folder: Path, count: int) -> None:
    """A save of one rank; `.metadata` is pickled by torch's own classes."""
    folder.mkdir(parents=True)
    files = giants.Files(folder)
    described = {}
    stored = {}
    size, start = torch.Size([NUMEL]), torch.Size([0])
    for name in names(count):
        stored[dcp.MetadataIndex(name, (0,), 0)] = files.add(0, (NUMEL,), None)
        chunks = [dcp.ChunkStorageMetadata(start, size)]
        properties = dcp.TensorProperties(torch.bfloat16)  # one each, as planners make them
        described[name] = dcp.TensorStorageMetadata(properties, size, chunks)
    files.close()
    giants.write_metadata(folder, giants.metadata(folder, described, stored))


MAKERS = {"hf": make_hf, "dcp": make_dcp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensors", type=int, default=200_000)
    given = parser.parse_args()
    for kind, make in MAKERS.items():
        make(given.folder / kind, given.tensors)


if __name__ == "__main__":
    main()
