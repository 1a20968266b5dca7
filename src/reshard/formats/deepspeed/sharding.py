"""How tensor parallel ranks split one parameter: blocks of the whole, and who holds them where.

    rows [6, 4] over two ranks     columns                       two sub-parameters of 3 rows
        0 0 0 0                        0 0 1 1                       0 0 0 0   a
        0 0 0 0                        0 0 1 1                       0 0 0 0   a
        0 0 0 0                        0 0 1 1                       1 1 1 1   a
        1 1 1 1                        0 0 1 1                       0 0 0 0   b
        1 1 1 1                        0 0 1 1                       0 0 0 0   b
        1 1 1 1                        0 0 1 1                       1 1 1 1   b

Pure geometry. All functions take the shapes of the ranks' parts, in order, and raise `ValueError`
where what is stated does not fit them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from msgspec import Struct

from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Shape
from reshard.errors import UnsupportedError, brief


class Block(Struct, frozen=True):
    """Elements `[at, at + sizes)` of the whole parameter.

    `held` are the ranks that have them, and where in their part they begin.
    """

    at: Shape
    sizes: Shape
    held: tuple[tuple[int, Shape], ...]


class Sharding(Struct, frozen=True):
    """A parameter of `shape` as blocks that lie in the parts of tensor parallel ranks."""

    shape: Shape
    blocks: tuple[Block, ...]


def replicated(shapes: Sequence[Shape]) -> Sharding:
    """Every rank holds the whole."""
    if len(set(shapes)) > 1:
        raise ValueError(f"it is the same on every rank, and its shapes are {_list(shapes)}")
    origin = (0,) * len(shapes[0])
    held = tuple((rank, origin) for rank in range(len(shapes)))
    return Sharding(shapes[0], (Block(origin, shapes[0], held),))


def joined(shapes: Sequence[Shape], dim: int) -> Sharding:
    """The ranks' parts follow each other along `dim`.

    >>> joined([(2, 4), (1, 4)], 0).blocks[1]
    Block(at=(2, 0), sizes=(1, 4), held=((1, (0, 0)),))
    """
    return interleaved(shapes, dim, [[_size(shape, dim) for shape in shapes]])


def interleaved(shapes: Sequence[Shape], dim: int, widths: Sequence[Sequence[int]]) -> Sharding:
    """Several sub-parameters along `dim`, each split separately.

    `widths[sub][rank]` is what a rank holds of a sub-parameter; its part is its share of the first,
    then of the second, and so on.
    """
    first = shapes[0]
    if any(len(each) != len(shapes) for each in widths):
        raise ValueError(f"{len(shapes)} ranks hold widths {list(widths)}")
    for rank, shape in enumerate(shapes):
        if shape[:dim] != first[:dim] or shape[dim + 1 :] != first[dim + 1 :]:
            raise ValueError(f"the shapes {_list(shapes)} differ beyond dimension {dim}")
        if _size(shape, dim) != sum(_of(rank, widths)):
            raise ValueError(f"rank {rank} has shape {shape}, and widths {_of(rank, widths)}")
    starts = [list(accumulate(_of(rank, widths), initial=0)) for rank in range(len(shapes))]
    blocks = []
    at = 0
    for sub, each in enumerate(widths):
        for rank, width in enumerate(each):
            sizes = (*first[:dim], width, *first[dim + 1 :])
            start = _along(len(first), dim, starts[rank][sub])
            if width:
                blocks.append(Block(_along(len(first), dim, at), sizes, ((rank, start),)))
            at += width
    return Sharding((*first[:dim], at, *first[dim + 1 :]), tuple(blocks))


def from_map(entry: Mapping[str, Any], shapes: Sequence[Shape]) -> Sharding:
    """An entry of an `affine_map`: `{logical_shape, ranks: {r: {shard_shape, pieces}}}`.

    A piece `{shape, source: [offset, strides], dest: [offset, strides]}` is a view into the whole
    and one into the rank's part. Besides `ValueError`, raises `KeyError` and `TypeError` where the
    entry is malformed, `UnsupportedError` where the parts are scaled.
    """
    whole = _counts(entry["logical_shape"])
    if set(entry["ranks"]) != set(range(len(shapes))):
        raise ValueError(f"it is over ranks {sorted(entry['ranks'])} of {len(shapes)}")
    parts: dict[tuple[Shape, Shape], list[tuple[int, Shape]]] = {}
    for rank, shape in enumerate(shapes):
        part = entry["ranks"][rank]
        if _counts(part["shard_shape"]) != shape:
            raise ValueError(f"rank {rank} should hold {part['shard_shape']} and holds {shape}")
        for piece in part["pieces"]:
            if piece.get("scale", 1.0) != 1.0:
                raise UnsupportedError(
                    f"tensor parallel rank {rank} holds it multiplied by {brief(piece['scale'])}, "
                    "which is not supported."
                )
            sizes = _counts(piece["shape"])
            if 0 not in sizes:
                at = _corner(piece["source"], sizes, whole)
                start = _corner(piece["dest"], sizes, shape)
                parts.setdefault((at, sizes), []).append((rank, start))
    return Sharding(whole, tuple(Block(*key, tuple(ranks)) for key, ranks in parts.items()))


def _corner(view: Sequence[Any], sizes: Shape, shape: Shape) -> Shape:
    """Where a block begins, given as offset and strides of a view into an array of `shape`."""
    offset, strides = view
    (offset,), strides, expected = _counts([offset]), _counts(strides), contiguous_strides(shape)
    if not len(sizes) == len(shape) == len(strides) or any(
        size > 1 and have != want for size, have, want in zip(sizes, strides, expected, strict=True)
    ):
        raise ValueError(
            f"a piece of shape {sizes} and strides {strides} is not a block of {shape}"
        )
    corner = []
    for stride in expected:
        corner.append(offset // stride)
        offset %= stride
    if any(start + size > limit for start, size, limit in zip(corner, sizes, shape, strict=True)):
        raise ValueError(f"a piece of shape {sizes} at {corner} leaves {shape}")
    return tuple(corner)


def _counts(values: Sequence[Any]) -> Shape:
    counts = tuple(values)
    if not all(type(value) is int and value >= 0 for value in counts):
        raise ValueError(f"{brief(counts)} are not sizes")
    return counts


def _size(shape: Shape, dim: int) -> int:
    if dim >= len(shape):
        raise ValueError(f"the shape {shape} has no dimension {dim}")
    return shape[dim]


def _along(ndim: int, dim: int, start: int) -> Shape:
    return (0,) * dim + (start,) + (0,) * (ndim - dim - 1)


def _of(rank: int, widths: Sequence[Sequence[int]]) -> list[int]:
    return [each[rank] for each in widths]


def _list(shapes: Sequence[Shape]) -> str:
    return ", ".join(map(str, shapes))
