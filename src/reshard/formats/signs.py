"""Signs of a format that the rooms of others look for as well, to leave its folders alone."""

from __future__ import annotations

from pathlib import Path

#: What Megatron-Core writes last into a folder: {"sharded_backend": "torch_dist", ..}.
MCORE = "metadata.json"
#: What it keeps of a run beside the tensors, as one torch.save file.
MCORE_COMMON = "common.pt"
_BACKEND = b'"sharded_backend"'
# Bytes of `metadata.json`: its four short members.
_MAX_NBYTES = 4096


def is_mcore(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint of Megatron-Core, finished or not."""
    stated = folder / MCORE
    if stated.is_file():
        with stated.open("rb") as file:
            if _BACKEND in file.read(_MAX_NBYTES):
                return True
    if not (folder / MCORE_COMMON).is_file():
        return False
    return (folder / ".metadata").exists() or any(folder.glob("*.distcp"))
