"""The metadata of one save: one file, or one per rank."""

from __future__ import annotations

from pathlib import Path

from reshard.containers.dcp.merging import merge
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.parsing import opened, unpickled
from reshard.core.regex import regex
from reshard.errors import FormatError, IncompleteError
from reshard.storage.local import Sources, child
from reshard.storage.paths import names

METADATA = ".metadata"
#: Where accelerate and the HF Trainer put the models of a checkpoint folder, one as a rule.
ACCELERATE_MODEL = regex(r"pytorch_model_fsdp_(\d+)")
# The metadata's name until it is whole; then it is renamed.
_BEGUN = ".metadata.tmp"
RANK_METADATA = regex(r"__(\d+)\.metadata")


def is_of_a_save(name: str) -> bool:
    """Whether a file is of a DCP save, which may not have been finished."""
    return name.endswith((METADATA, _BEGUN, ".distcp"))


def folder_metadata(folder: Path, sources: Sources) -> Metadata:
    """The folder's metadata, that of all ranks merged where each wrote its own."""
    there = names(folder)
    ranks = sorted(int(m[1]) for name in there if (m := RANK_METADATA.fullmatch(name)))
    begun = [name for name in there if name.endswith(_BEGUN)]
    if METADATA not in there and not ranks:
        raise _unfinished(folder, begun, holds=bool(there))
    if begun:
        raise IncompleteError(
            f"{begun[0]} lies beside the metadata: a later save into this folder did not finish, "
            "and the data files may come from either save.",
            path=folder,
            hint="Use another checkpoint.",
        )
    if METADATA in there and ranks:
        raise FormatError(
            f"it holds both {METADATA} and __{ranks[0]}{METADATA}: two saves into one folder.",
            path=folder,
            hint=f"Move {METADATA}, or all files __*.metadata, away: those of the other save.",
        )
    if METADATA in there:
        return _parse(child(folder, METADATA), sources)
    if ranks != list(range(len(ranks))):
        missing = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
        raise IncompleteError(
            f"each rank wrote its own metadata, up to rank {max(ranks)}, but "
            f"__{missing}{METADATA} is missing.",
            path=folder,
            hint="Copy the whole folder again.",
        )
    found = [_parse(child(folder, f"__{rank}{METADATA}"), sources) for rank in ranks]
    return merge(found, str(folder))


def _parse(path: Path, sources: Sources) -> Metadata:
    return unpickled(opened(path, sources)[1], path)


def _unfinished(folder: Path, begun: list[str], *, holds: bool) -> IncompleteError:
    there = f"; {begun[0]} was begun" if begun else ""
    what = (
        f"it holds .distcp files and no {METADATA}, which is written last"
        if holds
        else ("it is empty")
    )
    return IncompleteError(
        f"{what}{there}: the save did not finish.",
        path=folder,
        hint="Use an earlier checkpoint, or copy the folder again if the file was left behind "
        "(its name begins with a dot).",
    )
