"""Saves whose planner did not flatten the state dict: a nested dict is one item.

    dcp.save({"model": {...}, "step": 3}, planner=DefaultSavePlanner(flatten_state_dict=False))

    .metadata       model: BytesStorageMetadata     no tensor is listed
    __0_0.distcp    one torch.save stream for each key of the top level

One rank writes such an item, so what is distributed is in it as that rank's shard alone: such a
save is refused. (torch 2.13, default_planner.py: DefaultSavePlanner)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from reshard.containers import torch as torchfile
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.torch import Opaque, TensorRef
from reshard.core.catalog import Catalog, Origin
from reshard.core.tensors import Entry, Record, TensorSpec
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats import Selection
from reshard.formats.dcp import parts
from reshard.storage.local import Sources, child


def holds_model(metadata: Metadata) -> bool:
    """Whether the model is in items that are no tensors."""
    known = any(len(metadata.paths[key]) == 1 and key in parts.MODEL for key in metadata.objects)
    return bool(metadata.objects) and (known or not metadata.tensors)


def read_items(
    folder: Path, sources: Sources, selection: Selection, metadata: Metadata
) -> Catalog | None:
    """The model's part of the items' contents, each item read as the torch.save file it is.

    None where no item holds a tensor.

    Raises `UnsupportedError` for an item that is one rank's shard, `IncompleteError` for one that
    is not there.
    """
    found: dict[parts.Path, TensorRef] = {}
    records: list[Record] = []
    for key in metadata.objects:
        for path, tensor, its in _tensors(key, folder, sources, metadata):
            found[path] = tensor
            records += its
    if not found:
        return None
    paths = {".".join(path): path for path in found}
    if len(paths) != len(found):
        raise FormatError("two of its tensors have one name.", path=folder)
    part = parts.find(paths, selection.prefix, str(folder))
    entries: dict[str, Entry] = {}
    stored: dict[tuple[object, ...], str] = {}
    for key, name in part.names.items():
        tensor = found[paths[key]]
        place = (tensor.storage, tensor.dtype, tensor.shape, tensor.strides)
        first = stored.setdefault(place, name) if tensor.extent.nbytes else name
        if first != name:
            entries[first] = entries[first].aliased((*entries[first].aliases, name))
            continue
        spec = TensorSpec(name, tensor.dtype, tensor.shape)
        entries[name] = Entry(spec, (tensor.fragment(),) if spec.numel else ())
        check_tiling(entries[name])
    return Catalog(
        format="dcp",
        origin=Origin(
            root=folder,
            framework="torch.distributed.checkpoint",
            version=metadata.version,
            details={"prefix": ".".join(part.path), "non_tensors": sorted(metadata.objects)},
        ),
        entries=entries,
        records=tuple(dict.fromkeys(records)),
    )


def _tensors(
    key: str, folder: Path, sources: Sources, metadata: Metadata
) -> Iterator[tuple[parts.Path, TensorRef, tuple[Record, ...]]]:
    """The tensors of one item by their paths, and the checksums of its bytes."""
    copies = metadata.objects[key]
    if len(copies) != 1 or copies[0].transforms:
        raise UnsupportedError(
            f"it is stored {len(copies)} times, or compressed.",
            path=folder,
            tensor=key,
            hint="Save with flatten_state_dict=True, which is the default.",
        )
    path = child(folder, copies[0].file)
    if not path.is_file():
        raise IncompleteError(
            "the checkpoint's metadata names it, and it is not there.",
            path=path,
            hint="Copy the whole folder again.",
        )
    file = torchfile.read(sources.open(path), offset=copies[0].offset, nbytes=copies[0].nbytes)
    for inner, tensor in _walk(file.value, (key,), folder):
        yield inner, tensor, file.records


def _walk(value: object, path: parts.Path, folder: Path) -> Iterator[tuple[parts.Path, TensorRef]]:
    if isinstance(value, TensorRef):
        yield path, value
    elif isinstance(value, Opaque) and value.is_tensor:
        raise UnsupportedError(
            f"it is {value.describe()}: a save with flatten_state_dict=False holds one rank's "
            "shard of it.",
            path=folder,
            tensor=".".join(path),
            hint="Save with flatten_state_dict=True, which is the default.",
        )
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if isinstance(name, str):
                yield from _walk(inner, (*path, name), folder)
