"""A model folder as it is, however broken: what can be read of it, and what is wrong with the rest.

The formats' readers refuse a folder at the first broken rule; this one records the fault and
continues. A file that is read passes all of the format's own checks, so its tensors can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import replace

from reshard.containers.dcp import shards as rank_shards
from reshard.conversion.assets import assets as assets_of
from reshard.conversion.base_model import CONFIG, Base
from reshard.conversion.side_files import LIGHTRFT
from reshard.core.catalog import Asset
from reshard.core.regex import regex
from reshard.core.tensors import Entry, Record, stored
from reshard.diagnosis import adapters
from reshard.errors import ReshardError, UnsupportedError
from reshard.formats import Selection, huggingface, torch_state_dict
from reshard.naming.rewards import REWARD_CONFIG
from reshard.naming.schema import CLASSIFIERS, classes_of, is_backbone
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, is_folder, listing, matching

_SHARD = regex(r"model(-\d+-of-\d+)?\.safetensors")


class Folder(Struct, frozen=True):
    """What lies in a model folder.

    entries: every tensor of the files that could be read; of one in several files, the first.
    repeated: tensors in several files -> all of them.
    files: weight file -> the tensors it holds. damaged: file -> why it could not be read.
    listed: the index's tensor -> file, None where there is no index or `index_fault` says why not.
    config: None where `config_fault` says why there is none.
    assets: every file without weights, by its path in the folder.
    pickled: whether the weights are in torch.save files (pickles). records: their checksums.
    safetensors: all such files in the folder, whatever they hold.
    """

    path: Path
    assets: Mapping[str, Asset]
    config: Mapping[str, Any] | None
    config_fault: str
    entries: Mapping[str, Entry] = field(default_factory=dict)
    files: Mapping[str, frozenset[str]] = field(default_factory=dict)
    listed: Mapping[str, str] | None = None
    index_fault: str = ""
    damaged: Mapping[str, str] = field(default_factory=dict)
    repeated: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    pickled: bool = False
    records: tuple[Record, ...] = ()
    safetensors: tuple[str, ...] = ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The config; empty where there is none."""
        return self.config or {}

    @property
    def classifies(self) -> bool:
        """Whether the config names a class with a `score` in place of an output head."""
        return any(name.endswith(CLASSIFIERS) for name in classes_of(self.settings))

    @property
    def headless(self) -> bool:
        """Whether the model needs no output head: it scores, by itself or by a reward head beside
        it, or its class is a backbone."""
        scores = self.classifies or REWARD_CONFIG in self.assets
        return scores or is_backbone(self.settings)

    def as_base(self) -> Base:
        """The folder as a base model: its tensors, config and files."""
        return Base(self.path, self.entries, self.settings, tuple(self.assets.values()))


def model_files(names: Iterable[str]) -> set[str]:
    """The files that are a model's own by their names."""
    return {name for name in names if _SHARD.fullmatch(name)}


def read(path: Path, sources: Sources) -> Folder:
    """Read the headers, config and file names of a folder that holds a model (`is_model`).

    Raises `UnsupportedError` where the weights alone are not a model.
    """
    _refuse_parts(path)
    config, config_fault = read_json(path, CONFIG, sources)
    assets = {asset.name: asset for asset in assets_of(path)}
    there = tuple(sorted(file.name for file in matching(path, "*.safetensors")))
    folder = Folder(path, assets, config, config_fault, safetensors=there)
    names, listed, index_fault = _weight_files(path, sources)
    if not names and listed is None:
        return _with_pickled(folder, sources)
    folder = replace(folder, listed=listed, index_fault=index_fault)
    return _with_tensors(folder, names, sources)


def is_model(path: Path) -> bool:
    """Whether a folder holds files of a model's weights, and not an adapter alone or the parts of
    ranks, which are a checkpoint's."""
    if not is_folder(path):
        return False
    weights = {file.name for file in matching(path, "*.safetensors")}
    if weights and weights == set(rank_shards.names(path)):
        return False
    indexed = is_file(path / huggingface.INDEX)
    pickled = torch_state_dict.detect(path) is not None
    return bool(weights or indexed or pickled) and not adapters.is_adapter(path)


def _refuse_parts(path: Path) -> None:
    """Refuse a folder that transformers does not load as a model, although nothing is wrong with
    it."""
    there = {file.name for file in listing(path)}
    if {LIGHTRFT, REWARD_CONFIG} <= there and not any(matching(path, "*.safetensors")):
        raise UnsupportedError(
            "it holds LightRFT's own state dict of a reward model, with the names used in "
            "training.",
            path=path,
            hint="Examine the output of convert --srm-format split.",
        )


def _with_tensors(folder: Folder, names: Iterable[str], sources: Sources) -> Folder:
    """The folder with what its safetensors files hold."""
    damaged: dict[str, str] = {}
    files: dict[str, frozenset[str]] = {}
    found: dict[str, Entry] = {}
    repeated: dict[str, list[Entry]] = {}
    for name in names:
        try:
            entries = huggingface.read_file(child(folder.path, name, store=True), sources)
        except ReshardError as error:
            damaged[name] = error.message
            continue
        if not entries:
            damaged[name] = "it holds no tensor."
        files[name] = frozenset(entry.spec.name for entry in entries)
        for entry in entries:
            first = found.setdefault(entry.spec.name, entry)
            if first is not entry:
                repeated.setdefault(entry.spec.name, [first]).append(entry)
    return replace(
        folder,
        entries=found,
        files=files,
        damaged=damaged,
        repeated={name: tuple(copies) for name, copies in repeated.items()},
    )


def _with_pickled(folder: Folder, sources: Sources) -> Folder:
    """The folder with what its `pytorch_model*.bin` hold."""
    try:
        catalog = torch_state_dict.read(folder.path, sources, Selection())
    except ReshardError as error:
        file = Path(error.path or folder.path).name
        return replace(folder, damaged={file: error.message}, pickled=True)
    return replace(
        folder,
        entries=catalog.entries,
        files=_by_file(catalog.entries.values()),
        pickled=True,
        records=catalog.records,
    )


def _by_file(entries: Iterable[Entry]) -> dict[str, frozenset[str]]:
    files: dict[str, set[str]] = {}
    for entry in entries:
        for extent in stored(entry.fragments):
            files.setdefault(Path(extent.file.path).name, set()).add(entry.spec.name)
    return {name: frozenset(names) for name, names in files.items()}


def _weight_files(path: Path, sources: Sources) -> tuple[list[str], dict[str, str] | None, str]:
    """The safetensors files that should hold the model, what the index lists, its fault."""
    there = {file.name for file in matching(path, "*.safetensors")}
    shards = model_files(there)
    if not is_file(path / huggingface.INDEX):
        return sorted(shards or there), None, ""
    try:
        weight_map = huggingface.weight_map(path, sources)
    except ReshardError as error:
        return sorted(shards or there), None, error.message
    named = set(weight_map.values())
    return sorted(shards | (named & there)), weight_map, ""


def read_json(path: Path, name: str, sources: Sources) -> tuple[dict[str, Any] | None, str]:
    """A JSON object of a model folder, or None and why there is none."""
    try:
        source = sources.open(child(path, name, store=True))
        return strict_json.read_object(source, max_nbytes=strict_json.MAX_INDEX), ""
    except ReshardError as error:
        return None, error.message
