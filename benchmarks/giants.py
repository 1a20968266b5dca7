"""Checkpoints of a trillion parameters that take a few GB of disk: `python -m benchmarks.giants`.

    FOLDER/dcp        as FSDP2 saves: 70,000 tensors, 570,000 chunks, 1,024 files
    FOLDER/megatron   as Megatron-Core saves: experts stacked by layer, with every rank's plan
    FOLDER/zero3      as ZeRO-3 of 1,024 ranks saves: two files a rank

Every byte that a reader of metadata looks at is torch's own: each chunk is a torch.save file of
which only the two ends are written, and zeros, which take no disk, lie between them. The checksums
are those of the zeros. Tensors of `FILLED` hold values.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

Shape = tuple[int, ...]
HIDDEN, INTERMEDIATE, VOCABULARY = 7168, 2048, 163_840
#: Ranks that share an expert's matrices, and those that share a dense one.
_EXPERT_RANKS, _DENSE_RANKS = 8, 16
FILLED = "model.layers.0.mlp.experts.0."


@dataclass(frozen=True, slots=True)
class Size:
    """How large: layers of experts, experts of a layer, ranks. Hidden sizes stay."""

    layers: int = 60
    experts: int = 384
    world: int = 1024


WHOLE = Size()


def tensors(size: Size) -> Iterator[tuple[str, Shape, int, int]]:
    """Every tensor: its name, shape, how many ranks share it along the first axis, the first."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN), size.world, 0
    group = size.world // _EXPERT_RANKS
    for layer in range(size.layers + 1):
        prefix = f"model.layers.{layer}"
        first = layer * _DENSE_RANKS % size.world
        for name, shape in _dense(with_experts=layer < size.layers).items():
            yield f"{prefix}.{name}", shape, min(shape[0], _DENSE_RANKS), first
        if layer == size.layers:
            break
        for expert in range(size.experts):
            place = expert % group * _EXPERT_RANKS
            for name, shape in _EXPERT.items():
                yield f"{prefix}.mlp.experts.{expert}.{name}", shape, _EXPERT_RANKS, place
    yield "model.norm.weight", (HIDDEN,), _DENSE_RANKS, 0
    yield "lm_head.weight", (VOCABULARY, HIDDEN), size.world, 0


_EXPERT = {
    "gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "up_proj.weight": (INTERMEDIATE, HIDDEN),
    "down_proj.weight": (HIDDEN, INTERMEDIATE),
}


def _dense(*, with_experts: bool) -> dict[str, Shape]:
    attention = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "self_attn.q_a_proj.weight": (1536, HIDDEN),
        "self_attn.q_a_layernorm.weight": (1536,),
        "self_attn.q_b_proj.weight": (12288, 1536),
        "self_attn.kv_a_proj_with_mqa.weight": (576, HIDDEN),
        "self_attn.kv_a_layernorm.weight": (512,),
        "self_attn.kv_b_proj.weight": (16384, 512),
        "self_attn.o_proj.weight": (HIDDEN, 8192),
    }
    if not with_experts:
        return attention | {f"mlp.{name}": shape for name, shape in _EXPERT.items()}
    shared = {f"mlp.shared_experts.{name}": shape for name, shape in _EXPERT.items()}
    return attention | shared | {"mlp.gate.weight": (384, HIDDEN)}


@dataclass(slots=True)
class Files:
    """The items of each rank's file, as they are added."""

    folder: Path
    ends: dict[int, int] = field(default_factory=dict)
    descriptors: dict[int, int] = field(default_factory=dict)

    def add(self, rank: int, chunk: Shape, values: torch.Tensor | None) -> _StorageInfo:
        """Write the two ends of an item, or all of it where it has values."""
        start = self.ends.get(rank, 0)
        if rank not in self.descriptors:
            path = self.folder / f"__{rank}_0.distcp"
            self.descriptors[rank] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        fd = self.descriptors[rank]
        if values is None:
            head, nbytes, tail = _ends(chunk)
            os.pwrite(fd, head, start)
            os.pwrite(fd, tail, start + len(head) + nbytes)
            length = len(head) + nbytes + len(tail)
        else:
            length = os.pwrite(fd, _saved(values), start)
        self.ends[rank] = start + length
        return _StorageInfo(f"__{rank}_0.distcp", start, length)

    def close(self) -> None:
        for fd in self.descriptors.values():
            os.close(fd)


def _saved(tensor: torch.Tensor) -> bytes:
    stream = io.BytesIO()
    torch.save(tensor, stream)
    return stream.getvalue()


@cache
def _ends(shape: Shape) -> tuple[bytes, int, bytes]:
    """The two ends of a torch.save file of zeros in bfloat16, and the bytes between them."""
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    saved = _saved(tensor)
    nbytes = tensor.numel() * tensor.element_size()
    start = torch._C.PyTorchFileReader(io.BytesIO(saved)).get_record_offset("data/0")
    return saved[:start], nbytes, saved[start + nbytes :]


