"""From the hub's names to torchtitan's: the tables of `naming.titan`, read backwards.

Each tensor goes by its names of all versions, which are names of the same bytes; experts are
stacked, and Llama's queries and keys turned back. A tied head is one more name of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from reshard.core import rearrange
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Box, Entry, Fragment
from reshard.errors import NamesError, UnsupportedError
from reshard.naming import patterns
from reshard.naming.megatron import EMBEDDING, MTP_COPIES
from reshard.naming.mismatch import no_place
from reshard.naming.schema import is_constant, is_unheld, says_tied
from reshard.naming.titan import FAMILIES, NAMES, Family, every_nth, reordered

_EMBEDDING, _HEAD = "tok_embeddings.weight", "lm_head.weight"
# Experts, columns, gate and up side by side.
_STACKED_DIMS = 3


class Into(Struct, frozen=True):
    """A model by torchtitan's names.

    `left_out`: layers for multi-token prediction. `copies`: tensors that torchtitan shares, each
    with the one whose copy it must be. `sources`: for each of `entries` the tensors that it is made
    of, by the hub's names.
    """

    entries: Mapping[str, Entry]
    left_out: tuple[str, ...]
    copies: Mapping[str, str]
    sources: Mapping[str, tuple[str, ...]]


def into(
    entries: Mapping[str, Entry], config: Mapping[str, Any], *, whose: str = "torchtitan's model"
) -> Into:
    """A model's tensors, by the hub's names, by torchtitan's; errors call the model `whose`.

    Raises `UnsupportedError` for a family whose names there are not known, `NamesError` where
    tensors have no place or experts are missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"reshard knows torchtitan's names for {', '.join(FAMILIES)}, not for {kind!r}.",
            hint="Import it with torchtitan's own conversion from Hugging Face.",
        )
    family = FAMILIES[kind]
    rules = (*family.names, *NAMES)
    made: dict[str, Entry] = {}
    stacks: dict[tuple[str, ...], dict[int, Entry]] = {}
    made_of: dict[str, list[str]] = {}
    unknown, left_out = [], []
    copies: dict[str, str] = {}
    for full, entry in entries.items():
        name, shared = full.removeprefix(family.prefix), _shared(full, config)
        if shared is not None:
            copies[full] = shared if shared in entries else EMBEDDING
        elif is_unheld(name, config) and not (
            _in_layer(name) is not None and _holds_layers(family)
        ):
            left_out.append(full)
        elif not is_constant(name, config):
            names = _names(name, rules, config)
            place = None if names else _expert(name, family, config)
            joined = _joined(name, family)
            if joined:
                for at, here in enumerate(joined):
                    _add(made, here, _side(entry, at, len(joined)))
                    made_of[here[0]] = [full]
            elif place is not None:
                stacks.setdefault(place[0], {})[place[1]] = entry
                made_of.setdefault(place[0][0], []).append(full)
            elif names:
                _add(made, names, reordered(name, entry, config, family, turn_back))
                made_of[names[0]] = [full]
            else:
                unknown.append(full)
    if unknown:
        raise no_place(unknown, whose)
    for names, experts in stacks.items():
        _add(made, names, _stacked(names[0], experts))
    if _HEAD not in _all(made) and _EMBEDDING in made and says_tied(config):
        tied = made[_EMBEDDING]
        heads = _names(_HEAD, rules, config)
        made[_EMBEDDING] = tied.aliased((*tied.aliases, *heads))
    sources = {name: tuple(of) for name, of in made_of.items()}
    return Into(made, tuple(left_out), copies, sources)


def _all(entries: Mapping[str, Entry]) -> set[str]:
    return {name for entry in entries.values() for name in entry.names}


def _names(
    hub: str, rules: tuple[tuple[str, str], ...], config: Mapping[str, Any]
) -> tuple[str, ...]:
    """What torchtitan's versions call a tensor of the hub, none where they have none."""
    found = (patterns.rewrite(hub, [rule]) for rule in rules)
    names = (_numbered(name, config) for name, rule in found if rule is not None)
    return tuple(dict.fromkeys(names))


def _numbered(name: str, config: Mapping[str, Any]) -> str:
    """Layers after the last, which are for multi-token prediction, by their own numbers."""
    wild = patterns.match("layers.*.**", name)
    layers = config.get("num_hidden_layers")
    if wild is None or not wild[0].isdecimal() or not isinstance(layers, int):
        return name
    if int(wild[0]) < layers:
        return name
    return f"mtp_layers.{int(wild[0]) - layers}.{wild[1]}"


