"""The shapes that a base's weights have: one file or shards, an index or none, links."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.models import released

State = dict[str, torch.Tensor]
BEFORE, AFTER = released.values("llama", 0), released.values("llama", 1)
NAMES = sorted(BEFORE)
HALVES = (NAMES[: len(NAMES) // 2], NAMES[len(NAMES) // 2 :])


def part(names: list[str]) -> State:
    return {name: BEFORE[name] for name in names}


def in_shards(folder: Path, *, index: bool = True) -> None:
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(HALVES, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part(names), folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)


def bin_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(BEFORE, folder / "pytorch_model.bin")


def bin_shards(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(HALVES, 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part(names), folder / file)
        weight_map |= dict.fromkeys(names, file)
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(text)


def old_bin(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(BEFORE, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def no_index(folder: Path) -> None:
    in_shards(folder, index=False)


def consolidated(folder: Path) -> None:
    in_shards(folder)
    save_file({"layers.0.wq": torch.zeros(3)}, folder / "consolidated.safetensors")


def consolidated_without_index(folder: Path) -> None:
    in_shards(folder, index=False)
    save_file({"layers.0.wq": torch.zeros(3)}, folder / "consolidated.safetensors")


def file_links(folder: Path) -> None:
    """Each file a link to one of the same name in a store."""
    store = folder.with_name("store of models") / "modèle"
    store.parent.mkdir()
    folder.rename(store)
    folder.mkdir()
    for file in store.iterdir():
        (folder / file.name).symlink_to(file)


def shard_links(folder: Path) -> None:
    """The index is a link, too."""
    in_shards(folder)
    file_links(folder)


def bin_shard_links(folder: Path) -> None:
    bin_shards(folder)
    file_links(folder)


def shard_blobs(folder: Path) -> None:
    in_shards(folder)
    blob_links(folder)


def blob_links(folder: Path) -> None:
    """Each file a link to a blob, whose name is its digest."""
    blobs = folder.with_name("blobs")
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"sha256-{number:064x}")
        file.symlink_to(blobs / f"sha256-{number:064x}")


def renamed_weights(folder: Path) -> None:
    other = folder.with_name("llama-v2.safetensors")
    (folder / "model.safetensors").rename(other)
    (folder / "model.safetensors").symlink_to(other)


def folder_link(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to("elsewhere")


SHAPES = (bin_file, bin_shards, old_bin, in_shards, no_index, consolidated,
          consolidated_without_index, file_links, blob_links, renamed_weights,
          folder_link, shard_links, bin_shard_links, shard_blobs)  # fmt: skip
