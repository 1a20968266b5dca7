"""Arrangements: how a tensor is made of others by cutting, joining and transposing, as a value.

    Whole("a")                              the tensor a
    Crop(of, box)                           the elements of a box
    Select(of, index)                       one row of the first dimension, without that dimension
    Transpose(of, dim0, dim1)               two dimensions exchanged
    Concat(parts, dim)  Stack(parts)        joined along a dimension; as rows of a new first one

An arrangement names tensors and holds none, so it can be applied to every table with these names:
weights, moments of an optimizer, averaged copies. No byte moves for it: applying one to entries
gives entries, whose boxes tile them again (`rearrange`). Every arrangement of whole tensors has an
inverse, `inverse`, which gives the tensors back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from reshard.core import rearrange
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import (
    Box,
    Entry,
    Extent,
    FileRef,
    Fragment,
    Shape,
    TensorSpec,
    whole,
)
from reshard.core.tiling import check_tiling
from reshard.errors import FormatError, IncompleteError, PlanError


class Whole(Struct, frozen=True):
    """A tensor as it is."""

    name: str


class Crop(Struct, frozen=True):
    """The elements of `box`, a box over the shape of `of`, as a tensor of shape `box.sizes`."""

    of: Arrangement
    box: Box


class Select(Struct, frozen=True):
    """`of[index]`."""

    of: Arrangement
    index: int


class Transpose(Struct, frozen=True):
    """`of` with two dimensions exchanged."""

    of: Arrangement
    dim0: int
    dim1: int


class Concat(Struct, frozen=True):
    """The parts, joined along an existing dimension."""

    parts: tuple[Arrangement, ...]
    dim: int


class Stack(Struct, frozen=True):
    """The parts as rows of a new first dimension."""

    parts: tuple[Arrangement, ...]


Arrangement = Whole | Crop | Select | Transpose | Concat | Stack


def sources(arrangement: Arrangement) -> Iterator[str]:
    """The names of the tensors that it is made of, in order, each as often as it is used."""
    if isinstance(arrangement, Whole):
        yield arrangement.name
    elif isinstance(arrangement, Concat | Stack):
        for part in arrangement.parts:
            yield from sources(part)
    else:
        yield from sources(arrangement.of)


class Arranger:
    """Applies arrangements to the entries of one table.

    Raises `PlanError` where shapes or dtypes do not allow it.
    """

    def __init__(self, table: Mapping[str, Entry]) -> None:
        self._table = table
        self._rows: dict[Arrangement, list[Entry]] = {}

    def make(self, arrangement: Arrangement) -> Entry:
        """The entry that an arrangement makes; it keeps the name of its first source."""
        if isinstance(arrangement, Whole):
            return self._table[arrangement.name]
        if isinstance(arrangement, Crop):
            return rearrange.crop(self.make(arrangement.of), arrangement.box)
        if isinstance(arrangement, Select):
            return self._row(arrangement.of, arrangement.index)
        if isinstance(arrangement, Transpose):
            return rearrange.transpose(
                self.make(arrangement.of), arrangement.dim0, arrangement.dim1
            )
        parts = [self.make(part) for part in arrangement.parts]
        if isinstance(arrangement, Concat):
            return rearrange.concat(parts, arrangement.dim)
        return rearrange.stack(parts)

    def _row(self, of: Arrangement, index: int) -> Entry:
        """One row. Each tensor is split once, fragment by fragment: to cut 128 experts out of 64
        ranks' ranges one by one would compare 8,192 overlaps."""
        if of not in self._rows:
            self._rows[of] = rearrange.rows(self.make(of))
        return self._rows[of][index]


def inverse(
    outputs: Mapping[str, Arrangement], specs: Mapping[str, TensorSpec]
) -> dict[str, Arrangement]:
    """The arrangements that recover the tensors `specs` from the outputs.

    `specs` are the tensors that the outputs are made of. Raises `PlanError` where the outputs do
    not hold every element of them exactly once.
    """
    arranger = Arranger({name: _symbol(name, spec) for name, spec in specs.items()})
    held: dict[str, list[tuple[Box, Arrangement]]] = {name: [] for name in specs}
    for output, arrangement in outputs.items():
        made = rearrange.unflatten(arranger.make(arrangement))
        for fragment in made.fragments:
            if not isinstance(fragment.extent, Extent):
                continue  # a symbol's is one
            name = fragment.extent.file.path
            box, axes = _source_box(specs[name], fragment)
            taken: Arrangement = Whole(output)
            if fragment.box != whole(made.spec.shape):
                taken = Crop(taken, fragment.box)
            held[name].append((box, _turned(taken, axes, box.sizes)))
    return {name: _joined(specs[name], parts) for name, parts in held.items()}


