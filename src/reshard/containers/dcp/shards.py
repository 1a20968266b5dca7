"""Shards of the DCP Hugging Face writer: safetensors files that hold parts of tensors.

    shard-00001-model-00001-of-00002.safetensors      rank 0, first of two files of the model
    shard-00001-model-00002-of-00002.safetensors
    shard-00002-model-00001-of-00002.safetensors      rank 1
    header: "__metadata__": {"DCP_VERSION": "1.0", "format": "pt",
                             "DCP_SHARDING_INFO": JSON {name: {"saved_offsets": [..]}}}

Written by `HuggingFaceStorageWriter(save_distributed=True)` (torch 2.13, hf_storage.py), without
`.metadata` and index. No file states a tensor's full shape: it follows from the extent of the
parts. So a last rank whose files are all missing cannot be noticed here; every other gap is.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from reshard.containers import safetensors as safetensors_file
from reshard.containers.safetensors import SafetensorsFile
from reshard.core.regex import regex
from reshard.core.tensors import Box, Entry, Extent, Fragment, Shape, TensorKind, TensorSpec
from reshard.core.tiling import proven
from reshard.errors import FormatError, IncompleteError, brief
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import listing


class _Chunk(Struct, frozen=True):
    spec: TensorSpec
    extent: Extent
    start: Shape


_NAME = regex(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def names(folder: Path) -> list[str]:
    """The shards of the folder."""
    return sorted(path.name for path in listing(folder) if _NAME.fullmatch(path.name))


def ranks(folder: Path) -> int:
    """How many ranks wrote the shards. Raises `IncompleteError` where a file is missing."""
    found = [match for name in names(folder) if (match := _NAME.fullmatch(name)) is not None]
    numbers = [tuple(int(group) for group in match.groups()) for match in found]
    totals = {total for _, _, total in numbers}
    if len(totals) != 1:
        raise FormatError(
            f"its shards say that the model has {' and '.join(map(str, sorted(totals)))} files.",
            path=folder,
            hint="It holds shards from different saves; keep those of one save.",
        )
    world, files = max(rank for rank, _, _ in numbers), totals.pop()
    there = {(rank, file) for rank, file, _ in numbers}
    for rank in range(1, world + 1):
        for file in range(1, files + 1):
            if (rank, file) not in there:
                raise IncompleteError(
                    f"shard-{rank:05d}-model-{file:05d}-of-{files:05d}.safetensors is missing; "
                    f"the other shards belong to ranks 1 to {world} and files 1 to {files}.",
                    path=folder,
                    hint="Copy the whole folder again; each rank wrote files of its own.",
                )
    return world


def read(folder: Path, sources: Sources) -> dict[str, Entry]:
    """The tensors of all shards, each proven to be tiled by its chunks.

    Raises `FormatError`, `IncompleteError`.
    """
    chunks: dict[str, list[_Chunk]] = {}
    for name in names(folder):
        source = sources.open(child(folder, name))
        file = safetensors_file.read(source)
        offsets = saved_offsets(file, source.ref.path)
        for tensor, (spec, extent) in file.tensors.items():
            start = offsets.get(tensor)
            if start is None or len(start) != len(spec.shape):
                raise FormatError(
                    f"{_INFO} does not say where its part of shape {spec.shape} begins.",
                    path=source.ref.path,
                    tensor=tensor,
                )
            chunks.setdefault(tensor, []).append(_Chunk(spec, extent, start))
    return {name: _entry(name, found) for name, found in chunks.items()}


def _entry(name: str, chunks: list[_Chunk]) -> Entry:
    first = chunks[0].spec
    for chunk in chunks:
        if (chunk.spec.dtype, len(chunk.start)) != (first.dtype, len(first.shape)):
            raise FormatError(
                f"its parts disagree: {first.dtype} {first.shape}, {chunk.spec.dtype} "
                f"{chunk.spec.shape}.",
                path=chunk.extent.file.path,
                tensor=name,
            )
    ends = [map(int.__add__, chunk.start, chunk.spec.shape) for chunk in chunks]
    shape = tuple(max(reached) for reached in zip(*ends, strict=True))
    fragments = (
        Fragment(Box(shape, chunk.start, chunk.spec.shape), chunk.extent, first.dtype)
        for chunk in chunks
        if chunk.spec.numel
    )
    kind: TensorKind = "parameter" if first.dtype.floating else "buffer"
    return proven(TensorSpec(name, first.dtype, shape), fragments, kind)


def saved_offsets(file: SafetensorsFile, path: str) -> dict[str, Shape]:
    """Where each tensor of the file begins in the whole tensor; empty where it does not say."""
    text = file.metadata.get(_INFO)
    if text is None:
        return {}
    offsets: dict[str, Shape] = {}
    for name, info in strict_json.parse_object(text, path).items():
        start = info.get("saved_offsets") if isinstance(info, dict) else None
        if not isinstance(start, list) or not all(
            type(n) is int and 0 <= n < 1 << 62 for n in start
        ):
            raise FormatError(f"its saved_offsets are {brief(start)}.", path=path, tensor=name)
        offsets[name] = tuple(start)
    return offsets
