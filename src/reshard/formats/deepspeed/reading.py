"""Read a checkpoint of any kind: which module reads it, and what of it."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from reshard.core.catalog import Catalog
from reshard.formats import Selection, of_several
from reshard.formats.deepspeed import (
    files,
    pipeline,
    place,
    stage3,
    stages012,
    state,
    tensor_parallel,
    universal,
)
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.place import Location
from reshard.storage.local import Sources


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of the checkpoint that `selection.tag` (default: `latest`) names."""
    location = place.locate(path, sources, selection.tag)
    if location.layers and not location.universal:
        catalog = pipeline.read(location, sources)
    else:
        catalog = _read(location, sources, selection)
    models = () if selection.tag else place.several_models(path)
    return replace(
        catalog, findings=(*catalog.findings, *of_several(path, models, location.tag, "tag"))
    )


def _read(location: Location, sources: Sources, selection: Selection) -> Catalog:
    """What the files hold that are not of a pipeline's layers."""
    ranks = location.ranks
    saved = [files.read(rank, sources) for rank in ranks]
    if location.universal and saved[0].model[0].staged:
        return pipeline.of_universal(location, saved, sources)
    saved = tensor_parallel.check(location, saved, sources)
    parts = [
        _catalog(rank, one, sources, selection) for rank, one in zip(ranks, saved, strict=True)
    ]
    catalog = parts[0] if len(parts) == 1 else tensor_parallel.join(saved, parts, sources)
    return replace(catalog, optimizer=state.reader(ranks, saved, catalog, sources))


def _catalog(location: Location, saved: Saved, sources: Sources, selection: Selection) -> Catalog:
    """What the files of one model parallel rank hold."""
    if location.universal:
        return universal.catalog(location, saved, sources)
    if saved.stage == 3:
        return stage3.catalog(
            location, saved, sources, allow_step_mismatch=selection.allow_step_mismatch
        )
    return stages012.catalog(location, saved, sources)
