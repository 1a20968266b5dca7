"""The names and shapes that a loaded model has: from files, for `dcp.load` into a running model.

The files are read as the hub's layout (or as the memory layout they were dumped in), and the hub
tensors are placed in the layout of the requested transformers version: experts stacked, names
moved, the tied head added, since the state dict of a loaded model holds it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

from reshard.core.arrangement import Arrangement
from reshard.core.tensors import Entry, Shape
from reshard.errors import PlanError, UnsupportedError
from reshard.naming import families, patterns, ties
from reshard.naming.assemble import Assembler
from reshard.naming.beginnings import Beginnings
from reshard.naming.layouts import Piece, Stacked, Version, View
from reshard.naming.name_map import apply
from reshard.naming.readings import Below, Effects, Names, Reading
from reshard.naming.schema import (
    backbone_part,
    bare_layout,
    classes_of,
    family,
    is_backbone,
    is_unheld,
    levels,
    text_config,
    views,
)

#: The oldest and the newest transformers version whose layouts were read (`families.py`).
OLDEST: Version = (4, 49)
NEWEST: Version = (5, 23)

# Classes that hold an output head, by the ends of their names in config.json's `architectures`.
_GENERATING = (
    "ForCausalLM", "ForConditionalGeneration", "LMHeadModel", "DoubleHeadsModel", "MTModel",
    "ForMaskedLM", "ForSpeechToText", "ForTextToText", "EncoderDecoderModel",
)  # fmt: skip


def to_memory(
    entries: Mapping[str, Entry], config: Mapping[str, Any], version: Version = NEWEST
) -> dict[str, Entry]:
    """The tensors of a model's files as a loaded model of that transformers version names them.

    `entries` are by the names in the files, `config` is the parsed `config.json`.

    Raises `UnsupportedError` where that version has no such model, `PlanError` where the files
    hold only some experts of a layer.
    """
    shapes = {name: entry.spec.shape for name, entry in entries.items()}
    return apply(memory_outputs(shapes, config, version), entries)


def memory_outputs(
    shapes: Mapping[str, Shape], config: Mapping[str, Any], version: Version
) -> dict[str, Arrangement]:
    """What makes each tensor of the loaded model, by the names in the files; raises as `to_memory`
    does."""
    placed = placed_pieces(pieces_of(shapes, config), config, memory_view(config, version))
    assembler = Assembler(shapes, {name: name for name in shapes})
    return {name: assembler.arrange(pairs) for name, pairs in placed.items()}


def pieces_of(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Mapping[str, Piece]:
    """Where each hub tensor lies in a model's files, given by names and shapes."""
    return _read(shapes, config).pieces


def hub_pieces(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, Piece]:
    """Where each tensor lies, by the hub's name, in files that may be in a layout in memory."""
    pieces = _towers(pieces_of(shapes, config), config)
    # The rules of the language model's layouts name its modules wherever they stand.
    text = family(text_config(config).get("model_type"))
    inner = [View((layout,)) for layout in text.layouts] if text is not None else []
    found = {}
    for hub, piece in pieces.items():
        for view in inner if hub.startswith(families.TOWER_PARTS) else ():
            hub = view.name_here(hub)
        found[hub] = piece
    return found


def placed_pieces(
    stored: Mapping[str, Piece], config: Mapping[str, Any], view: View
) -> dict[str, list[tuple[Piece, Piece]]]:
    """The tensors that a loaded model of this layout has, each with the pieces that make it: where
    one lies in the module, where it lies in the files (`stored`)."""
    pieces = _towers(_held(stored, config), config)
    _add_tied(pieces, config)
    placed: dict[str, list[tuple[Piece, Piece]]] = {}
    for hub, piece in _place({hub: piece.shape for hub, piece in pieces.items()}, view).items():
        placed.setdefault(piece.name, []).append((piece, pieces[hub]))
    return placed


