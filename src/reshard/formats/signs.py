"""Signs of a format that other formats' rooms look for too, so that they do not claim its
folders."""

from __future__ import annotations

from pathlib import Path

from reshard.core.regex import regex
from reshard.storage.local import read_start
from reshard.storage.paths import exists, is_file, is_folder, matching, names

#: What Megatron-Core writes last into a folder: {"sharded_backend": "torch_dist", ..}.
MCORE = "metadata.json"
#: What it keeps of a run beside the tensors, as one torch.save file.
MCORE_COMMON = "common.pt"
_BACKEND = b'"sharded_backend"'
#: What Meta calls the files of its own checkpoints of Llama, by the GPUs that hold their parts.
META_FILE = regex(r"consolidated\.\d\d\.pth")
# Bytes of `metadata.json`: its four short members.
_MAX_NBYTES = 4096


def is_mcore(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint of Megatron-Core, finished or not."""
    stated = folder / MCORE
    if is_file(stated) and _BACKEND in read_start(stated, _MAX_NBYTES):
        return True
    if not is_file(folder / MCORE_COMMON):
        return False
    return exists(folder / ".metadata") or any(matching(folder, "*.distcp"))


def is_meta(path: Path) -> bool:
    """Whether it is a file of one of Meta's own checkpoints, or a folder that holds one and no
    safetensors."""
    if is_file(path):
        return META_FILE.fullmatch(path.name) is not None
    there = names(path) if is_folder(path) else []
    if not any(META_FILE.fullmatch(name) for name in there):
        return False
    return not any(name.endswith(".safetensors") for name in there)