def values_of(name: str, shape: Shape) -> torch.Tensor:
    """What a tensor of `FILLED` holds."""
    seed = sum(name.encode())
    return (torch.arange(shape[0] * shape[1]) % 251 + seed % 7).reshape(shape).bfloat16()


def make_dcp(folder: Path, size: Size = WHOLE) -> None:
    """A save of FSDP2; `.metadata` is pickled by torch's own classes."""
    folder.mkdir(parents=True)
    files = Files(folder)
    described: dict[str, Any] = {}
    stored: dict[dcp.MetadataIndex, _StorageInfo] = {}
    for name, shape, parts, first in tensors(size):
        values = values_of(name, shape) if name.startswith(FILLED) else None
        step = -(-shape[0] // parts)
        chunks = []
        for part, start in enumerate(range(0, shape[0], step)):
            rows = min(step, shape[0] - start)
            chunk = (rows, *shape[1:])
            offsets = (start, *(0 for _ in shape[1:]))
            own = None if values is None else values[start : start + rows].clone()
            place = files.add((first + part) % size.world, chunk, own)
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk)))
            stored[dcp.MetadataIndex(name, offsets, part)] = place
        # One each, as planners make them.
        properties = dcp.TensorProperties(torch.bfloat16)
        described[name] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    files.close()
    write_metadata(folder, metadata(folder, described, stored))