def _in_layer(name: str) -> str | None:
    """What a tensor of the hub is called within its numbered layer; None of any other."""
    wild = patterns.match("model.layers.*.**", name)
    return None if wild is None else wild[1]


def _holds_layers(family: Family) -> bool:
    """Whether torchtitan's model of this family has layers for multi-token prediction."""
    return any(here.endswith(".mtp_norm.weight") for _, here in family.names)


def _shared(name: str, config: Mapping[str, Any]) -> str | None:
    """What a tensor of a layer for multi-token prediction is a copy of, if it is one."""
    own = MTP_COPIES.get(_in_layer(name) or "")
    return own if own is not None and is_unheld(name, config) else None


def _joined(hub: str, family: Family) -> tuple[tuple[str, ...], ...]:
    """For each part of a tensor of the hub, what torchtitan's versions call it."""
    found = [
        tuple(here.replace("*", wild[0]) for here in parts)
        for pattern, parts in family.joined
        if (wild := patterns.match(pattern, hub)) is not None
    ]
    return tuple(zip(*found, strict=True))


def _side(entry: Entry, at: int, count: int) -> Entry:
    """One of the parts that lie side by side in the last of three dimensions, exchanged."""
    shape = entry.spec.shape
    if len(shape) != _STACKED_DIMS or shape[2] % count:
        raise NamesError(
            f"its shape is {shape}, which cannot be split into gate and up.", tensor=entry.spec.name
        )
    width = shape[2] // count
    part = rearrange.crop(entry, Box(shape, (0, 0, at * width), (*shape[:2], width)))
    return rearrange.transpose(part, 1, 2)


def _expert(
    hub: str, family: Family, config: Mapping[str, Any]
) -> tuple[tuple[str, ...], int] | None:
    """The names of the stack that an expert's tensor is in, and its number."""
    names = []
    number = ""
    for pattern, here in family.experts:
        wild = patterns.match(pattern.replace("{}", "*"), hub)
        if wild is not None and wild[1].isdecimal():
            names.append(_numbered(here.replace("*", wild[0]), config))
            number = wild[1]
    return (tuple(names), int(number)) if names else None


def _add(entries: dict[str, Entry], names: tuple[str, ...], entry: Entry) -> None:
    entries[names[0]] = entry.renamed(names[0]).aliased(names[1:])


def _stacked(name: str, experts: Mapping[int, Entry]) -> Entry:
    lacking = sorted(set(range(max(experts) + 1)) - experts.keys())
    if lacking:
        raise NamesError(f"expert {lacking[0]} is missing.", tensor=name)
    return rearrange.stack([experts[number] for number in range(len(experts))])


def turn_back(entry: Entry, heads: int) -> Entry:
    """Rows `(head, half, pair)` of queries or keys as rows `(head, pair, half)`.

    A head of four rows, 0 1 2 3, becomes 0 2 1 3. No byte moves: the two rows of a pair are one
    part of the output where they are in one part of the input.
    """
    rows = entry.spec.shape[0]
    if rows % (2 * heads):
        raise NamesError(f"its {rows} rows are not {heads} heads of pairs.", tensor=entry.spec.name)
    half = rows // heads // 2
    fragments: list[Fragment] = []
    for fragment in rearrange.unflatten(entry).fragments:
        fragments += _pairs(fragment, half)
    return Entry(entry.spec, tuple(fragments), entry.kind)


def _pairs(fragment: Fragment, half: int) -> Iterator[Fragment]:
    """A part of the input, row by row or in pairs of rows, as parts of the output."""
    box = fragment.box
    first, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    strides = fragment.strides or contiguous_strides(box.sizes)
    tail, sizes = box.offsets[1:], box.sizes[1:]
    for row in range(first, end):
        head, at = divmod(row, 2 * half)
        upper, pair = divmod(at, half)
        if upper and row - half >= first:
            continue  # it came with the other row of its pair
        count = 1 if upper or row + half >= end else 2
        one = rearrange.cut(fragment, Box(box.shape, (row, *tail), (1, *sizes)))
        place = (2 * half * head + 2 * pair + upper, *tail)
        yield every_nth(one, fragment, Box(box.shape, place, (count, *sizes)), strides, half)
