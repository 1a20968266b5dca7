"""NumPy arrays in a folder: a format for the sake of an example (docs/adding-a-format.md).

    tensors.json    {"embed.weight": "0.npy", ...}
    0.npy           [magic and version: 8 bytes][u16 header length][header][elements]
    header:         {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4)}

Read off numpy 2.4 (numpy/lib/_format_impl.py), version 1.0 of the format.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from reshard.core import dtypes
from reshard.core.catalog import Catalog, Origin
from reshard.core.plan import OutputFile, Slot
from reshard.core.tensors import Entry, Extent, Fragment, TensorSpec, whole
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError, PlanError
from reshard.formats import Selection, TensorToWrite
from reshard.formats.info import FormatInfo
from reshard.storage.local import Sources, child
from reshard.storage.source import Source

INFO = FormatInfo("npy", "a folder of NumPy arrays", __name__, to="npy")
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


def lay_out(
    slots: Sequence[TensorToWrite], max_file_nbytes: int
) -> tuple[tuple[OutputFile, ...], tuple[tuple[str, bytes], ...]]:
    """One file an array, and the index. A file is as large as its array, whatever is asked for."""
    files = []
    for number, (spec, source, reference) in enumerate(slots):
        if spec.dtype.numpy.kind not in "biufc":
            raise PlanError(f"a .npy file cannot say {spec.dtype}.", tensor=spec.name)
        described = {
            "descr": np.dtype(spec.dtype.numpy).str,
            "fortran_order": False,
            "shape": spec.shape,
        }
        header = repr(described).encode("latin1") + b"\n"
        start = _MAGIC + len(header).to_bytes(2, "little") + header
        slot = Slot(len(start), spec, source, reference=reference)
        nbytes = len(start) + spec.nbytes
        files.append(OutputFile(f"{number}.npy", nbytes, ((0, start),), (slot,)))
    index = {spec.name: file.name for (spec, _, _), file in zip(slots, files, strict=True)}
    return tuple(files), ((INDEX, json.dumps(index).encode()),)


def _index(source: Source) -> dict[str, str]:
    try:
        index = json.loads(source.read(0, source.size))
    except ValueError:
        raise FormatError("it is not JSON.", path=source.ref.path) from None
    if not isinstance(index, dict) or not all(isinstance(f, str) for f in index.values()):
        raise FormatError("it is not a table of names to files.", path=source.ref.path)
    return index


def _entry(name: str, source: Source) -> Entry:
    """One array, from its header. Its elements are one fragment: all of it, in one extent."""
    path = source.ref.path
    if source.read(0, 8) != _MAGIC:
        raise FormatError("it is not a .npy file of version 1.0.", path=path)
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
