"""Layouts: how one model's tensors are named, stacked and oriented.

Every family has one layout on the hub, the released files', and others in the memory of a loaded
model, by version of transformers. All of them are described relative to the hub's:

    names      pairs of patterns (on the hub, here); the first that fits a name rewrites it
    stacked    one tensor here that is many on the hub: experts, gate and up projections
    swapped    tensors whose last two dimensions are exchanged here

Reading a set of tensors through a layout says where each *hub tensor* lies in it: in a whole
tensor, or in some rows of one expert of a stacked one. Source and base are read the same way, so
they fit where they hold the same hub tensors, whatever the layout of either.
"""

from __future__ import annotations

import re

from msgspec import Struct

from reshard.core.tensors import Shape
from reshard.errors import OptionError
from reshard.naming import patterns

Version = tuple[int, ...]


class Stacked(Struct, frozen=True):
    """A tensor `[experts, sum of rows, columns]` that the hub holds as one tensor an expert.

    `name` is the pattern of the stacked tensor after the layout's names were rewritten; `parts`
    are the patterns of the hub's `[rows, columns]` tensors that are joined along the rows, in
    order. The last `*` of a part is the expert's number, its other wildcards are those of `name`.
    """

    name: str
    parts: tuple[str, ...]


class Layout(Struct, frozen=True):
    """One layout of a family. `title` says whose it is.

    A loaded model has it in memory under transformers versions `[since, before)`: of the full
    model, or with `backbone` of the AutoModel class. `since` is None for a layout that occurs only
    in files; `released` where training starts from such files.
    """

    title: str
    since: Version | None = None
    before: Version | None = None
    names: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()
    swapped: tuple[str, ...] = ()
    backbone: bool = False
    released: bool = False

    def loads_as(self, version: Version) -> bool:
        """Whether loaded models of this transformers version have this layout."""
        if self.since is None or version < self.since:
            return False
        return self.before is None or version < self.before


class Family(Struct, frozen=True):
    """Model types (`config.json`'s `model_type`) that share layouts; the first is the hub's."""

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]


class Piece(Struct, frozen=True, gc=False):
    """Where one hub tensor lies: in tensor `name`, whole, or rows `[start, stop)` of one expert.

    `shape` is the hub tensor's. `swapped`: the last two dimensions are exchanged there.
    """

    name: str
    shape: Shape
    expert: int | None = None
    start: int = 0
    stop: int = 0
    swapped: bool = False


class Effect(Struct, frozen=True):
    """What a view does to a name: the hub's name, the rules used in words, what to split."""

    hub: str
    rules: tuple[str, ...]
    stacked: Stacked | None = None
    wild: tuple[str, ...] = ()
    swapped: bool = False


class View(Struct, frozen=True):
    """A layout of a whole model: the model's own, and that of the language model inside it."""

    layouts: tuple[Layout, ...]

    @property
    def title(self) -> str:
        return ", ".join(dict.fromkeys(layout.title for layout in self.layouts))

    def loads_as(self, version: Version) -> bool:
        """Whether loaded models of this transformers version have this layout."""
        return all(layout.loads_as(version) for layout in self.layouts)

    @property
    def backbone(self) -> bool:
        """Whether modules of the AutoModel class have it."""
        return any(layout.backbone for layout in self.layouts)

    def effect(self, name: str) -> Effect:
        """How a name of this layout reads."""
        rules = []
        for layout in self.layouts:
            pairs = ((here, hub) for hub, here in layout.names)
            name, rule = patterns.rewrite(name, pairs)
            if rule is not None:
                rules.append(f"{rule[0]} -> {rule[1]}")
        for stacked in (rule for layout in self.layouts for rule in layout.stacked):
            wild = patterns.match(stacked.name, name)
            if wild is not None:
                rules.append(f"{stacked.name}: one tensor an expert")
                return Effect(name, tuple(rules), stacked, wild)
        swapped = any(patterns.matches_any(layout.swapped, name) for layout in self.layouts)
        if swapped:
            rules.append(f"{name}: last two dimensions exchanged")
        return Effect(name, tuple(rules), swapped=swapped)

    def name_here(self, hub: str) -> str:
        """The name that this layout gives to a hub tensor (or to a stacked one)."""
        for layout in reversed(self.layouts):
            hub, _ = patterns.rewrite(hub, layout.names)
        return hub


def parse_version(text: str) -> Version:
    """`"4.57.1"` as numbers; `.dev0` and the like are left out.

    Raises `OptionError` where the text is not a version.
    """
    found = re.match(r"\d{1,6}(\.\d{1,6})*(?!\d)", text.strip())
    if found is None:
        raise OptionError(
            f"{text!r} is not a version of transformers.", hint="Write it as in 4.57.1 or 5.23."
        )
    return tuple(int(part) for part in found.group().split("."))
