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
from reshard.core.tensors import Extent, Fragments, Single, stored
from reshard.inspection import Inspection
from reshard.pages.page import render
from reshard.storage.paths import absolute

# A tensor that lies in more files is not shown file by file: ZeRO-3 of 1,024 ranks has 1,024 pieces
# of each of 70,000 tensors.
_MAX_FILES = 64
# A name's parts beyond these stay together: a name of a hostile file may have any number.
_DEPTH = 10


class Leaf(Struct, frozen=True):
    """A tensor: `row` is its place in the table, `shares` the parts of its bytes that each of its
    `files` holds; of very many files, all of them."""

    name: str
    row: int
    shape: str
    dtype: str
    nbytes: int
    kind: str
    note: str
    shares: tuple[tuple[float, str], ...]
    full_name: str
    files: int


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
    held = _Files(root)
    leaves = [_leaf(number, tensor, held, unexpected) for number, tensor in enumerate(tensors)]
    files = held.nbytes
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


class _Files:
    """What lies in each file, counted while the tensors are walked through once.

    `nbytes` are the bytes of each file. Of tensors that are cut into more than `_MAX_FILES` files,
    they are those of the flat tensors that these are cut out of, padding included.
    """

    def __init__(self, root: Path) -> None:
        self.nbytes = Counter[str]()
        self._root = root
        self._regions: dict[int, Counter[str]] = {}  # by id: the tensors keep what it is of

    def shares(self, tensor: Tensor) -> tuple[int, tuple[tuple[float, str], ...]]:
        """How many files a tensor lies in, and their parts of its bytes, in words."""
        fragments = tensor.entry.fragments
        if isinstance(fragments, Fragments) and not isinstance(fragments, Single):
            held = fragments.regions()
            known = self._regions.get(id(held))
            if known is None:
                known = self._regions[id(held)] = self._counted(held.extents())
                if len(known) > _MAX_FILES:
                    self.nbytes.update(known)
            if len(known) > _MAX_FILES:
                return len(known), ((1.0, f"{len(known)} files"),)
        found = self._counted(stored(fragments))
        if tensor.kind != "tied":
            self.nbytes.update(found)
        total = max(sum(found.values()), 1)
        return len(found), tuple(
            (found[name] / total, f"{name}: {percent(found[name] / total)}")
            for name in sorted(found, key=natural)
        )

    def _counted(self, extents: Iterable[Extent]) -> Counter[str]:
        counts = Counter[str]()
        for extent in extents:
            counts[_file(extent.file.path, self._root)] += extent.nbytes
        return counts


def _leaf(number: int, tensor: Tensor, files: _Files, unexpected: frozenset[str]) -> Leaf:
    count, parts = files.shares(tensor)
    name = tensor.name.split(".", _DEPTH)[-1]
    note = f"tied to {tensor.entry.spec.name}" if tensor.kind == "tied" else ""
    if tensor.name in unexpected:
        note = "not in the base"
    shape = " × ".join(map(str, tensor.shape)) or "scalar"
    dtype = str(tensor.dtype)
    return Leaf(
        name, number, shape, dtype, tensor.nbytes, tensor.kind, note, parts, tensor.name, count
    )


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