def _symbol(name: str, spec: TensorSpec) -> Entry:
    """An entry of one fragment, whose file stands for the tensor itself."""
    extent = Extent(FileRef(name), 0, spec.nbytes)
    fragments = (Fragment(whole(spec.shape), extent, spec.dtype),) if spec.numel else ()
    return Entry(spec, fragments)


def _source_box(spec: TensorSpec, fragment: Fragment) -> tuple[Box, list[int | None]]:
    """The box of the source that a fragment's elements are, and the source's dimension that each
    dimension of the fragment runs along; None where that has one element."""
    at = fragment.extent.offset // spec.dtype.itemsize
    own = contiguous_strides(spec.shape)
    offsets = []
    for stride in own:
        offsets.append(at // stride)
        at %= stride
    steps = fragment.strides or contiguous_strides(fragment.box.sizes)
    sizes = [1] * len(spec.shape)
    axes: list[int | None] = []
    for size, step in zip(fragment.box.sizes, steps, strict=True):
        axis = next(
            (
                axis
                for axis, stride in enumerate(own)
                if stride == step and axis not in axes and offsets[axis] + size <= spec.shape[axis]
            ),
            None,
        )
        if size == 1:
            axis = None
        elif axis is None:
            raise PlanError("its elements are not a box of the tensor.", tensor=spec.name)
        else:
            sizes[axis] = size
        axes.append(axis)
    return Box(spec.shape, tuple(offsets), tuple(sizes)), axes


def _turned(taken: Arrangement, axes: Sequence[int | None], sizes: Shape) -> Arrangement:
    """`taken`, whose dimensions run along `axes` of the source, with the source's dimensions."""
    if len(axes) == len(sizes) and all(axis in (None, dim) for dim, axis in enumerate(axes)):
        return taken
    order = list(axes)
    while None in order:
        dim = order.index(None)
        if dim:
            taken = Transpose(taken, 0, dim)
            order[0], order[dim] = order[dim], order[0]
        taken = Select(taken, 0)
        del order[0]
    for axis in range(len(sizes)):
        if axis not in order:
            taken = Stack((taken,))
            order.insert(0, axis)
    for dim in range(len(sizes)):
        other = order.index(dim)
        if other != dim:
            taken = Transpose(taken, dim, other)
            order[dim], order[other] = order[other], order[dim]
    return taken


def _joined(spec: TensorSpec, parts: list[tuple[Box, Arrangement]]) -> Arrangement:
    """The whole tensor out of its boxes. Raises `PlanError` where they do not tile it."""
    entry = Entry(
        spec,
        tuple(
            Fragment(box, Extent(FileRef(""), 0, box.numel * spec.dtype.itemsize), spec.dtype)
            for box, _ in parts
        ),
    )
    try:
        check_tiling(entry)
    except (FormatError, IncompleteError) as error:
        raise PlanError(f"the map has no inverse: {error.message}", tensor=spec.name) from None
    return _join(spec, parts)


def _join(spec: TensorSpec, parts: list[tuple[Box, Arrangement]]) -> Arrangement:
    if len(parts) == 1:
        return parts[0][1]
    for dim in range(len(spec.shape)):
        groups: list[list[tuple[Box, Arrangement]]] = []
        end = 0
        for box, arrangement in sorted(parts, key=lambda part: part[0].offsets[dim]):
            if not groups or box.offsets[dim] >= end:
                groups.append([])
            groups[-1].append((box, arrangement))
            end = max(end, box.offsets[dim] + box.sizes[dim])
        if len(groups) > 1:
            return _concat(tuple(_join(spec, group) for group in groups), dim)
    raise PlanError("its parts are laid out in no order that can be joined.", tensor=spec.name)


def _concat(parts: tuple[Arrangement, ...], dim: int) -> Arrangement:
    """The parts joined, rows of stacks as one stack."""
    stacks = [part.parts for part in parts if isinstance(part, Stack)]
    if len(stacks) == len(parts) and dim == 0:
        return Stack(tuple(row for rows in stacks for row in rows))
    if len(stacks) == len(parts) and all(len(rows) == 1 for rows in stacks):
        return Stack((Concat(tuple(rows[0] for rows in stacks), dim - 1),))
    return Concat(parts, dim)
