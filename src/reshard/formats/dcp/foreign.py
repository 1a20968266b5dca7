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
