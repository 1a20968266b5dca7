"""PyTorch distributed checkpoints (DCP): what FSDP1 and FSDP2 runs save.

    .metadata         pickle: every tensor's shape, its chunks, and where each chunk lies
    __0_0.distcp      items, back to back: a torch.save zip for each chunk, `__<rank>_<n>`
    __1_0.distcp
or, saved with use_collectives=False, one metadata for each rank:
    __0.metadata __1.metadata __0_0.distcp __1_0.distcp
or the DCP Hugging Face writer's shards (see `shards`):
    shard-00001-model-00001-of-00001.safetensors ...

`.metadata` is written last, under a temporary name until it is whole: without it the save is
unfinished. Saving again into a folder leaves the files of a larger former world behind, so data
files are never listed, only followed from the metadata. torch itself checks neither: a hole in a
tensor becomes uninitialised memory. Read off torch 2.13 (torch/distributed/checkpoint/
metadata.py, filesystem.py, default_planner.py, hf_storage.py) and files that it wrote.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from reshard import dtypes, torchfile
from reshard.catalog import Catalog, Origin
from reshard.errors import FormatError, IncompleteError, ReshardError, UnsupportedError
from reshard.formats import Selection
from reshard.formats.dcp import foreign, parts, shards
from reshard.formats.dcp.items import Items
from reshard.formats.dcp.metadata import Chunk, Metadata, StoredTensor, merge, parse
from reshard.formats.dcp.zips import StoredItem
from reshard.storage import Sources
from reshard.tensors import Box, Entry, Fragment, Record, TensorSpec, check_tiling

METADATA = ".metadata"
_RANK_METADATA = re.compile(r"__(\d+)\.metadata")
_RANK_DATA = re.compile(r"__(\d+)_\d+\.distcp")
# Where accelerate and the HF Trainer put the model of a checkpoint folder.
_ACCELERATE = "pytorch_model_fsdp_0"


def detect(path: Path) -> str | None:
    """A folder with `.metadata`, `.distcp` files or DCP's shards; also kinds that are refused."""
    if not path.is_dir():
        return None
    names = {child.name for child in path.iterdir()}
    if METADATA in names:
        return f"it holds {METADATA}"
    if _ACCELERATE in names and (path / _ACCELERATE).is_dir():
        return f"it holds {_ACCELERATE}/"
    for name in sorted(names):
        if _RANK_METADATA.fullmatch(name) or name.endswith(".distcp"):
            return f"it holds {name}"
    if shards.names(path):
        return "it holds shards of DCP's Hugging Face writer"
    return foreign.why(path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The model's tensors, each proven to be tiled by its chunks; no weight is read.

    `selection.prefix` names the model's part of a nested state dict; without it the part is found
    by the names that frameworks use (see `parts`).

    Raises `IncompleteError` (no metadata; a file missing or short; a hole), `FormatError`
    (damaged, overlapping chunks, names that leave the folder), `UnsupportedError` (another kind
    of checkpoint, an unknown transform), `NamesError` (several parts could be the model).
    """
    if not (path / METADATA).exists() and (path / _ACCELERATE).is_dir():
        path = path / _ACCELERATE
    foreign.refuse(path)
    if shards.names(path) and not (path / METADATA).exists():
        return _read_shards(path, sources, selection)
    return _read_chunks(path, sources, selection, _metadata(path, sources))


def _metadata(folder: Path, sources: Sources) -> Metadata:
    """The folder's metadata, that of all ranks merged where each wrote its own."""
    names = {child.name for child in folder.iterdir()}
    ranks = sorted(int(m[1]) for name in names if (m := _RANK_METADATA.fullmatch(name)))
    if METADATA in names and ranks:
        raise FormatError(
            f"it holds both {METADATA} and __{ranks[0]}{METADATA}: two saves into one folder.",
            path=folder,
            hint=f"Move {METADATA}, or all files __*.metadata, away: those of the save that is "
            "not meant.",
        )
    if METADATA in names:
        return _parse(folder / METADATA, sources)
    if not ranks:
        raise _unfinished(folder, names)
    if ranks != list(range(len(ranks))):
        missing = min(set(range(max(ranks))) - set(ranks))
        raise IncompleteError(
            f"each rank wrote metadata of its own, up to rank {max(ranks)}, and "
            f"__{missing}{METADATA} is missing.",
            path=folder,
            hint="Copy the whole folder again.",
        )
    found = [_parse(folder / f"__{rank}{METADATA}", sources) for rank in ranks]
    return merge(found, str(folder))


def _parse(path: Path, sources: Sources) -> Metadata:
    source = sources.open(path)
    if source.size == 0:
        raise IncompleteError(
            "the file is empty.", path=path, hint="The save did not finish; use another one."
        )
    data = source.read(0, source.size)
    return parse(torchfile.read_pickle(data, path=str(path)).value, str(path))


def _unfinished(folder: Path, names: set[str]) -> IncompleteError:
    temporary = sorted(name for name in names if name.endswith(".metadata.tmp"))
    there = f"; {temporary[0]} was begun" if temporary else ""
    return IncompleteError(
        f"it holds .distcp files and no {METADATA}, which is written last{there}: the save did "
        "not finish.",
        path=folder,
        hint="Use an earlier checkpoint, or copy the folder again if the file was left behind "
        "(its name begins with a dot).",
    )


def _read_chunks(
    folder: Path, sources: Sources, selection: Selection, metadata: Metadata
) -> Catalog:
    paths = {key: metadata.paths[key] for key in metadata.tensors}
    part = parts.find(paths, selection.prefix, str(folder))
    items = Items(folder, sources)
    entries: dict[str, Entry] = {}
    records: list[Record] = []
    for key, name in part.names.items():
        if name in entries:
            raise FormatError("two of its tensors have this name.", path=folder, tensor=name)
        entries[name], found = _entry(key, name, metadata.tensors[key], items, folder)
        records.extend(found)
    left_out = len(metadata.tensors) - len(entries)
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            version=metadata.version,
            world_size=_world(metadata),
            details={
                "prefix": ".".join(part.path),
                "tensors_left_out": left_out,
                "non_tensors": sorted(metadata.objects),
            },
        ),
        entries=entries,
        records=tuple(records),
    )


