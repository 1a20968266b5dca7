"""From the hub's names to torchtitan's: the tables of `naming.titan`, read backwards.

Each tensor goes by its names of all versions, which are names of the same bytes; experts are
stacked, and Llama's queries and keys turned back. A tied head is one more name of the embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from reshard.core import rearrange
from reshard.core.tensors import Box, Entry, Fragment, contiguous_strides
from reshard.errors import NamesError, UnsupportedError
from reshard.naming import patterns
from reshard.naming.mismatch import no_place
from reshard.naming.schema import is_constant, is_unheld, says_tied
from reshard.naming.titan import EXPERTS, FAMILIES, NAMES, every_nth, reordered

_EMBEDDING, _HEAD = "tok_embeddings.weight", "lm_head.weight"


class Into(Struct, frozen=True):
    """A model by torchtitan's names. `left_out`: layers for multi-token prediction."""

    entries: Mapping[str, Entry]
    left_out: tuple[str, ...]


def into(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Into:
    """A model's tensors, by the hub's names, by torchtitan's.

    Raises `UnsupportedError` for a family whose names there are not known, `NamesError` where
    tensors have no place or experts are missing.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise UnsupportedError(
            f"torchtitan's names are known of {', '.join(FAMILIES)}, not of {kind!r}.",
            hint="Import it with torchtitan's own conversion from Hugging Face.",
        )
    family = FAMILIES[kind]
    rules = (*family.names, *NAMES)
    made: dict[str, Entry] = {}
    stacks: dict[tuple[str, ...], dict[int, Entry]] = {}
    unknown, left_out = [], []
    for name, entry in entries.items():
        if is_unheld(name, config):
            left_out.append(name)
        elif not is_constant(name, config):
            names = _names(name, rules)
            place = None if names else _expert(name)
            if place is not None:
                stacks.setdefault(place[0], {})[place[1]] = entry
            elif names:
                _add(made, names, reordered(name, entry, config, family, turn_back))
            else:
                unknown.append(name)
    if unknown:
        raise no_place(unknown, "torchtitan's model")
    for names, experts in stacks.items():
        _add(made, names, _stacked(names[0], experts))
    if _HEAD not in _all(made) and _EMBEDDING in made and says_tied(config):
        tied = made[_EMBEDDING]
        heads = _names(_HEAD, rules)
        made[_EMBEDDING] = tied.aliased((*tied.aliases, *heads))
    return Into(made, tuple(left_out))


def _all(made: Mapping[str, Entry]) -> set[str]:
    return {name for entry in made.values() for name in entry.names}


def _names(hub: str, rules: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """What torchtitan's versions call a tensor of the hub, none where they have none."""
    found = (patterns.rewrite(hub, [rule]) for rule in rules)
    return tuple(dict.fromkeys(name for name, rule in found if rule is not None))


def _expert(hub: str) -> tuple[tuple[str, ...], int] | None:
    """The names of the stack that an expert's tensor is in, and its number."""
    names = []
    number = ""
    for pattern, here in EXPERTS:
        wild = patterns.match(pattern.replace("{}", "*"), hub)
        if wild is not None and wild[1].isdigit():
            names.append(here.replace("*", wild[0]))
            number = wild[1]
    return (tuple(names), int(number)) if names else None


def _add(made: dict[str, Entry], names: tuple[str, ...], entry: Entry) -> None:
    made[names[0]] = entry.renamed(names[0]).aliased(names[1:])


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
