"""Flat tensors, and what is cut out of them: described by numbers, not part by part.

    FlatSpace      one-dimensional tensors end to end        | flat 0 | flat 1 | flat 2 |
    Ranks          the flat space of each rank               all of them laid out alike
    Partition      a tensor cut into equal pieces, of which every rank has one, at the same place

                   start                      piece r of ceil(numel / ranks) elements is the
        rank 0     |...|a0 a0 a0|b0 b0|...    tensor's from r * piece on; those of the last ranks
        rank 1     |...|a1 a1 a1|b1 b1|...    are shorter, or empty

ZeRO-3 of 1,024 ranks cuts 70,000 tensors into 71.6 million pieces. As objects they would take 20 GB
and minutes; a `Partition` is three numbers, whose fragments are made for those who ask.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from itertools import accumulate

from reshard.core.dtypes import FLOAT32
from reshard.core.tensors import Entry, Extent, Fragment, Fragments, Shape, TensorSpec, flat
from reshard.errors import FormatError


class FlatSpace:
    """One-dimensional tensors as one run of elements, in the order given.

    `parts` are their fragments, contiguous. Compared by value.
    """

    def __init__(self, parts: Sequence[Fragment]) -> None:
        self.parts = tuple(parts)
        self._starts = [0, *accumulate(part.box.numel for part in parts)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlatSpace) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    @property
    def numel(self) -> int:
        return self._starts[-1]

    def fragments(self, start: int, length: int, numel: int, at: int) -> Iterator[Fragment]:
        """Elements `[start, start + length)` as the elements from `at` on of a tensor of `numel`.

        One fragment for each part that the range touches. The range must lie inside the space.
        """
        index = bisect.bisect_right(self._starts, start) - 1
        stop = start + length
        while start < stop:
            part = self.parts[index]
            end = min(stop, self._starts[index + 1])
            if end > start:
                itemsize = part.dtype.itemsize
                skip = (start - self._starts[index]) * itemsize
                extent = Extent(
                    part.in_file.file, part.extent.offset + skip, (end - start) * itemsize
                )
                yield Fragment(flat(numel, at, end - start), extent, part.dtype)
                at += end - start
                start = end
            index += 1


class Ranks:
    """The flat spaces of all ranks, in order. All tensors that are cut out of them share it."""

    def __init__(self, spaces: Sequence[FlatSpace]) -> None:
        self.spaces = tuple(spaces)
        #: Elements that every rank has.
        self.numel = min(space.numel for space in spaces)
        dtypes = [part.dtype for space in self.spaces for part in space.parts]
        self.dtype = dtypes[0] if dtypes else FLOAT32
        #: Bytes an element; None where the flat tensors are of several dtypes.
        self.itemsize = self.dtype.itemsize if len({*dtypes}) < 2 else None
        self._hash = hash(self.spaces)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Ranks) and self.spaces == other.spaces)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        """All that it is, in few characters: plans are named by what describes them."""
        return f"<{len(self.spaces)} ranks, {self._digest}>"

    @cached_property
    def _digest(self) -> str:
        hasher = sha256()
        for space in self.spaces:
            hasher.update(repr(space.parts).encode("utf-8", "surrogateescape"))
        return hasher.hexdigest()

    def piece(self, numel: int) -> int:
        """Elements of a rank's piece of a tensor; the last pieces may be shorter."""
        return -(-numel // len(self.spaces))

    def extents(self) -> Iterator[Extent]:
        """The flat tensors, in their files."""
        return (part.in_file for space in self.spaces for part in space.parts)


class Partition(Fragments, frozen=True):
    """A tensor of `numel` elements, cut into one piece a rank, each from element `start` of the
    rank's space on. Pieces without elements have no fragment.

    >>> from reshard.core.dtypes import FLOAT32
    >>> from reshard.core.tensors import FileRef
    >>> files = [FileRef("0"), FileRef("1")]
    >>> parts = [Fragment(flat(9, 0, 9), Extent(file, 100, 36), FLOAT32) for file in files]
    >>> ranks = Ranks([FlatSpace([part]) for part in parts])
    >>> [(f.box.offsets, f.extent.file.path, f.extent.offset) for f in Partition(ranks, 4, 5)]
    [((0,), '0', 116), ((3,), '1', 116)]
    """

    ranks: Ranks
    start: int
    numel: int

    @property
    def piece(self) -> int:
        """Elements of a rank's piece; the last pieces may be shorter."""
        return self.ranks.piece(self.numel)

    @property
    def over(self) -> Shape:
        return (self.numel,)

    @property
    def nbytes(self) -> int:
        if self.ranks.itemsize is None:
            return sum(fragment.extent.nbytes for fragment in self)
        return self.numel * self.ranks.itemsize

    @property
    def longest(self) -> int:
        if self.ranks.itemsize is None:
            return max((fragment.extent.nbytes for fragment in self), default=0)
        return self.piece * self.ranks.itemsize

    def regions(self) -> Ranks:
        return self.ranks

    def within(self, start: int, stop: int) -> Iterator[Fragment]:
        piece, spaces = self.piece, self.ranks.spaces
        if start >= stop:
            return
        for rank in range(start // piece, min(-(-stop // piece), len(spaces))):
            at = min(rank * piece, self.numel)
            length = min(piece, self.numel - at)
            yield from spaces[rank].fragments(self.start, length, self.numel, at)

    def __iter__(self) -> Iterator[Fragment]:
        return self.within(0, self.numel)

    def __bool__(self) -> bool:
        return self.numel > 0


def partitioned(name: str, shape: Shape, ranks: Ranks, start: int) -> Entry:
    """The entry of a tensor that lies in every rank's space from `start` on.

    Its pieces follow each other from its first element to its last, so they tile it, if every
    rank's space holds a whole piece there. Raises `FormatError` where one does not.
    """
    spec = TensorSpec(name, ranks.dtype, shape)
    fragments = Partition(ranks, start, spec.numel)
    stop = start + fragments.piece
    if start < 0 or stop > ranks.numel:
        raise FormatError(
            f"a rank should hold its elements {start} to {stop} and holds {ranks.numel}.",
            tensor=name,
        )
    return Entry(spec, fragments)
