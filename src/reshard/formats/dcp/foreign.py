"""Sharded checkpoints that look like DCP to their owners and are not; each is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

from msgspec import Struct

from reshard.errors import UnsupportedError


class _Kind(Struct, frozen=True):
    pattern: re.Pattern[str]
    what: str
    hint: str
    # A file that must be there as well.
    beside: str | None = None


_KINDS = (
    _Kind(
        # verl/utils/checkpoint/fsdp_checkpoint_manager.py
        re.compile(r"model_world_size_\d+_rank_\d+\.pt"),
        "rank files of verl (one torch.save file a rank), not a DCP checkpoint",
        "Merge them with `python -m verl.model_merger merge --backend fsdp`.",
    ),
    _Kind(
        # accelerate/utils/fsdp_utils.py, save_fsdp_model(use_dcp=False)
        re.compile(r"pytorch_model_fsdp_\d+_rank\d+\.bin"),
        "rank files of accelerate, saved with use_dcp=False, not a DCP checkpoint",
        "Load them into the training run and save with use_dcp=True.",
    ),
    _Kind(
        # accelerate/utils/fsdp_utils.py, LOCAL_STATE_DICT
        re.compile(r"pytorch_model_fsdp_rank\d+\.bin"),
        "rank files of FSDP1's LOCAL_STATE_DICT (flat parameters), not a DCP checkpoint",
        "Load them into the training run and save with SHARDED_STATE_DICT.",
    ),
    _Kind(
        # megatron/core/dist_checkpointing/core.py: {"sharded_backend": "torch_dist", ..}
        re.compile(r"metadata\.json"),
        "a distributed checkpoint of Megatron-Core, whose weights are fused and stacked",
        "Convert it with Megatron-Bridge.",
        beside="common.pt",
    ),
)


def why(folder: Path) -> str | None:
    """What else the folder holds, or None."""
    kind = _kind(folder)
    return None if kind is None else f"it holds {kind.what}"


def refuse(folder: Path) -> None:
    """Raise `UnsupportedError` where the folder holds one of the kinds above."""
    kind = _kind(folder)
    if kind is not None:
        raise UnsupportedError(f"it holds {kind.what}.", path=folder, hint=kind.hint)


def _kind(folder: Path) -> _Kind | None:
    names = {path.name for path in folder.iterdir()}
    for kind in _KINDS:
        beside = kind.beside is None or kind.beside in names
        if beside and any(kind.pattern.fullmatch(name) for name in names):
            return kind
    return None
