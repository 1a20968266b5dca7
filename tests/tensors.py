"""Tensors and arrays as tests compare them: bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reshard.core import dtypes
from reshard.core.strides import blocks
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, TensorSpec, whole
from reshard.storage.local import Sources
from reshard.transfer.checksums import Ledger
from reshard.transfer.fill import Reader, fill

Array = np.ndarray[Any, np.dtype[Any]]
State = dict[str, torch.Tensor]


def raw(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, in row-major order."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """The same names, and under each an equal tensor."""
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def under(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    """The state dict with a prefix before each name."""
    return {prefix + name: value for name, value in state.items()}


def stored(folder: Path, name: str, array: Array) -> Entry:
    """An entry whose bytes are a file of their own."""
    (folder / name).write_bytes(array.tobytes())
    dtype = dtypes.parse(array.dtype.name)
    extent = Extent(FileRef(str(folder / name)), 0, array.nbytes)
    fragment = Fragment(whole(array.shape), extent, dtype)
    return Entry(TensorSpec(name, dtype, array.shape), (fragment,))


def evaluate(entry: Entry, limit: int, dtype: np.dtype[Any], buffer: int) -> Array:
    """What the engine makes of an entry, in blocks of `limit` elements."""
    out: Array = np.empty(entry.spec.numel, dtype)
    start = 0
    with Sources() as sources:
        reader = Reader(sources, Ledger(()), memoryview(bytearray(buffer)))
        for box in blocks(entry.spec.shape, limit):
            fill(entry, box, out[start : start + box.numel], reader)
            start += box.numel
    return out.reshape(entry.spec.shape)
