"""The index of a model's shards: which file holds each tensor.

    {"metadata": {"total_size": bytes}, "weight_map": {tensor: file}}

`model.safetensors.index.json` of safetensors and `pytorch_model.bin.index.json` of torch files have
this form (huggingface_hub 2.4, serialization/_base.py).
"""

from __future__ import annotations

from pathlib import Path

from reshard.errors import FormatError
from reshard.storage import strict_json
from reshard.storage.local import Sources, child


def read(folder: Path, name: str, sources: Sources) -> dict[str, str]:
    """Tensor -> file, by the index `name` in a folder; `FormatError` where it has no such table."""
    stated = strict_json.read_object(
        sources.open(child(folder, name, store=True)), max_nbytes=strict_json.MAX_INDEX
    )
    found = stated.get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise FormatError("it has no weight_map of names to files.", path=folder / name)
    # One text for each file, not one for each tensor.
    files: dict[str, str] = {}
    for tensor, file in found.items():
        found[tensor] = files.setdefault(file, file)
    return found