def make_megatron(folder: Path, size: Size = WHOLE) -> None:
    """A save of Megatron-Core: a chunk of each layer and expert and expert-parallel part."""
    folder.mkdir(parents=True)
    files = Files(folder)
    described: dict[str, Any] = {}
    stored: dict[dcp.MetadataIndex, _StorageInfo] = {}
    plans: list[list[WriteItem]] = [[] for _ in range(size.world)]
    for name, shape, grid in _stacked(size):
        chunk = tuple(n // parts for n, parts in zip(shape, grid, strict=True))
        chunks = []
        first = dcp.TensorProperties(torch.bfloat16)
        for part, place in enumerate(_places(grid)):
            offsets = tuple(at * n for at, n in zip(place, chunk, strict=True))
            rank = part % size.world
            index = dcp.MetadataIndex(name, offsets, part)
            stored[index] = files.add(rank, chunk, None)
            one = dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(chunk))
            chunks.append(one)
            # One each, as planners make them; the tensor gets that of its first chunk.
            properties = dcp.TensorProperties(torch.bfloat16) if part else first
            data = TensorWriteData(one, properties, torch.Size(shape))
            plans[rank].append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        described[name] = dcp.TensorStorageMetadata(first, torch.Size(shape), chunks)
    files.close()
    found = metadata(folder, described, stored)
    found.all_local_plans = [SavePlan(items) for items in plans]
    torch.save({"checkpoint_version": 3.0, "iteration": 10}, folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
               "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(backend), encoding="utf-8")
    write_metadata(folder, found)


def _stacked(size: Size) -> Iterator[tuple[str, Shape, Shape]]:
    """Megatron's tensors: name, shape, and the grid that they are cut along."""
    layers, experts = size.layers, size.experts
    decoder = "decoder.layers"
    yield "embedding.word_embeddings.weight", (VOCABULARY, HIDDEN), (8, 1)
    yield "output_layer.weight", (VOCABULARY, HIDDEN), (8, 1)
    yield "decoder.final_layernorm.weight", (HIDDEN,), (1,)
    for name, own, cut in (
        ("input_layernorm.weight", (HIDDEN,), (1,)),
        ("pre_mlp_layernorm.weight", (HIDDEN,), (1,)),
        ("self_attention.linear_qkv.weight", (10240, HIDDEN), (8, 1)),
        ("self_attention.linear_proj.weight", (HIDDEN, 8192), (1, 8)),
        ("mlp.router.weight", (experts, HIDDEN), (1, 1)),
    ):
        yield f"{decoder}.{name}", (layers, *own), (layers, *cut)
    moe = f"{decoder}.mlp.experts.experts"
    for name, own, cut in (
        ("linear_fc1.weight", (2 * INTERMEDIATE, HIDDEN), (16, 1)),
        ("linear_fc2.weight", (HIDDEN, INTERMEDIATE), (1, 8)),
    ):
        yield f"{moe}.{name}", (layers, experts, *own), (layers, experts, *cut)


def _places(grid: Sequence[int]) -> Iterator[Shape]:
    if not grid:
        yield ()
        return
    for outer in _places(grid[:-1]):
        for last in range(grid[-1]):
            yield (*outer, last)


def metadata(
    folder: Path, described: dict[str, Any], stored: dict[dcp.MetadataIndex, _StorageInfo]
) -> dcp.Metadata:
    """What `.metadata` holds of these tensors and places."""
    paths = {name: (name,) for name in described}
    return dcp.Metadata(described, paths, _gathered(stored), dcp.StorageMeta(folder), "1.0.0")


def _gathered(
    stored: dict[dcp.MetadataIndex, _StorageInfo],
) -> dict[dcp.MetadataIndex, _StorageInfo]:
    """The places as the coordinator gathers them: rank by rank, each with strings of its own."""
    ranks: dict[str, list[tuple[dcp.MetadataIndex, _StorageInfo]]] = {}
    for index, place in stored.items():
        ranks.setdefault(place.relative_path, []).append((index, place))
    gathered = {}
    for file, items in ranks.items():
        names: dict[str, str] = {}
        for index, place in items:
            fqn = names.setdefault(index.fqn, index.fqn.encode().decode())
            own = dcp.MetadataIndex(fqn, index.offset, index.index)
            gathered[own] = _StorageInfo(file, place.offset, place.length)
    return gathered


def write_metadata(folder: Path, found: dcp.Metadata) -> None:
    with open(folder / ".metadata", "wb") as file:
        pickle.dump(found, file)


def make_zero3(folder: Path, size: Size = WHOLE) -> None:
    """A save of ZeRO-3. The model files, which are alike on each of 8 devices, are hard links."""
    tag = folder / "global_step100"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name, encoding="utf-8")
    shapes = {name: torch.Size(shape) for name, shape, _, _ in tensors(size)}
    numel = sum(-(-shape.numel() // size.world) for shape in shapes.values())
    for rank in range(size.world):
        prefix = f"zero_pp_rank_{rank}_mp_rank_00"
        path = tag / f"{prefix}_model_states.pt"
        if rank < 8:
            path.write_bytes(_model_file(shapes, rank, size))
        else:
            os.link(tag / f"zero_pp_rank_{rank % 8}_mp_rank_00_model_states.pt", path)
        optimizer = tag / f"bf16_{prefix}_optim_states.pt"
        with torch.serialization.skip_data():
            torch.save(_optimizer(numel, size), optimizer)
        _fill(optimizer, rank, size)


def _fill(path: Path, rank: int, size: Size) -> None:
    """Write a rank's pieces of the tensors of `FILLED`, as float32."""
    start = torch._C.PyTorchFileReader(str(path)).get_record_offset("data/0")
    cursor = 0
    with path.open("r+b") as file:
        for name, shape, _, _ in tensors(size):
            piece = -(-math.prod(shape) // size.world)
            if name.startswith(FILLED):
                file.seek(start + cursor * 4)
                own = _master(name, shape)[rank * piece : (rank + 1) * piece]
                file.write(own.numpy().tobytes())
            elif name.startswith("model.layers.0.mlp.experts.1."):
                break
            cursor += piece


@cache
def _master(name: str, shape: Shape) -> torch.Tensor:
    return values_of(name, shape).reshape(-1).float()


@contextmanager
def _on_device(number: int) -> Iterator[None]:
    """Every storage is written as one of a device that this machine lacks."""
    tag = torch.serialization.location_tag
    torch.serialization.location_tag = lambda _: f"cuda:{number}"
    try:
        yield
    finally:
        torch.serialization.location_tag = tag


def _model_file(shapes: dict[str, torch.Size], device: int, size: Size) -> bytes:
    """Written to a stream, as asynchronous engines do: the file does not hold its own name."""
    content = {
        "module": {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes},
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "dp_world_size": size.world,
        "mp_world_size": 1,
        "global_steps": 100,
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
        "ds_version": "0.19.8",
    }
    stream = io.BytesIO()
    with _on_device(device):
        torch.save(content, stream)
    return stream.getvalue()


def _optimizer(numel: int, size: Size) -> dict[str, Any]:
    """Rank's flat masters and moments, in sub-groups of 1e9 elements as DeepSpeed cuts them."""
    cut = [min(10**9, numel - start) for start in range(0, numel, 10**9)]
    flat = [torch.empty(n) for n in cut]
    state = {
        number: {
            "step": 100,
            "exp_avg": torch.empty(n),
            "exp_avg_sq": torch.empty(n),
        }
        for number, n in enumerate(cut)
    }
    return {
        "optimizer_state_dict": {
            "zero_stage": 3,
            "partition_count": size.world,
            "fp32_flat_groups": flat,
            "optimizer_state_dict": {
                "state": state,
                "param_groups": [{"lr": 0.01, "params": [*range(len(cut))]}],
            },
        },
        "ds_version": "0.19.8",
    }


MAKERS = {"dcp": make_dcp, "megatron": make_megatron, "zero3": make_zero3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", action="append", choices=MAKERS, help="default: all")
    for name in ("layers", "experts", "world"):
        parser.add_argument(f"--{name}", type=int, default=getattr(WHOLE, name))
    given = parser.parse_args()
    size = Size(given.layers, given.experts, given.world)
    for kind in given.kind or MAKERS:
        MAKERS[kind](given.folder / kind, size)


if __name__ == "__main__":
    main()