def memory_view(config: Mapping[str, Any], version: Version) -> View:
    """The layout that loaded models of this config have under that transformers version.

    Raises `UnsupportedError` where that version has no such model.
    """
    text = ".".join(map(str, version))
    found = unsupported(config, version)
    if found:
        raise UnsupportedError(
            f"transformers {text} loads {', '.join(sorted(found))} as models that split, join, "
            "permute or add to the tensors of the files, in ways that reshard does not know.",
            hint="Without --names memory the names are those of the files.",
        )
    view = memory_layout(config, version)
    if view is None:
        raise UnsupportedError(
            f"transformers {text} has no model of type {config.get('model_type')!r}.",
            hint="Name another version with --transformers-version.",
        )
    return view


def was_read(version: Version) -> bool:
    """Whether the layouts of this transformers version were read; else its neighbours' are taken.

    >>> was_read((5, 23, 1)), was_read((4, 48)), was_read((6,))
    (True, False, False)
    """
    return version >= OLDEST and version[:2] <= NEWEST


def memory_layout(config: Mapping[str, Any], version: Version) -> View | None:
    """The layout of that version's loaded models; None where the version has no such model."""
    loaded = [view for view in views(config, guess=False) if view.loads_as(version)]
    bare = is_backbone(config)
    loaded = [view for view in loaded if view.backbone == bare] or loaded
    return max(
        loaded, key=lambda view: [layout.since or () for layout in view.layouts], default=None
    )


def unsupported(config: Mapping[str, Any], version: Version) -> set[str]:
    """The model types and classes of the config that this version makes into tensors which are not
    known to be those of the files."""
    parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    kinds = {str(part.get("model_type")) for part in parts} if version >= (5,) else set()
    classes = set(classes_of(config))
    return (kinds & {*families.UNSUPPORTED}) | (classes & {*families.UNSUPPORTED_CLASSES})


