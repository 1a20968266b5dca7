"""A pipeline's layers, which go by their numbers, as the layers of the base's model.

    0.weight [V, h]                    model.embed_tokens.weight         before the blocks, by shape
    2.self_attn.q_proj.weight          model.layers.0.self_attn.q_proj.weight
    3.layer.self_attn.q_proj.weight    model.layers.1....                in a module of the user's
    5.weight [h]                       model.norm.weight                 after the blocks
    6.lm_head.weight [V, h]            lm_head.weight                    by its name
    tied_modules.embed.weight [V, h]   model.embed_tokens.weight         shared by layers

A layer that holds tensors of one of the base's blocks, by their names there and in their shapes, is
a block, the first of them block 0. What is left is matched by its name's end, or else by the side
of the blocks that it is on, its shape and whether it is a weight or a bias. Each must have exactly
one match. Nothing but names and shapes is known, so layers of other classes than the base's, which
name their tensors otherwise, are refused. DeepSpeed's `PipelineModule` has such names, and
`nn.Sequential`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec import Struct

from reshard.core.arrangement import Arrangement, Whole
from reshard.core.regex import regex
from reshard.core.tensors import Shape
from reshard.errors import NamesError, listed
from reshard.naming.schema import Schema, is_constant, is_unheld
from reshard.naming.search import unwrap, unwrapped
from reshard.naming.ties import is_head

_NUMBERED = regex(r"(\d{1,6})\.(.+)")
_TIED = regex(r"tied_modules\.[^.]+\.(.+)")
# The first number of a name: experts have numbers within a block.
_BLOCK = regex(r"((?:[^.]+\.)*?)(\d{1,6})\.(.+)")
# Parts of the names of tensors before the first block; those of heads and norms come after.
_BEFORE = regex(r"(^|\.)(\w*embed\w*|wte|wpe)\.")
_HEAD = "lm_head.weight"
_LISTED = 6
# Tensors outside of the blocks that are compared with all of the base's: models have a dozen.
_MOST_OUTSIDE = 256

_Tensors = dict[str, Shape]


class Sequence(Struct, frozen=True):
    """The hub's tensors as those of a sequence of layers; `rule` says in words what was done."""

    outputs: Mapping[str, Arrangement]
    rule: str


def is_sequence(names: Iterable[str], schema: Schema) -> bool:
    """Whether every tensor goes by a layer's number, and none of the base's does."""
    plain = unwrapped(names)
    return (
        any(map(_NUMBERED.fullmatch, plain))
        and all(_NUMBERED.fullmatch(name) or _TIED.fullmatch(name) for name in plain)
        and not any(map(_NUMBERED.fullmatch, schema.specs))
    )


def arrangements(shapes: Mapping[str, Shape], schema: Schema) -> Sequence:
    """The hub's names of a sequence's tensors.

    Raises `NamesError` where the layers are not the base's, or a tensor has no place or several.
    """
    layers: dict[int, dict[str, str]] = {}
    rest: list[tuple[bool, str, str]] = []
    for own in shapes:
        match, tied = _NUMBERED.fullmatch(unwrap(own)), _TIED.fullmatch(unwrap(own))
        if match is not None:
            layers.setdefault(int(match[1]), {})[match[2]] = own
        elif tied is not None:  # the layer that has it first comes before the others
            rest.append((True, tied[1], own))
    blocks, outside = _of_base(schema)
    names: dict[str, str] = {}
    places = _places(layers, shapes, blocks)
    for number, held in sorted(layers.items()):
        if number in places:
            index, start = places[number]
            prefix = blocks.prefix
            names |= {f"{prefix}{index}.{k.removeprefix(start)}": own for k, own in held.items()}
        else:
            before = number < min(places)
            rest += [(before, key, own) for key, own in held.items()]
    names |= _matched(rest, shapes, outside)
    of = f"{len(places)} of {len(layers)} layers are blocks"
    rule = f"the numbers of a pipeline's layers -> the hub's names ({of})"
    return Sequence({name: Whole(own) for name, own in names.items()}, rule)


class _Blocks(Struct, frozen=True):
    """The base's blocks: what their names begin with, and each block's tensors."""

    prefix: str
    tensors: tuple[_Tensors, ...]


def _of_base(schema: Schema) -> tuple[_Blocks, _Tensors]:
    """The blocks of the base, and what lies outside of them."""
    blocks: dict[str, dict[int, _Tensors]] = {}
    outside: _Tensors = {}
    for name, spec in schema.specs.items():
        if is_constant(name, schema.config) or is_unheld(name, schema.config):
            continue
        match = _BLOCK.fullmatch(name)
        if match is None:
            outside[name] = spec.shape
        else:
            blocks.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = spec.shape
    counted = [p for p, of in blocks.items() if of.keys() == set(range(len(of)))]
    if len(counted) != 1 or len(blocks) != 1:
        raise NamesError(
            "its tensors are named by layer numbers, but the base has "
            + (f"several kinds of layers ({listed(blocks)})." if blocks else "none."),
            hint=_WITHOUT,
        )
    layers = blocks[counted[0]]
    return _Blocks(counted[0], tuple(layers[n] for n in sorted(layers))), outside


