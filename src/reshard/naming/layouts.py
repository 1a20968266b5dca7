"""Layouts: the ways in which one model's tensors are named, stacked and oriented.

Every family has one layout on the hub, the released files', and others in the memory of a live
module, by version of transformers. All of them are described relative to the hub's:

    names      pairs of patterns (on the hub, here); the first that fits a name rewrites it
    stacked    one tensor here that is many on the hub: experts, gate and up projections
    swapped    tensors whose last two dimensions are exchanged here

Reading a set of tensors through a layout says where each *hub tensor* lies in it: in a whole
tensor, or in some rows of one expert of a stacked one. Source and base are read the same way, so
they fit where they hold the same hub tensors, whatever the layout of either.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from reshard.errors import PlanError
from reshard.naming import patterns
from reshard.tensors import Shape

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stacked:
    """A tensor `[experts, sum of rows, columns]` that the hub holds as one tensor an expert.

    `name` is the pattern of the stacked tensor after the layout's names were rewritten; `parts`
    are the patterns of the hub's `[rows, columns]` tensors that are joined along the rows, in
    order. The last `*` of a part is the expert's number, its other wildcards are those of `name`.
    """

    name: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """One layout of a family. `title` says whose it is.

    A live module of the full model has it in memory under transformers versions `[since, before)`;
    `since` is None for a layout that is only ever met in files or in a backbone class.
    """

    title: str
    since: Version | None = None
    before: Version | None = None
    names: tuple[tuple[str, str], ...] = ()
    stacked: tuple[Stacked, ...] = ()
    swapped: tuple[str, ...] = ()

    def is_live(self, version: Version) -> bool:
        """Whether live modules of this transformers version have this layout."""
        if self.since is None or version < self.since:
            return False
        return self.before is None or version < self.before


@dataclass(frozen=True, slots=True)
class Family:
    """Model types (`config.json`'s `model_type`) that share layouts; the first is the hub's."""

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Where one hub tensor lies: in tensor `name`, whole, or rows `[start, stop)` of one expert.

    `shape` is the hub tensor's. `swapped`: the last two dimensions are exchanged there.
    """

    name: str
    shape: Shape
    expert: int | None = None
    start: int = 0
    stop: int = 0
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class View:
    """A layout of a whole model: the model's own, and that of the language model inside it."""

    layouts: tuple[Layout, ...]

    @property
    def title(self) -> str:
        return ", ".join(dict.fromkeys(layout.title for layout in self.layouts))

    def is_live(self, version: Version) -> bool:
        return all(layout.is_live(version) for layout in self.layouts)

    def hub_name(self, name: str) -> tuple[str, tuple[str, ...]]:
        """The name with the layouts' names rewritten, and the rules that did it, in words."""
        rules = []
        for layout in self.layouts:
            pairs = ((here, hub) for hub, here in layout.names)
            name, rule = patterns.rewrite(name, pairs)
            if rule is not None:
                rules.append(f"{rule[0]} -> {rule[1]}")
        return name, tuple(rules)

    def name_here(self, hub: str) -> str:
        """The name that this layout gives to a hub tensor (or to a stacked one)."""
        for layout in reversed(self.layouts):
            hub, _ = patterns.rewrite(hub, layout.names)
        return hub

    @property
    def stacked(self) -> tuple[Stacked, ...]:
        return tuple(rule for layout in self.layouts for rule in layout.stacked)

    @property
    def swapped(self) -> tuple[str, ...]:
        return tuple(rule for layout in self.layouts for rule in layout.swapped)


@dataclass(frozen=True, slots=True)
class Reading:
    """What a set of tensors holds when it is read through a view.

    `pieces`: hub name -> where it lies. `rules`: how often each rule was used. `misfits`: names
    without the prefix, or that read as a hub tensor which another name already gave.
    """

    pieces: Mapping[str, Piece]
    rules: Mapping[str, int]
    misfits: tuple[str, ...]


def read(shapes: Mapping[str, Shape], view: View, prefix: str = "") -> Reading:
    """Read tensors, given by name and shape, through a view, once `prefix` is stripped.

    The pieces' names keep the prefix.
    """
    pieces: dict[str, Piece] = {}
    rules: dict[str, int] = {}
    misfits = []
    for name, shape in shapes.items():
        hub, used = view.hub_name(name.removeprefix(prefix))
        found, rule = _pieces(name, hub, shape, view)
        if not name.startswith(prefix) or any(key in pieces for key in found):
            misfits.append(name)
            continue
        pieces.update(found)
        for text in (*used, rule) if rule else used:
            rules[text] = rules.get(text, 0) + 1
    return Reading(pieces, rules, tuple(misfits))


def _pieces(name: str, hub: str, shape: Shape, view: View) -> tuple[dict[str, Piece], str | None]:
    """The hub tensors in one tensor, and the rule that took it apart, in words."""
    for stacked in view.stacked:
        wild = patterns.match(stacked.name, hub)
        if wild is not None and len(shape) == 3 and shape[1] % len(stacked.parts) == 0:
            return _unstack(name, shape, stacked, wild), f"{stacked.name}: one tensor an expert"
    if len(shape) >= 2 and patterns.matches_any(view.swapped, hub):
        turned = (*shape[:-2], shape[-1], shape[-2])
        return {hub: Piece(name, turned, swapped=True)}, "last two dimensions exchanged"
    return {hub: Piece(name, shape)}, None


def _unstack(name: str, shape: Shape, stacked: Stacked, wild: tuple[str, ...]) -> dict[str, Piece]:
    experts, total, columns = shape
    rows = total // len(stacked.parts)
    pieces = {}
    for expert in range(experts):
        for place, part in enumerate(stacked.parts):
            start = place * rows
            hub = patterns.fill(part, (*wild, str(expert)))
            pieces[hub] = Piece(name, (rows, columns), expert, start, start + rows)
    return pieces


def parse_version(text: str) -> Version:
    """`"4.57.1"` as numbers; `.dev0` and the like are left out.

    Raises `PlanError` where the text is no version.
    """
    found = re.match(r"\d+(\.\d+)*", text.strip())
    if found is None:
        raise PlanError(
            f"{text!r} is no version of transformers.", hint="Write it as in 4.57.1 or 5.23."
        )
    return tuple(int(part) for part in found.group().split("."))
