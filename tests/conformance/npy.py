"""NumPy arrays in a folder: a format for the sake of an example (docs/adding-a-format.md).

    tensors.json    {"embed.weight": "0.npy", ...}
    0.npy           [magic and version: 8 bytes][u16 header length][header][elements]
    header:         {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)}

Read off numpy 2.4 (numpy/lib/_format_impl.py), version 1.0 of the format.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path

import numpy as np

from reshard.core import dtypes
from reshard.core.catalog import Catalog, Origin
from reshard.core.tensors import Entry, Extent, Fragment, TensorSpec, whole
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError
from reshard.formats import Selection
from reshard.storage.local import Source, Sources, child

INDEX = "tensors.json"
_MAGIC = b"\x93NUMPY\x01\x00"


def detect(path: Path) -> str | None:
    """A folder with the index."""
    return f"it holds {INDEX}" if (path / INDEX).is_file() else None


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The arrays that the index lists; other files are not looked at."""
    entries = {}
    for name, file in _index(sources.open(path / INDEX)).items():
        entries[name] = _entry(name, sources.open(child(path, file)))
        check_tiling(entries[name])
    return Catalog("npy", Origin(root=path, framework="numpy"), entries)


def _index(source: Source) -> dict[str, str]:
    try:
        index = json.loads(source.read(0, source.size))
    except ValueError:
        raise FormatError("it is no JSON.", path=source.ref.path) from None
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise FormatError("it is no table of names to files.", path=source.ref.path)
    return index


def _entry(name: str, source: Source) -> Entry:
    """One array, from its header. Its elements are one fragment: all of it, in one extent."""
    path = source.ref.path
    if source.read(0, 8) != _MAGIC:
        raise FormatError("it is no .npy file of version 1.0.", path=path)
    length = int.from_bytes(source.read(8, 2), "little")
    try:
        header = ast.literal_eval(source.read(10, length).decode("latin1"))
        dtype = dtypes.parse(np.dtype(header["descr"]).name)
        spec = TensorSpec(name, dtype, header["shape"])
    except (ValueError, SyntaxError, KeyError, TypeError):
        raise FormatError("its header cannot be read.", path=path) from None
    if source.size != 10 + length + spec.nbytes:
        raise IncompleteError(
            f"its header describes {10 + length + spec.nbytes} bytes, the file has {source.size}.",
            path=path,
            hint="Copy the file again.",
        )
    if not spec.numel:
        return Entry(spec, ())
    extent = Extent(source.ref, 10 + length, spec.nbytes)
    return Entry(spec, (Fragment(whole(spec.shape), extent, dtype),))
