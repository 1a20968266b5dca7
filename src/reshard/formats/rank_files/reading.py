"""Read the ranks' files as one table."""

from __future__ import annotations

from pathlib import Path

from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding
from reshard.formats import Selection, of_several
from reshard.formats.rank_files import files, join, local, optimizer
from reshard.formats.rank_files.state import read_state
from reshard.storage.local import Sources
from reshard.storage.paths import is_folder, matching

# verl writes the whole model here with save_contents hf_model.
_EXPORT = "huggingface"


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of all ranks, each proven to be tiled by their parts.

    `selection.role` names one of the models in verl's folder of a step. Where `path` is a file, the
    other ranks' files in the folder are read with it.

    Raises `IncompleteError` (a rank's file is missing, or a copy of another's), `FormatError`
    (ranks that contradict each other or themselves), `UnsupportedError`, `NotFoundError` (several
    models, of which none was named).
    """
    saved = files.find(path, selection.role, sources)
    states = [read_state(file, rank, sources) for rank, file in sorted(saved.files.items())]
    flat = local.holds_flat_parameters(states)
    table = local.joined(states, saved, sources) if flat else join.joined(states, saved, sources)
    findings = [*of_several(saved.folder, saved.models, saved.model, "file")]
    for state in states:
        findings += state.findings
    return Catalog(
        format="ranks",
        origin=Origin(
            root=saved.folder,
            framework=saved.writer,
            world_size=saved.world or join.stated_world(states),
            details={"files": [file.name for _, file in sorted(saved.files.items())]},
        ),
        entries=table.entries,
        records=table.records,
        findings=(*dict.fromkeys(findings), *table.findings, *_beside(saved.folder)),
        unshaped=table.unshaped,
        optimizer=optimizer.reader(saved, states, table.entries, sources),
    )


def _beside(folder: Path) -> list[Finding]:
    """The finding that the model's full weights lie beside the ranks' files."""
    export = folder / _EXPORT
    if not is_folder(export) or not any(matching(export, "*.safetensors")):
        return []
    message = (
        f"{export} holds the full weights as well, in the type that verl saved them in; the ranks' "
        "files, which keep the type of the training, were read. To convert the others, name it."
    )
    return [Finding("export-beside", message, subject=_EXPORT)]
