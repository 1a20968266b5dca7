"""Tensors that a conformance test writes and expects back, and comparing them bit for bit."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from reshard.core.catalog import Catalog
from reshard.testing.gathering import gather

Array = np.ndarray[Any, Any]
Tensors = Mapping[str, Array]


def ordinary(lacks: Container[str] = ()) -> dict[str, Array]:
    """A dozen tensors, 10 KB in all: several dtypes, every kind of shape, names of every kind.

    Values of all exponents, infinities and NaNs included: a reader moves bits, not numbers. Those
    of the dtypes in `lacks` are left out.
    """
    random = np.random.default_rng(0)

    def bits(dtype: Any, *shape: int) -> Array:
        found = np.dtype(dtype)
        raw = random.integers(0, 256, found.itemsize * math.prod(shape), np.uint8)
        array: Array = raw.view(found).reshape(shape)
        return array

    tensors = {
        "model.embed_tokens.weight": bits(np.float32, 130, 7),
        "model.layers.0.mlp.up_proj.weight": bits(ml_dtypes.bfloat16, 15, 90),
        "model.layers.0.mlp.down_proj.weight": bits(ml_dtypes.bfloat16, 90, 15),
        "model.layers.10.norm.weight": bits(np.float16, 9),
        "conv.weight": bits(np.float32, 2, 3, 1, 4),
        "one": bits(np.float32, 1),
        "scalar": np.array(2**53 + 1, np.int64),
        "double": bits(np.float64, 3, 3),
        "positions": bits(np.int32, 11),
        "mask": np.array([[True, False, True]]),
        "bytes": bits(np.uint8, 4, 1),
        "nothing": np.zeros((0, 4), np.float32),
        "no.columns": np.zeros((3, 0), ml_dtypes.bfloat16),
        "имя с пробелом": bits(np.float32, 2, 2),
    }
    return {name: array for name, array in tensors.items() if array.dtype.name not in lacks}


def large() -> dict[str, Array]:
    """32 MiB in two tensors, so that metadata is little beside them."""
    values = np.arange(4 << 20, dtype=np.float32)
    return {"first": values.reshape(2048, 2048), "second": values[::-1].copy()}


def same(one: Array, other: Array) -> bool:
    """Equal in dtype, shape and every bit: NaN and -0.0 included."""
    return (one.dtype, one.shape) == (other.dtype, other.shape) and (
        one.tobytes() == other.tobytes()
    )


def differing(tensors: Tensors, expected: Tensors) -> list[str]:
    """Names that are in one only, or whose tensors differ."""
    return sorted(
        name
        for name in tensors.keys() | expected.keys()
        if name not in tensors or name not in expected or not same(tensors[name], expected[name])
    )


def held(catalog: Catalog) -> dict[str, Array]:
    """Every tensor of a catalog, read element by element from its files, uncompressed ones only."""
    paths = {f.in_file.file.path for entry in catalog.entries.values() for f in entry.fragments}
    files = {path: Path(path).read_bytes() for path in paths}
    return {name: gather(entry, files) for name, entry in catalog.entries.items()}
