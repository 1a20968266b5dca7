"""The key tables of `layouts/`, and entries made from arrays or from names and shapes alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from reshard import naming
from reshard.core import dtypes
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Entry, Extent, FileRef, Fragment, Shape, TensorSpec, whole
from reshard.core.tiling import check_tiling
from reshard.naming import NameMap, Schema, apply

LAYOUTS = Path(__file__).parent / "layouts"
VERSIONS = tuple(sorted(path.name for path in LAYOUTS.iterdir()))
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """What one version of transformers does with one model: see make_layouts.py.

    `disk` maps a saved name to the name in memory, or to a shape where no tensor in memory is it.
    """

    config: dict[str, Any]
    memory: dict[str, Shape]
    disk: dict[str, str | Shape]

    def disk_shapes(self) -> dict[str, Shape]:
        return {
            name: self.memory[origin] if isinstance(origin, str) else origin
            for name, origin in self.disk.items()
        }

    def schema(self) -> Schema:
        return schema(self.disk_shapes(), self.config)


@cache
def table(version: str, name: str) -> Table:
    raw = json.loads((LAYOUTS / version / f"{name}.json").read_text())
    memory = {key: tuple(shape) for key, shape in raw["memory"].items()}
    disk = {
        key: origin if isinstance(origin, str) else tuple(origin)
        for key, origin in raw["disk"].items()
    }
    return Table(raw["config"], memory, disk)


def names(version: str) -> list[str]:
    """The models that a version has a table of."""
    return sorted(path.stem for path in (LAYOUTS / version).glob("*.json"))


def schema(shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None) -> Schema:
    specs = {name: TensorSpec(name, dtypes.BFLOAT16, shape) for name, shape in shapes.items()}
    return Schema(specs, config or {})


def entry(name: str, shape: Shape, *, aliases: tuple[str, ...] = ()) -> Entry:
    """A float32 tensor that lies alone in a file of its own name."""
    spec = TensorSpec(name, dtypes.FLOAT32, shape)
    extent = Extent(FileRef(name), 0, spec.nbytes)
    return Entry(spec, (Fragment(whole(shape), extent, spec.dtype),), aliases=aliases)


def entries(shapes: Mapping[str, Shape], prefix: str = "") -> dict[str, Entry]:
    return {prefix + name: entry(prefix + name, shape) for name, shape in shapes.items()}


def files(arrays: Mapping[str, Array], prefix: str = "") -> dict[str, bytes]:
    """The files that `entries` of the arrays' shapes lie in."""
    return {prefix + name: array.astype(np.float32).tobytes() for name, array in arrays.items()}


def random_arrays(shapes: Mapping[str, Shape], seed: int = 0) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def origin(found: Entry) -> str:
    """The name of the one tensor that an entry is, whole and in order; fails for a cut one."""
    (fragment,) = found.fragments
    assert fragment.box == whole(found.spec.shape)
    assert fragment.strides is None
    assert fragment.extent.nbytes == found.spec.nbytes
    return fragment.in_file.file.path


def values(found: Entry, content: Mapping[str, bytes]) -> Array:
    """The entry's elements, once its boxes are proven to tile it."""
    check_tiling(found)
    out = np.empty(found.spec.shape, found.spec.dtype.numpy)
    for fragment in found.fragments:
        box, item = fragment.box, fragment.dtype.itemsize
        start = fragment.extent.offset
        data = content[fragment.in_file.file.path][start : start + fragment.extent.nbytes]
        strides = fragment.strides or contiguous_strides(box.sizes)
        piece = as_strided(
            np.frombuffer(data, fragment.dtype.numpy),
            box.sizes,
            tuple(stride * item for stride in strides),
        )
        region = tuple(slice(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True))
        out.reshape(box.shape)[region] = piece
    return out


class Fitted:
    """What a fit found, and the tensors that it makes."""

    def __init__(self, entries: Mapping[str, Entry], found: NameMap) -> None:
        self.name_map = found
        self.entries = apply(found.outputs, entries)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.name_map, name)


def fit(entries: Mapping[str, Entry], schema: Schema, **options: Any) -> Fitted:
    """Fit entries onto a base, and make the base's tensors of them."""
    return Fitted(entries, naming.fit(entries, schema, **options))
