"""The tensors of a folder's safetensors files, looked at without loading a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reshard.core.tensors import Entry
from reshard.errors import IncompleteError
from reshard.formats import huggingface
from reshard.storage.local import Sources


def read_weights(files: Sequence[Path], sources: Sources) -> dict[str, Entry]:
    """Every tensor of the files, by name, sorted.

    Raises `FormatError` if a file is not safetensors or is cut short, `IncompleteError` if two
    files hold the same tensor.
    """
    found: dict[str, Entry] = {}
    for path in files:
        for entry in huggingface.read_file(path, sources):
            name = entry.spec.name
            if name in found:
                raise IncompleteError("two files hold this tensor.", path=path, tensor=name)
            found[name] = entry
    return dict(sorted(found.items()))