_WITHOUT = (
    "Convert it without --base: the tensors keep their names, by which a script of yours can "
    "rename them."
)


def _places(
    layers: Mapping[int, Mapping[str, str]], shapes: Mapping[str, Shape], blocks: _Blocks
) -> dict[int, tuple[int, str]]:
    """The block that a layer is, and what its own names begin with, by the layer's number."""
    places: dict[int, tuple[int, str]] = {}
    for number, held in sorted(layers.items()):
        index = len(places)
        wanted = blocks.tensors[min(index, len(blocks.tensors) - 1)]
        start = next((s for s in _starts(held) if _is_block(held, shapes, wanted, s)), None)
        if start is not None:
            places[number] = (index, start)
    if len(places) != len(blocks.tensors):
        raise NamesError(
            f"{len(places)} of its {len(layers)} layers hold tensors that a block of the base has, "
            f"by their names and shapes; the base has {len(blocks.tensors)} blocks. Layer "
            f"{_largest(layers)} holds {listed(layers[_largest(layers)], _LISTED)}; a block "
            f"{listed(blocks.tensors[0], _LISTED)}.",
            hint=f"Check that --base is the model that the training started from. {_WITHOUT}",
        )
    return places


def _largest(layers: Mapping[int, Mapping[str, str]]) -> int:
    return max(layers, key=lambda number: len(layers[number]))


def _starts(layer: Mapping[str, str]) -> list[str]:
    """What a wrapping module may have put before all names of a layer."""
    starts = [""]
    split = [key.split(".") for key in layer]
    for parts in zip(*(key[:-1] for key in split), strict=False):
        if len(set(parts)) > 1:
            break
        starts.append(f"{starts[-1]}{parts[0]}.")
    return starts


def _is_block(
    layer: Mapping[str, str], shapes: Mapping[str, Shape], block: _Tensors, start: str
) -> bool:
    """Whether more than half of a layer's tensors, two at least, are a block's."""
    same = sum(block.get(key.removeprefix(start)) == shapes[own] for key, own in layer.items())
    return same > 1 and 2 * same > len(layer)


def _matched(
    rest: list[tuple[bool, str, str]], shapes: Mapping[str, Shape], outside: _Tensors
) -> dict[str, str]:
    """The names of what lies outside of the blocks."""
    matches: dict[str, str] = {}
    unknown = []
    for by_name in (True, False) if len(rest) <= _MOST_OUTSIDE else ():
        left = []
        for before, key, own in rest:
            free = [name for name in outside if name not in matches]
            fits = [
                name
                for name in free
                if (_ends_alike(key, name) if by_name else _side(name) is before)
                and name.rpartition(".")[2] == key.rpartition(".")[2]
                and _alike(shapes[own], outside[name])
            ]
            if len(fits) == 1:
                matches[fits[0]] = own
            else:
                left.append((before, key, own))
        rest = left
    embeddings = {shape for name, shape in outside.items() if _side(name)}
    for before, _, own in rest:
        # A head of its own, of a base that has none because it is tied.
        headless = not before and _HEAD not in matches and _HEAD not in outside
        if headless and shapes[own] in embeddings:
            matches[_HEAD] = own
        else:
            unknown.append(f"{own} {list(shapes[own])}")
    if unknown:
        free = [f"{name} {list(shape)}" for name, shape in outside.items() if name not in matches]
        raise NamesError(
            f"{len(unknown)} tensors outside of the blocks fit none or several of the base's: "
            f"{listed(unknown, _LISTED)}; the base's are {listed(free, _LISTED)}.",
            unexpected=tuple(unknown),
            hint=_WITHOUT,
        )
    return matches


def _ends_alike(key: str, name: str) -> bool:
    """Whether one of two names, of two parts at least, ends as the other."""
    shorter, longer = sorted((key, name), key=len)
    return "." in shorter and f".{longer}".endswith(f".{shorter}")


def _side(name: str) -> bool:
    """Whether a tensor of the base comes before its blocks."""
    return not is_head(name) and _BEFORE.search(name) is not None


def _alike(mine: Shape, theirs: Shape) -> bool:
    """Whether two shapes are equal; matrices may differ in rows, which are a vocabulary's."""
    return mine == theirs or (len(mine) == len(theirs) == 2 and mine[1] == theirs[1])
