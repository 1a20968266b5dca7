"""One torch.save file a rank: what FSDP runs save without torch.distributed.checkpoint.

verl (role folders; see `files` for how they are found):

    run/latest_checkpointed_iteration.txt                 "7"
    run/global_step_7/actor/fsdp_config.json              {"FSDP_version": 2, "world_size": 4}
    run/global_step_7/actor/model_world_size_4_rank_0.pt  {name: DTensor, ShardedTensor or Tensor}
    run/global_step_7/actor/huggingface/                  config, tokenizer; weights if asked for
    run/global_step_7/critic/...

accelerate and the HF Trainer, with use_dcp=False or LOCAL_STATE_DICT:

    pytorch_model_fsdp_0_rank0.bin    pytorch_model_fsdp_rank0.bin    one a rank

any script's `torch.save(model.state_dict(), f"model_rank{rank}.pt")`. FSDP1's LOCAL_STATE_DICT
holds flat parameters (see `local`).

A file holds a rank's parts of all tensors, and says of each which part it is: a DTensor by mesh and
placements, a ShardedTensor by offsets. Plain tensors are the same in every file. Optimizer files
(`optimizer`) and extra states lie beside; they are opened where the training state is
asked for. Read off verl 0.9.1 (utils/checkpoint/
fsdp_checkpoint_manager.py), accelerate 1.15 (utils/fsdp_utils.py), torch 2.13, and files of theirs.
"""

from __future__ import annotations

from pathlib import Path

from reshard.core.catalog import Catalog, Origin
from reshard.core.findings import Finding
from reshard.formats import Selection, of_several
from reshard.formats.rank_files import files, join, local, optimizer
from reshard.formats.rank_files.state import read_state
from reshard.storage.local import Sources
from reshard.storage.paths import is_folder, matching

__all__ = ["detect", "read"]

# verl writes the whole model here with save_contents hf_model.
_EXPORT = "huggingface"


def detect(path: Path) -> str | None:
    """Rank files in a folder, or in verl's role folders in it; or one such file."""
    return files.why(path)


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
    """That the model's full weights lie beside the ranks' files."""
    export = folder / _EXPORT
    if not is_folder(export) or not any(matching(export, "*.safetensors")):
        return []
    message = (
        f"{export} holds the full weights as well, in the type that verl saved them in; the ranks' "
        "files, which keep the type of the training, were read. To convert the others, name it."
    )
    return [Finding("export-beside", message, subject=_EXPORT)]
