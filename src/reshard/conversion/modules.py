"""A base's modules in sub-folders, with weights of their own: sentence-transformers' layers.

    modules.json            [{"name": "0", "path": ""}, ..., {"name": "2", "path": "2_Dense"}]
    model.safetensors       of module 0, the transformer
    2_Dense/config.json
    2_Dense/model.safetensors   {"linear.weight": .., "linear.bias": ..}

A run that trains all modules saves `0.auto_model.**` and `2.linear.**`: each module's tensors go
back into its own folder. (sentence-transformers 5: SentenceTransformer.py, save.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from msgspec import Struct

from reshard import formats
from reshard.conversion.assets import names_weights
from reshard.core.catalog import Asset
from reshard.core.tensors import Entry
from reshard.errors import FormatError
from reshard.formats import huggingface
from reshard.naming.search import shared_prefixes, unwrap
from reshard.storage import strict_json
from reshard.storage.local import Sources
from reshard.storage.paths import is_file

MODULES = "modules.json"


class Module(Struct, frozen=True):
    """A module beside the model: its name in the whole's state dict, its folder, its tensors."""

    name: str
    folder: str
    tensors: Mapping[str, Entry]

    @property
    def file(self) -> str:
        """Where its weights are written."""
        return f"{self.folder}/{huggingface.SINGLE}"

    def owns(self, asset: Asset) -> bool:
        """Whether a file of the base holds its weights, or lists them."""
        within = PurePosixPath(asset.name).parent == PurePosixPath(self.folder)
        return within and (names_weights(asset.name) or asset.name.endswith(".index.json"))


def read_modules(folder: Path, assets: Iterable[Asset], sources: Sources) -> tuple[Module, ...]:
    """The modules of a base that have weights of their own; none where it states no modules.

    Raises `FormatError` where `modules.json` is not a list of modules, and what the readers of the
    weights raise.
    """
    weights = {PurePosixPath(a.name).parent.as_posix() for a in assets if names_weights(a.name)}
    if not weights or not is_file(folder / MODULES):
        return ()
    listed = sources.open(folder / MODULES)
    text = strict_json.read_whole(listed, max_nbytes=strict_json.MAX_CONFIG)
    stated = strict_json.parse(text, str(folder / MODULES))
    if not isinstance(stated, list) or not all(isinstance(one, dict) for one in stated):
        raise FormatError("it is not a list of modules.", path=folder / MODULES)
    paths = {str(one.get("path")): str(one.get("name", one.get("idx"))) for one in stated}
    return tuple(
        Module(name, path, formats.read(folder / path, sources, formats.Selection()).entries)
        for path, name in paths.items()
        if path in weights
    )


def take(
    entries: Mapping[str, Entry], modules: Iterable[Module]
) -> tuple[Mapping[str, Entry], dict[str, Mapping[str, Entry]]]:
    """The entries without those of the modules, and the modules' entries by output file.

    A module is included if the checkpoint holds all its tensors, with its shapes.
    """
    modules = tuple(modules)
    if not modules:
        return entries, {}
    clean = {unwrap(name): name for name in entries}
    shared = shared_prefixes(clean)[-1]
    taken: dict[str, str] = {}
    by_file: dict[str, Mapping[str, Entry]] = {}
    for module in modules:
        owners = {name: clean.get(f"{shared}{module.name}.{name}") for name in module.tensors}
        held = {name: entries[own] for name, own in owners.items() if own is not None}
        same = all(held[n].spec.shape == module.tensors[n].spec.shape for n in held)
        if held.keys() == module.tensors.keys() and same:
            by_file[module.file] = {name: entry.renamed(name) for name, entry in held.items()}
            taken |= {own: name for name, own in owners.items() if own is not None}
    return {name: entry for name, entry in entries.items() if name not in taken}, by_file
