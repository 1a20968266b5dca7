"""Builds the tensors of one layout from another's, piece by piece."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from reshard.core.arrangement import Arrangement, Concat, Crop, Select, Stack, Transpose, Whole
from reshard.core.tensors import Box, Shape
from reshard.naming.layouts import Piece


class Assembler:
    """Cuts hub tensors out of a source's tensors and joins them.

    `shapes` are the source's, by the names of its pieces; `owners` the names for them in the
    arrangements.
    """

    def __init__(self, shapes: Mapping[str, Shape], owners: Mapping[str, str]) -> None:
        self._shapes = shapes
        self._owners = owners

    def arrange(self, pairs: Sequence[tuple[Piece, Piece]]) -> Arrangement:
        """One tensor out of (its piece, the source's piece) for each hub tensor in it.

        Where the source stacks as the output does, its tensor goes through whole.
        """
        place, source = pairs[0]
        if place.expert is None:
            return self._take(source, swapped=place.swapped)
        if all(replace(one, name=source.name) == other for one, other in pairs):
            return Whole(self._owners[source.name])
        return self._stack(pairs)

    def _take(self, piece: Piece, *, swapped: bool = False) -> Arrangement:
        """One hub tensor; `swapped`: with its last two dimensions exchanged."""
        shape = self._shapes[piece.name]
        taken: Arrangement = Whole(self._owners[piece.name])
        if piece.expert is not None:
            _, total, columns = shape
            taken, shape = Select(taken, piece.expert), (total, columns)
            if (piece.start, piece.stop) != (0, total):
                box = Box(shape, (piece.start, 0), (piece.stop - piece.start, columns))
                taken = Crop(taken, box)
        if piece.swapped != swapped:
            taken = Transpose(taken, len(shape) - 2, len(shape) - 1)
        return taken

    def _stack(self, pairs: Iterable[tuple[Piece, Piece]]) -> Arrangement:
        experts: dict[int, list[tuple[int, Piece]]] = {}
        for place, source in pairs:
            experts.setdefault(place.expert or 0, []).append((place.start, source))
        rows = []
        for expert in sorted(experts):
            ordered = sorted(experts[expert], key=lambda item: item[0])
            parts = tuple(self._take(piece) for _, piece in ordered)
            rows.append(parts[0] if len(parts) == 1 else Concat(parts, 0))
        return Stack(tuple(rows))
