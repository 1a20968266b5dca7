"""Read a folder: the model's tensors, and what else it states."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from reshard.containers.dcp.chunked import find_tensors, world_size
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.parsing import opened, unpickled
from reshard.containers.torch import check_size
from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding
from reshard.errors import IncompleteError, NotFoundError, ReshardError
from reshard.formats import Selection
from reshard.formats.megatron import folders, masters, plans, refused, settings, state
from reshard.storage.local import Sources, child
from reshard.storage.paths import exists

_METADATA = ".metadata"


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The model's tensors by Megatron's names, each proven to be tiled by its chunks.

    `selection.role` names one of the models of verl's step. With `selection.masters` the fp32
    masters of the optimizer's state replace the weights.

    Raises `IncompleteError` (an unfinished save; a file missing or short; a hole), `FormatError`
    (damaged), `UnsupportedError` (another backend, weights in FP8, adapters), `NotFoundError` (no
    model: the state of an optimizer alone).
    """
    folder = folders.find(path, selection.role)
    metadata = _metadata(folder, sources)
    mine = [key for key in metadata.tensors if not masters.OPTIMIZER.fullmatch(key)]
    if not mine:
        raise _no_model(folder, metadata)
    refused.check(metadata, mine, folder)
    keys = {key: key for key in mine}
    aliases: dict[str, list[str]] = {}
    for alias, key in metadata.aliases.items():
        aliases.setdefault(key, []).append(alias)
    of_masters = masters.named(metadata, mine, folder) if selection.masters else {}
    keys.update((key, key) for key in of_masters.values())
    entries, records = find_tensors(
        keys, aliases, metadata, folder, sources, located=selection.located
    )
    entries, findings = masters.placed(entries, of_masters, folder) if of_masters else (entries, ())
    stated = settings.read(folder, sources)
    return Catalog(
        format="megatron",
        origin=Origin(
            root=folder,
            framework="megatron-core",
            world_size=world_size(metadata),
            details={
                "settings": stated.settings,
                "tensors_left_out": len(metadata.tensors) - len(mine) - len(of_masters),
                "non_tensors": len(metadata.objects),
            },
        ),
        entries=entries,
        records=records,
        findings=(
            *_findings(metadata, len(mine) + len(of_masters), folder),
            *stated.findings,
            *findings,
        ),
        renamed=frozenset(metadata.aliases),
        optimizer=state.reader(folder, metadata, entries, sources),
    )


def _metadata(folder: Path, sources: Sources) -> Metadata:
    path = child(folder, _METADATA)
    if not exists(path):
        raise IncompleteError(
            f"it holds no {_METADATA}, which says where each tensor lies.",
            path=folder,
            hint="Copy the folder again (the file's name begins with a dot), or use an earlier "
            "checkpoint.",
        )
    source, data = opened(path, sources, until=plans.PLANS)
    tail = source.read(max(0, source.size - 3), min(source.size, 3))
    shorter = plans.without_plans(data) if plans.ends_well(tail) else None
    del data
    if shorter is not None:
        try:
            return unpickled(shorter, path)
        except ReshardError:  # the plans are not where they are expected
            pass
    check_size(source.size, path=str(path))
    return unpickled(source.read(0, source.size), path)


def _no_model(folder: Path, metadata: Metadata) -> NotFoundError:
    what = "the state of an optimizer" if metadata.tensors else "no tensor"
    return NotFoundError(
        f"it holds {what} and no model.",
        path=folder,
        hint=folders.where_weights_lie(folder)
        or "The model's checkpoint lies beside it, or was not saved.",
    )


def _findings(metadata: Metadata, read: int, folder: Path) -> Iterable[Finding]:
    rest = len(metadata.tensors) - read
    if rest:
        message = f"the state of the optimizer that it holds ({rest} tensors) is not with these."
        yield Finding("optimizer-left-out", message)
    export = folders.export_beside(folder)
    if export is not None:
        message = (
            f"{export} holds the full weights as well; the distributed checkpoint was read. To "
            "convert the others, name that folder."
        )
        yield Finding("export-beside", message, subject=export.name)
