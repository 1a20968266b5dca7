"""The base model: the Hugging Face folder whose names, dtypes and other files the output takes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from reshard.conversion.assets import assets
from reshard.conversion.modules import Module, read_modules
from reshard.core.catalog import Asset, Catalog
from reshard.core.tensors import Entry, Record, Single
from reshard.errors import FormatError, NotFoundError, at
from reshard.formats import Selection, huggingface, torch_state_dict
from reshard.formats.info import named
from reshard.naming import Schema
from reshard.naming.quantised import Numbers, numbers, refused, statement
from reshard.storage import strict_json
from reshard.storage.local import Sources, download, snapshot
from reshard.storage.paths import is_file, is_folder

CONFIG = "config.json"
# The keys under which a config states the dtype of the weights, before and since transformers 4.56.
_DTYPE_KEYS = ("torch_dtype", "dtype")

# Files beside config.json that describe a model's codes: ModelOpt's, AutoGPTQ's, AutoAWQ's.
_OF_CODES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


class Base(Struct, frozen=True, dict=True):
    """A base model: its tensors, its config, and the files that are copied with the weights.

    `config` is as it should be: `repairs` says, by dotted path, where the file says otherwise.
    `stated_class` is the class that the file names then. `records` are the checksummed stretches of
    its weight files. `modules` have weights of their own in sub-folders. Its quantised tensors are
    the numbers that they represent; `quantised` says which.
    """

    folder: Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    assets: tuple[Asset, ...]
    repairs: Mapping[str, object] = field(default_factory=dict)
    records: Sequence[Record] = ()
    stated_class: str = ""
    modules: tuple[Module, ...] = ()
    quantised: Numbers | None = None

    @cached_property
    def schema(self) -> Schema:
        """What the output must hold."""
        return Schema({name: entry.spec for name, entry in self.entries.items()}, self.config)


def holds_config(catalog: Catalog, folder: Path | None = None) -> bool:
    """Whether a checkpoint has the model's config beside it, and its names are those of the config.

    `folder` is where it would lie; by default the checkpoint is that folder.
    """
    folder = catalog.origin.root if folder is None else folder
    return named(catalog.format).holds_config and is_file(folder / CONFIG)


def read_base(folder: Path, sources: Sources) -> Base:
    """Read a base model's headers and config.

    Of a repository's folder in the Hugging Face cache, its snapshot is read. The weights are
    safetensors files or, where there are none, torch.save files (`pytorch_model.bin`). Raises
    `NotFoundError` where there is no folder, no config.json or no file of weights.
    """
    given, folder = folder, snapshot(folder)
    if not is_folder(folder):
        one_file = is_file(folder)
        hint = f"Pass its folder: {folder.parent}" if one_file else download(folder)
        raise NotFoundError(
            "the base is a file, not a folder." if one_file else "there is no such folder.",
            path=given,
            hint=hint or "--base must be a local folder with the original model.",
        )
    config = huggingface.read_config(folder, sources)
    if huggingface.detect(folder) is not None:
        catalog = huggingface.read(folder, sources, Selection())
    elif torch_state_dict.detect(folder) is not None:
        catalog = torch_state_dict.read(folder, sources, Selection())
    else:
        raise NotFoundError(
            "the base model has no weights: no *.safetensors and no pytorch_model*.bin.",
            path=folder,
            hint="Name the folder of the whole original model. Trainers leave only config and "
            "tokenizer beside a checkpoint (verl's `huggingface/`).",
        )
    with at(folder):
        tensors = _numbers(catalog.entries, config)
    return base_of(folder, config, tensors, catalog.records, sources)


def own_base(catalog: Catalog, sources: Sources) -> Base:
    """The base that a checkpoint's own folder is: as `read_base`, but without a second look at
    headers whose tensors the catalog has as they are stored."""
    folder = catalog.origin.root
    if named(catalog.format).module == huggingface.__name__ and snapshot(folder) == folder:
        config = huggingface.read_config(folder, sources)
        if statement(config) is None and all(map(_is_stored, catalog.entries.values())):
            tensors = Numbers(catalog.entries, {})
            return base_of(folder, config, tensors, catalog.records, sources)
    return read_base(folder, sources)


def _is_stored(entry: Entry) -> bool:
    return isinstance(entry.fragments, Single) or not entry.fragments


def base_of(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Numbers,
    records: Sequence[Record],
    sources: Sources,
) -> Base:
    """The base of a model folder whose config and tensors are read."""
    quantised = tensors if tensors.kinds or tensors.stated else None
    repairs, files = class_repairs(config), assets(folder)
    return Base(
        folder,
        tensors.entries,
        {**config, **repairs},
        tuple(file for file in files if not (quantised and file.name in _OF_CODES)),
        repairs,
        records,
        str(config["architectures"][0]) if repairs else "",
        read_modules(folder, files, sources),
        quantised,
    )


def _numbers(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Numbers:
    """The tensors as numbers. Raises `UnsupportedError` for codes that are not read."""
    kind = refused(entries, statement(config))
    if kind is not None:
        raise kind.error("Name the unquantised release that it was made from as the base.")
    return numbers(entries, config)


def class_repairs(config: Mapping[str, Any]) -> dict[str, object]:
    """What the config should say: accelerate's FSDP2 renames the class to FSDP... while it trains,
    and a model that is saved meanwhile has that name (torch/distributed/fsdp, fully_shard)."""
    classes = config.get("architectures")
    if not isinstance(classes, list):
        return {}
    plain = [re.sub(r"^FSDP(?=[A-Z])", "", name) if isinstance(name, str) else name
             for name in classes]  # fmt: skip
    return {} if plain == classes else {"architectures": plain}


def patched_config(base: Base, patches: Mapping[str, object]) -> bytes:
    """The base's config.json with a few fields changed; everything else, order included, stays.

    `patches` maps dotted paths to values; the base's config has its own repairs already. What
    states that the weights are quantised is left out: no weight is written as a code. Raises
    `FormatError` where a path leads nowhere.
    """
    text = json.dumps(patched_fields(base, patches), indent=2, ensure_ascii=False)
    return (text + "\n").encode()


def patched_fields(base: Base, patches: Mapping[str, object]) -> dict[str, Any]:
    """The fields of what `patched_config` gives. Raises as it does."""
    config: dict[str, Any] = deepcopy(dict(base.config))
    for path, value in patches.items():
        section, key = section_of(config, path)
        if section is None:
            raise FormatError(f"it has no section for {path!r}.", path=base.folder / CONFIG)
        section[key] = value
    for path in quantisation_paths(base):
        section, key = section_of(config, path)
        if section is not None:
            del section[key]
    return config


def changed_fields(base: Base, text: bytes) -> dict[str, tuple[object, object]]:
    """The fields of the base's config that another one has otherwise, by dotted path: the base's
    value and the other's, None where one of the two has none."""
    before, after = _fields(base.config), _fields(strict_json.parse_object(text, CONFIG))
    return {
        path: (before.get(path), after.get(path))
        for path in dict.fromkeys((*before, *after))
        if before.get(path) != after.get(path)
    }


def _fields(config: Mapping[str, Any], path: str = "") -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            fields |= _fields(value, f"{path}{key}.")
        else:
            fields[f"{path}{key}"] = value
    return fields


def section_of(config: dict[str, Any], path: str) -> tuple[dict[str, Any] | None, str]:
    """The section of a config that a dotted path leads to, None where there is none, and the
    path's last part, which is a key in it."""
    *parents, key = path.split(".")
    level: Any = config
    for parent in parents:
        level = level.get(parent) if isinstance(level, dict) else None
    return level if isinstance(level, dict) else None, key


def quantisation_paths(base: Base) -> tuple[str, ...]:
    """The dotted paths in the config that state that its weights are quantised."""
    stated = None if base.quantised is None else base.quantised.stated
    return () if stated is None else stated.paths


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
