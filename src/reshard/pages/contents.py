"""The page of `reshard inspect`: what is in a checkpoint, as a tree of modules and as a table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from msgspec import Struct, field

from reshard.checkpoint import Tensor
from reshard.comparison.sums import natural, percent
from reshard.core.tensors import stored
from reshard.inspection import Inspection
from reshard.pages.page import render
from reshard.storage.paths import absolute

# A name's parts beyond these stay together: a name of a hostile file may have any number.
_DEPTH = 10


class Leaf(Struct, frozen=True):
    """A tensor: `row` is its place in the table, `shares` the files' parts of its bytes."""

    name: str
    row: int
    shape: str
    dtype: str
    nbytes: int
    kind: str
    note: str
    shares: tuple[tuple[float, str], ...]
    full_name: str


class Module(Struct):
    """A node of the tree, with what is below it, summed."""

    name: str
    modules: dict[str, Module] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    tensors: int = 0
    numel: int = 0
    nbytes: int = 0
    frozen: int = 0

    @property
    def children(self) -> list[Module]:
        """The modules below, layer 2 before layer 10."""
        return [self.modules[name] for name in sorted(self.modules, key=natural)]

    @property
    def words(self) -> str:
        """How much of what is below was frozen."""
        if not self.frozen:
            return ""
        return "frozen" if self.frozen == self.tensors else f"{self.frozen} frozen"


def contents_page(inspection: Inspection) -> str:
    """The page of a checkpoint. Raises `UnsupportedError` without jinja2."""
    checkpoint = inspection.checkpoint
    origin = checkpoint.catalog.origin
    root = absolute(origin.root)
    tensors = sorted(checkpoint.tensors.values(), key=lambda tensor: natural(tensor.name))
    fitting = inspection.fitting
    unexpected = frozenset(() if fitting is None else fitting.matching.unexpected)
    leaves = [_leaf(number, tensor, root, unexpected) for number, tensor in enumerate(tensors)]
    files = Counter[str]()
    for entry in checkpoint.catalog.entries.values():
        for extent in stored(entry.fragments):
            files[_file(extent.file.path, root)] += extent.nbytes
    total = max(sum(files.values()), 1)
    return render(
        "contents.html.jinja",
        title=os.fspath(origin.root),
        inspection=inspection,
        findings=inspection.findings,
        fitting=fitting,
        tree=_tree(leaves, tensors),
        leaves=leaves,
        files=[(name, files[name], files[name] / total) for name in sorted(files, key=natural)],
    )


def _leaf(number: int, tensor: Tensor, root: Path, unexpected: frozenset[str]) -> Leaf:
    shares = Counter[str]()
    for extent in stored(tensor.entry.fragments):
        shares[_file(extent.file.path, root)] += extent.nbytes
    total = max(sum(shares.values()), 1)
    parts = tuple(
        (shares[name] / total, f"{name}: {percent(shares[name] / total)}")
        for name in sorted(shares, key=natural)
    )
    name = tensor.name.split(".", _DEPTH)[-1]
    note = f"tied to {tensor.entry.spec.name}" if tensor.kind == "tied" else ""
    if tensor.name in unexpected:
        note = "not in the base"
    shape = " × ".join(map(str, tensor.shape)) or "scalar"
    dtype = str(tensor.dtype)
    return Leaf(name, number, shape, dtype, tensor.nbytes, tensor.kind, note, parts, tensor.name)


@cache
def _file(path: str, root: Path) -> str:
    """A file's path below the checkpoint's, which is absolute as all paths of files are."""
    place = Path(path)
    inside = place != root and place.is_relative_to(root)
    return place.relative_to(root).as_posix() if inside else place.name


def _tree(leaves: Iterable[Leaf], tensors: Iterable[Tensor]) -> Module:
    top = Module("")
    for leaf, tensor in zip(leaves, tensors, strict=True):
        path = [top]
        for part in tensor.name.split(".", _DEPTH)[:-1]:
            path.append(path[-1].modules.setdefault(part, Module(part)))
        path[-1].leaves.append(leaf)
        if leaf.kind == "tied":
            continue
        for module in path:
            module.tensors += 1
            module.numel += tensor.entry.spec.numel
            module.nbytes += leaf.nbytes
            module.frozen += leaf.kind == "frozen"
    return top