def _read(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Reading:
    """Read files through the layout they are in: the hub's, or a loaded one that they were dumped
    in.

    A layout is theirs where each name is the one that it gives to the hub tensor read from it.
    """
    below = Below(Names(shapes))
    known = views(config, guess=False)
    if is_bare(shapes, config):
        known = tuple(View((bare_layout(config), *view.layouts)) for view in known[:1])
    best = below.read(below.templates.effects(known[0]))
    for view in known[1:]:
        if any(layout.since is None and not layout.released for layout in view.layouts):
            continue
        if (view.backbone and not is_backbone(config)) or _are_the_hubs(below.members, view):
            continue
        effects = below.templates.effects(view)
        if not any(effect.rules for effect in effects.changes()):
            continue
        reading = below.read(effects)
        if (
            not reading.misfits
            and sum(reading.rules.values()) > sum(best.rules.values())
            and _is_its_own(reading, view)
            and _orientation_is_right(reading, effects, config)
        ):
            best = reading
    return best


def is_bare(names: Container[str], config: Mapping[str, Any]) -> bool:
    """Whether the files of a class with a head were saved from its backbone: the embedding lies at
    the top."""
    part = backbone_part(config)
    bare = (name.removeprefix(f"{part}.") for name in ties.embeddings_in(part))
    return not is_backbone(config) and any(name in names for name in bare)


def _are_the_hubs(names: Iterable[str], view: View) -> bool:
    """Whether some name matches the hub's patterns more exactly than the layout's."""
    pairs = [pair for layout in view.layouts for pair in layout.names]
    hubs, here = [hub for hub, _ in pairs], [here for _, here in pairs]
    return any(patterns.exactness(hubs, name) > patterns.exactness(here, name) for name in names)


def _is_its_own(reading: Reading, view: View) -> bool:
    placed = _place({hub: piece.shape for hub, piece in reading.pieces.items()}, view)
    return all(placed[hub].name == piece.name for hub, piece in reading.pieces.items())


def _orientation_is_right(reading: Reading, effects: Effects, config: Mapping[str, Any]) -> bool:
    """Whether tensors that the layout transposes have, once transposed back, the hub's orientation.

    The model's width decides; with a square tensor or without a stated width, the files have the
    hub's.
    """
    if not any(effect.swapped for effect in effects.changes()):
        return True
    width = next((level["hidden_size"] for level in levels(config) if "hidden_size" in level), None)
    turned = False
    for hub, piece in reading.pieces.items():
        if piece.swapped:
            dim = next(d for pattern, d in families.WIDTHS if patterns.match(pattern, hub))
            other = piece.shape[-1] if dim == len(piece.shape) - 2 else piece.shape[-2]
            if piece.shape[dim] != width:
                return False
            turned = turned or other != width
    return turned


def _held(pieces: Mapping[str, Piece], config: Mapping[str, Any]) -> dict[str, Piece]:
    """The tensors that a loaded model holds: its state dict lacks what it computes."""
    return {
        hub: piece
        for hub, piece in pieces.items()
        if not is_unheld(hub, config) and not patterns.matches_any(families.CONSTANTS, hub)
    }


def _towers(pieces: Mapping[str, Piece], config: Mapping[str, Any]) -> dict[str, Piece]:
    """The hub's names of a CLIP or SigLIP tower, also where the files left `vision_model` out."""
    vision = config.get("vision_config")
    kind = vision.get("model_type") if isinstance(vision, Mapping) else None
    if kind not in families.TOWERS:
        return dict(pieces)
    every = (layout for view in views(config, guess=False) for layout in view.layouts)
    known = {hub for layout in every for hub, _ in layout.names}
    for outer in families.TOWER_PARTS:
        inner = f"{outer}vision_model."
        if f"{inner}**" in known and not any(hub.startswith(inner) for hub in pieces):
            pieces = {
                inner + hub.removeprefix(outer) if hub.startswith(outer) else hub: piece
                for hub, piece in pieces.items()
            }
    return dict(pieces)


def _add_tied(pieces: dict[str, Piece], config: Mapping[str, Any]) -> None:
    """Add the tensors that the files hold under another name only: a loaded model has them all."""
    # Of an encoder and a decoder that are models of their own, the decoder has the head.
    decoder = config.get("decoder")
    speaking = (decoder,) if isinstance(decoder, Mapping) else levels(config)
    stated = [level.get("tie_word_embeddings") for level in speaking]
    classes = [name for level in levels(config) for name in classes_of(level)]
    generates = not classes or any(name.endswith(_GENERATING) for name in classes)
    # Unstated means tied: the default of transformers' configs is left out of config.json.
    tied = True in stated or False not in stated
    found = ties.missing_parts(pieces, Beginnings(pieces))
    if generates:
        found |= ties.missing_heads(pieces, config.get("model_type"))
    for name, original in found.items():
        if tied or not ties.is_head(name):
            pieces[name] = pieces[original]


def _place(shapes: Mapping[str, Shape], view: View) -> dict[str, Piece]:
    """Where each hub tensor, given by name and shape, lies in a model of this layout."""
    stacked = [rule for layout in view.layouts for rule in layout.stacked]
    swapped = [pattern for layout in view.layouts for pattern in layout.swapped]
    groups: dict[str, list[tuple[int, int, str]]] = {}
    rules: dict[str, Stacked] = {}
    placed = {}
    for hub, shape in shapes.items():
        found = _stack_of(hub, stacked)
        if found is None:
            turned = len(shape) >= 2 and patterns.matches_any(swapped, hub)
            placed[hub] = Piece(view.name_here(hub), shape, swapped=turned)
        else:
            rule, name, expert, part = found
            groups.setdefault(name, []).append((expert, part, hub))
            rules[name] = rule
    for name, members in groups.items():
        here = view.name_here(name)
        width = len(rules[name].parts)
        for index, (expert, part, hub) in enumerate(sorted(members)):
            if (expert, part) != divmod(index, width) or len(members) % width:
                raise PlanError(
                    f"its experts are not numbered without gaps: {len(members)} tensors, "
                    f"{hub!r} in place {index}.",
                    tensor=name,
                )
            rows = shapes[hub][0]
            placed[hub] = Piece(here, shapes[hub], expert, part * rows, (part + 1) * rows)
    return placed


def _stack_of(hub: str, rules: list[Stacked]) -> tuple[Stacked, str, int, int] | None:
    """The stacked tensor that a hub tensor belongs in: rule, name, expert, place of the part."""
    for rule in rules:
        for place, part in enumerate(rule.parts):
            wild = patterns.match(part, hub)
            if wild is not None and wild[-1].isdecimal():
                return rule, patterns.fill(rule.name, wild[:-1]), int(wild[-1]), place
    return None
