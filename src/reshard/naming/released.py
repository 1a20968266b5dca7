"""The layout of released models: whether files have it, and their tensors in it.

transformers 5 saves some families with names or an orientation that differ from their releases.
Engines expect those of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from reshard.core.tensors import Entry, Shape
from reshard.errors import OptionError, PlanError
from reshard.naming import patterns
from reshard.naming.assemble import Assembler
from reshard.naming.layouts import Piece, parse_version
from reshard.naming.memory import hub_pieces, is_bare
from reshard.naming.name_map import apply
from reshard.naming.schema import is_backbone, levels, views

# What transposes these tensors when it saves them: transformers since this version.
_TURNS = (5, 0)


class Unreleased(Struct, frozen=True):
    """How files differ from the release's: `moved` are tensors by other names, `stacked` those that
    a release has one by one, `turned` those whose last two dimensions are exchanged."""

    moved: tuple[str, ...] = ()
    stacked: tuple[str, ...] = ()
    turned: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """The differences in words, to follow "it has"."""
        parts = [
            f"{len(names)} tensors {what}, {names[0]!r} among them"
            for names, what in (
                (self.moved, "by other names"),
                (self.stacked, "that stack experts"),
                (self.turned, "with two dimensions exchanged"),
            )
            if names
        ]
        return " and ".join(parts)


def unreleased(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    pieces: Mapping[str, Piece] | None = None,
) -> Unreleased | None:
    """How a model's files differ from the released layout; None where they do not, or are of a
    class whose releases are not known. `pieces` are the model's `hub_pieces`, where they are at
    hand."""
    if is_backbone(config) or is_bare(shapes, config):
        return None
    stacked, turned, moved = dict[str, None](), [], []
    for hub, piece in _pieces(shapes, config, pieces).items():
        if piece.expert is not None:
            stacked[piece.name] = None
        elif piece.swapped:
            turned.append(piece.name)
        elif hub != piece.name:
            moved.append(piece.name)
    if not (stacked or turned or moved):
        return None
    return Unreleased(tuple(moved), tuple(stacked), tuple(turned))


def undecided(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors whose orientation neither the shapes nor the config show.

    If the shapes do not show it, the transformers version that the config states decides.
    """
    found = _swappable(shapes, config)
    told = not found or _are_told(shapes, found, config) or _saved_by(config) is not None
    return () if told else found


def to_hub(
    entries: Mapping[str, Entry], config: Mapping[str, Any]
) -> tuple[dict[str, Entry], dict[str, object]]:
    """A model's tensors in the released layout, and what the config must say so that the layout
    can be told from it.

    Raises `PlanError` where their orientation cannot be told.
    """
    shapes = {name: entry.spec.shape for name, entry in entries.items()}
    unknown = undecided(shapes, config)
    if unknown:
        raise PlanError(
            f"reshard cannot tell the orientation of {len(unknown)} stacked tensors: their shapes "
            "leave it open, and config.json does not state the version of transformers that "
            "saved them.",
            tensor=unknown[0],
            hint="Write the version into the base's config.json, as transformers_version.",
        )
    assembler = Assembler(shapes, {name: name for name in entries})
    pieces = hub_pieces(shapes, config) if is_bare(shapes, config) else _pieces(shapes, config)
    outputs = {
        hub: assembler.arrange([(Piece(hub, piece.shape), piece)]) for hub, piece in pieces.items()
    }
    by_version = any(piece.swapped for piece in pieces.values()) and _by_version(shapes, config)
    return apply(outputs, entries), {"transformers_version": "4.57.0"} if by_version else {}


def _pieces(
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    known: Mapping[str, Piece] | None = None,
) -> dict[str, Piece]:
    pieces = hub_pieces(shapes, config) if known is None else dict(known)
    if _by_version(shapes, config):
        for hub in _swappable(shapes, config):
            *outer, rows, columns = pieces[hub].shape
            pieces[hub] = replace(pieces[hub], shape=(*outer, columns, rows), swapped=True)
    return pieces


def _by_version(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> bool:
    """Whether tensors are transposed, judged by the transformers version that the config states."""
    found = _swappable(shapes, config)
    version = _saved_by(config)
    untold = bool(found) and not _are_told(shapes, found, config)
    return untold and version is not None and version >= _TURNS


def _swappable(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that some layout in memory of this model turns."""
    layouts = {layout for view in views(config, guess=False) for layout in view.layouts}
    swapped = [pattern for layout in layouts for pattern in layout.swapped]
    return tuple(name for name in shapes if patterns.matches_any(swapped, name))


def _are_told(
    shapes: Mapping[str, Shape], names: tuple[str, ...], config: Mapping[str, Any]
) -> bool:
    """Whether shapes tell the orientation: the width is stated, and some tensor is not square."""
    stated = any("hidden_size" in level for level in levels(config))
    return stated and any(shapes[name][-1] != shapes[name][-2] for name in names)


def _saved_by(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    try:
        return parse_version(str(config.get("transformers_version", "")))
    except OptionError:
        return None
