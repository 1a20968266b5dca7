"""The base model: the Hugging Face folder whose names, dtypes and other files the output takes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct

from reshard.core.catalog import Asset
from reshard.core.dtypes import DType
from reshard.core.tensors import Entry
from reshard.errors import FormatError, NotFoundError
from reshard.formats import Selection, huggingface
from reshard.naming import Schema
from reshard.storage import strict_json
from reshard.storage.local import Sources, cached, snapshot

CONFIG = "config.json"
# The keys under which a config states the dtype of the weights, before and since transformers 4.56.
_DTYPE_KEYS = ("torch_dtype", "dtype")


class Base(Struct, frozen=True):
    """A base model: its tensors, its config, and the files that go along with the weights."""

    folder: Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    assets: tuple[Asset, ...]

    @property
    def schema(self) -> Schema:
        return Schema({name: entry.spec for name, entry in self.entries.items()}, self.config)


def read_base(folder: Path, sources: Sources) -> Base:
    """Read a base model's headers and config.

    Of a repository's folder in the Hugging Face cache, its snapshot is read. Raises `NotFoundError`
    where there is no folder, no config.json or no safetensors file.
    """
    if not folder.is_dir():
        found = cached(str(folder))
        raise NotFoundError(
            "there is no such folder.",
            path=folder,
            hint="The base is a local Hugging Face model folder, the start of the training."
            if found is None
            else f"The model of that name is in the Hugging Face cache; name its folder: {found}.",
        )
    folder = snapshot(folder)
    config = huggingface.read_config(folder, sources)
    if huggingface.detect(folder) is None:
        raise NotFoundError(
            "the base model has no safetensors files.",
            path=folder,
            hint="Save it with save_pretrained(..., safe_serialization=True) first.",
        )
    catalog = huggingface.read(folder, sources, Selection())
    return Base(folder, catalog.entries, config, catalog.assets)


def main_dtype(base: Base) -> DType:
    """The dtype that most of the base's bytes have."""
    nbytes: Counter[DType] = Counter()
    for entry in base.entries.values():
        nbytes[entry.spec.dtype] += entry.spec.nbytes
    return nbytes.most_common(1)[0][0]


def patched_config(base: Base, patches: Mapping[str, object]) -> bytes:
    """The base's config.json with a few fields changed; all else, order included, as it is.

    `patches` maps dotted paths to values. Raises `FormatError` where a path leads nowhere.
    """
    config = strict_json.read_file(base.folder / CONFIG)
    for path, value in patches.items():
        *parents, key = path.split(".")
        level: Any = config
        for parent in parents:
            level = level.get(parent) if isinstance(level, dict) else None
        if not isinstance(level, dict):
            raise FormatError(f"it has no section for {path!r}.", path=base.folder / CONFIG)
        level[key] = value
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def dtype_patches(base: Base, dtype: str) -> dict[str, str]:
    """What to change in the config so that it states `dtype`, wherever it states one."""
    patches = {}
    levels: list[tuple[str, Mapping[str, Any]]] = [("", base.config)]
    for key, section in base.config.items():
        if isinstance(section, dict):
            levels.append((f"{key}.", section))
    for prefix, section in levels:
        for key in _DTYPE_KEYS:
            if isinstance(section.get(key), str) and section[key] != dtype:
                patches[f"{prefix}{key}"] = dtype
    return patches