def _entry(
    key: str, name: str, tensor: StoredTensor, items: Items, folder: Path
) -> tuple[Entry, list[Record]]:
    """One tensor with all its chunks found, and the checksums of their bytes."""
    try:
        spec = TensorSpec(name, dtypes.parse(tensor.dtype), tensor.shape)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, path=folder, tensor=name) from None
    fragments = []
    records = []
    for chunk in tensor.chunks:
        if len(chunk.offsets) != len(spec.shape) or len(chunk.sizes) != len(spec.shape):
            raise FormatError(
                f"a chunk at {chunk.offsets} of sizes {chunk.sizes} is not of shape {spec.shape}.",
                path=folder,
                tensor=name,
            )
        item = _item(key, spec, chunk, items, folder)
        box = Box(spec.shape, chunk.offsets, chunk.sizes)
        fragments.append(Fragment(box, item.extent, spec.dtype, item.strides))
        if item.record is not None:
            records.append(item.record)
    entry = Entry(spec, tuple(fragments), "parameter" if spec.dtype.floating else "buffer")
    try:
        check_tiling(entry)
    except ReshardError as error:
        error.path = error.path or str(folder)
        raise
    return entry, records


def _item(key: str, spec: TensorSpec, chunk: Chunk, items: Items, folder: Path) -> StoredItem:
    """A chunk's bytes; where several ranks saved the same chunk, their checksums must agree."""
    if not chunk.copies:
        raise IncompleteError(
            f"the metadata does not say where its chunk at {chunk.offsets} lies.",
            path=folder,
            tensor=spec.name,
            hint="The metadata is damaged, or the save did not finish.",
        )
    part = TensorSpec(key, spec.dtype, chunk.sizes)
    found = [items.locate(part, chunk.offsets, copy) for copy in chunk.copies]
    checksums = {item.record.crc32 for item in found if item.record is not None}
    if len(checksums) > 1:
        raise FormatError(
            f"{len(found)} ranks saved it, each for itself, and their values differ.",
            path=folder,
            tensor=spec.name,
            hint="Save again with use_collectives=True, or move the files of the other ranks away.",
        )
    return found[0]


def _world(metadata: Metadata) -> int | None:
    """One more than the highest rank that wrote a file that is in use."""
    files = {
        copy.file
        for tensor in metadata.tensors.values()
        for chunk in tensor.chunks
        for copy in chunk.copies
    }
    ranks = [int(match[1]) for file in files if (match := _RANK_DATA.fullmatch(file))]
    return max(ranks) + 1 if ranks else None


def _read_shards(folder: Path, sources: Sources, selection: Selection) -> Catalog:
    world = shards.ranks(folder)
    found = shards.read(folder, sources)
    part = parts.find({name: (name,) for name in found}, selection.prefix, str(folder))
    entries: Mapping[str, Entry] = {
        name: found[key].renamed(name) for key, name in part.names.items()
    }
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            world_size=world,
            details={"prefix": ".".join(part.path), "files": shards.names(folder)},
        ),
        entries=entries,
        notes=(
            "Shards of DCP's Hugging Face writer state no whole shapes: if all files of the last "
            "ranks are missing, this cannot be seen without a base model.",
        ),
    )
