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

from pathlib import Path

from msgspec.structs import replace

from reshard.containers.dcp import shards
from reshard.containers.dcp.layout import lay_out
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding
from reshard.formats import Selection, numbered, of_several
from reshard.formats.dcp import parts
from reshard.formats.dcp.chunked import read_chunks
from reshard.formats.dcp.save import ACCELERATE_MODEL, METADATA, RANK_METADATA, folder_metadata
from reshard.formats.dcp.state_layout import as_written, lay_out_state
from reshard.formats.signs import is_mcore
from reshard.storage.local import Sources
from reshard.storage.paths import exists, is_folder, names

__all__ = ["as_written", "detect", "lay_out", "lay_out_state", "read"]

_NO_SHAPES = (
    "Shards of DCP's Hugging Face writer state no whole shapes: if all files of the last ranks are "
    "missing, this cannot be seen without a base model."
)


def detect(path: Path) -> str | None:
    """A folder with `.metadata`, `.distcp` files or DCP's shards, but Megatron-Core's."""
    if not is_folder(path):
        return None
    if is_mcore(path):
        return None
    there = names(path)
    if METADATA in there:
        return f"it holds {METADATA}"
    models = _models(path)
    if models:
        return f"it holds {models[0].name}/"
    for name in there:
        if RANK_METADATA.fullmatch(name) or name.endswith(".distcp"):
            return f"it holds {name}"
    if shards.names(path):
        return "it holds shards of DCP's Hugging Face writer"
    return None


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The model's tensors, each proven to be tiled by its chunks; no weight is read.

    `selection.prefix` names the model's part of a nested state dict; without it the part is found
    by the names that frameworks use (see `parts`).

    Raises `IncompleteError` (no metadata; a file missing or short; a hole), `FormatError`
    (damaged, overlapping chunks, names that leave the folder), `UnsupportedError` (another kind
    of checkpoint, an unknown transform), `NamesError` (several parts could be the model).
    """
    models = [] if exists(path / METADATA) else _models(path)
    if models:
        catalog = read(models[0], sources, selection)
        every = [model.name for model in models]
        return replace(catalog, findings=of_several(path, every, every[0], "folder"))
    if shards.names(path) and not exists(path / METADATA):
        return _read_shards(path, sources, selection)
    return read_chunks(path, sources, selection, folder_metadata(path, sources))


def _models(folder: Path) -> list[Path]:
    """The folders of accelerate's models in a checkpoint folder, by their numbers."""
    models = [folder / name for name in numbered(names(folder), ACCELERATE_MODEL)]
    return [model for model in models if is_folder(model)]


def _read_shards(folder: Path, sources: Sources, selection: Selection) -> Catalog:
    world = shards.ranks(folder)
    found = shards.read(folder, sources)
    part = parts.find({name: (name,) for name in found}, selection.prefix, str(folder))
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            world_size=world,
            details={"prefix": ".".join(part.path), "files": shards.names(folder)},
        ),
        entries={name: found[key].renamed(name) for key, name in part.names.items()},
        findings=(Finding("shapes-unstated", _NO_SHAPES),),
    )
