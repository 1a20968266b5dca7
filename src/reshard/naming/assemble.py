"""Builds the base's tensors out of the source's, along a complete candidate of the search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from reshard import rearrange
from reshard.naming.layouts import Piece
from reshard.tensors import Box, Entry


def take(piece: Piece, entries: Mapping[str, Entry], *, swapped: bool = False) -> Entry:
    """One hub tensor, cut out of the source's tensor; `swapped`: with its last dims exchanged."""
    entry = entries[piece.name]
    if piece.expert is not None:
        _, rows, columns = entry.spec.shape
        box = Box((rows, columns), (piece.start, 0), (piece.stop - piece.start, columns))
        entry = rearrange.crop(rearrange.select(entry, piece.expert), box)
    if piece.swapped != swapped:
        dims = len(entry.spec.shape)
        entry = rearrange.transpose(entry, dims - 2, dims - 1)
    return entry


def build(name: str, wanted: Sequence[tuple[Piece, Piece]], entries: Mapping[str, Entry]) -> Entry:
    """The base's tensor `name` out of (its piece, the source's piece) for each hub tensor in it.

    `entries` are by the source pieces' names. Where the source stacks as the base does, its
    tensor goes through whole.
    """
    first_base, first_source = wanted[0]
    same = all(_same_place(base, source, first_source.name) for base, source in wanted)
    if first_base.expert is None:
        entry = take(first_source, entries, swapped=first_base.swapped)
    elif same:
        entry = entries[first_source.name]
    else:
        entry = _stack(wanted, entries)
    return replace(entry.renamed(name), aliases=())


def _same_place(base: Piece, source: Piece, name: str) -> bool:
    return source.name == name and base._replace(name=name) == source


def _stack(wanted: Sequence[tuple[Piece, Piece]], entries: Mapping[str, Entry]) -> Entry:
    experts: dict[int, list[tuple[int, Piece]]] = {}
    for base, source in wanted:
        experts.setdefault(base.expert or 0, []).append((base.start, source))
    rows = []
    for expert in sorted(experts):
        ordered = sorted(experts[expert], key=lambda item: item[0])
        rows.append(rearrange.concat([take(piece, entries) for _, piece in ordered], 0))
    return rearrange.stack(rows)
