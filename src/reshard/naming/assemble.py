"""Builds the tensors of one layout out of another's, piece by piece, touching no byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from reshard.core import rearrange
from reshard.core.tensors import Box, Entry, Fragment
from reshard.naming.layouts import Piece


class Assembler:
    """Cuts hub tensors out of a source's `entries` (by the pieces' names) and joins them."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = entries
        self._experts: dict[str, list[Entry]] = {}

    def build(self, name: str, wanted: Sequence[tuple[Piece, Piece]]) -> Entry:
        """The tensor `name` out of (its piece, the source's piece) for each hub tensor in it.

        Where the source stacks as the target does, its tensor goes through whole.
        """
        target, source = wanted[0]
        if target.expert is None:
            entry = self._take(source, swapped=target.swapped)
        elif all(one._replace(name=source.name) == other for one, other in wanted):
            entry = self._entries[source.name]
        else:
            entry = self._stack(wanted)
        return replace(entry.renamed(name), aliases=())

    def _take(self, piece: Piece, *, swapped: bool = False) -> Entry:
        """One hub tensor; `swapped`: with its last two dimensions exchanged."""
        entry = self._entries[piece.name]
        if piece.expert is not None:
            row = self._expert(piece.name, piece.expert)
            rows, columns = row.spec.shape
            box = Box((rows, columns), (piece.start, 0), (piece.stop - piece.start, columns))
            entry = rearrange.crop(row, box)
        if piece.swapped != swapped:
            dims = len(entry.spec.shape)
            entry = rearrange.transpose(entry, dims - 2, dims - 1)
        return entry

    def _stack(self, wanted: Sequence[tuple[Piece, Piece]]) -> Entry:
        experts: dict[int, list[tuple[int, Piece]]] = {}
        for target, source in wanted:
            experts.setdefault(target.expert or 0, []).append((target.start, source))
        rows = []
        for expert in sorted(experts):
            ordered = sorted(experts[expert], key=lambda item: item[0])
            rows.append(rearrange.concat([self._take(piece) for _, piece in ordered], 0))
        return rearrange.stack(rows)

    def _expert(self, name: str, expert: int) -> Entry:
        """One expert of a stacked tensor. Each stack is taken apart once, fragment by fragment:
        cutting 128 experts out of 64 ranks' ranges one by one would look at 8,192 overlaps.
        """
        if name not in self._experts:
            self._experts[name] = _unstack(self._entries[name])
        return self._experts[name][expert]


def _unstack(entry: Entry) -> list[Entry]:
    entry = rearrange.unflatten(entry)
    holders: list[list[Fragment]] = [[] for _ in range(entry.spec.shape[0])]
    for fragment in entry.fragments:
        first = fragment.box.offsets[0]
        for row in range(first, first + fragment.box.sizes[0]):
            holders[row].append(fragment)
    return [
        rearrange.select(replace(entry, fragments=tuple(fragments)), row)
        for row, fragments in enumerate(holders)
    ]
