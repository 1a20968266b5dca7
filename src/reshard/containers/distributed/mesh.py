"""Device meshes: which coordinate a rank has in the mesh that a DTensor lies over.

    torch 2.13  _layout: axes, each {shape, stride} (nothing for a size of 1)
                _rank_map: the ranks, an int32 tensor of the same file; _flatten_rank_map: a tuple
    torch 2.9   _layout: {shape, stride}, each a number or a nested tuple
    before      mesh: the ranks as a tensor of the mesh's shape

A sliced mesh (`mesh["fsdp"]` of a mesh of two dimensions) keeps the whole map of ranks since 2.9;
its strides then say which of the map's ranks are together. Read off torch 2.13
(torch/distributed/device_mesh.py, _mesh_layout.py).
"""

from __future__ import annotations

import math

import numpy as np
from msgspec import Struct

from reshard.containers.distributed.local import (
    MAX_RANKS,
    Place,
    attributes,
    natural,
)
from reshard.containers.torch import TensorRef
from reshard.core.strides import contiguous_strides
from reshard.core.tensors import Shape
from reshard.errors import brief
from reshard.storage.local import Sources

# A dimension of a mesh: sizes and strides in the map of ranks, the outermost first.
_Axis = tuple[tuple[int, int], ...]


class Mesh(Struct, frozen=True):
    """A mesh as one rank sees it.

    `coordinate` is that of the rank which the file's name states, None where it is not in the
    mesh. `ranks` counts all ranks of the map, `rank` is the one that the file itself states.
    """

    shape: Shape
    coordinate: Shape | None
    ranks: int
    rank: int | None = None


def parse(value: object, rank: int | None, sources: Sources, place: Place) -> Mesh:
    """The mesh that a pickled object describes, as `rank` sees it; None: as the rank that it
    states, or the only one. Raises `FormatError`."""
    fields = attributes(value, place)
    ranks = _ranks(fields.get("_flatten_rank_map"), fields.get("_rank_map"), sources, place)
    if ranks is None:
        mesh = fields.get("mesh")
        shape = mesh.shape if isinstance(mesh, TensorRef) else ()
        ranks = _ranks(fields.get("_flatten_mesh_list"), mesh, sources, place)
        if ranks is None or math.prod(shape) != len(ranks):
            raise place.broken("its device mesh lists no ranks.")
        strides = contiguous_strides(shape)
        axes: tuple[_Axis, ...] = tuple(((n, s),) for n, s in zip(shape, strides, strict=True))
    else:
        axes = _axes(fields.get("_layout"), place)
    _check_axes(axes, len(ranks), place)
    stated = fields.get("_rank")
    if rank is None:
        rank = stated if type(stated) is int else ranks[0] if len(ranks) == 1 else -1
    coordinate = _coordinate(axes, ranks.index(rank)) if rank in ranks else None
    _check_coordinate(fields.get("_coordinate_on_dim"), coordinate, stated == rank, place)
    return Mesh(
        tuple(math.prod(n for n, _ in axis) for axis in axes),
        coordinate,
        len(ranks),
        stated if type(stated) is int else None,
    )


def _ranks(
    listed: object, stored: object, sources: Sources, place: Place
) -> tuple[int, ...] | None:
    """The ranks, from a list of them or the tensor that holds them; None where there is neither."""
    values: object = listed
    if not isinstance(listed, tuple | list) and isinstance(stored, TensorRef):
        small = stored.extent.nbytes <= MAX_RANKS * stored.dtype.itemsize
        if stored.strides is not None or stored.dtype.floating or not small:
            raise place.broken("the ranks of its device mesh are not a list of integers.")
        data = sources.open(stored.extent.file).read(stored.extent.offset, stored.extent.nbytes)
        values = np.frombuffer(data, stored.dtype.numpy).tolist()
    if not isinstance(values, tuple | list):
        return None
    if len(values) > MAX_RANKS or not all(map(natural, values)) or len({*values}) != len(values):
        raise place.broken("the ranks of its device mesh are not different numbers.")
    return tuple(values)


def _axes(layout: object, place: Place) -> tuple[_Axis, ...]:
    found = attributes(layout, place)
    if isinstance(found.get("axes"), tuple | list):
        parts = [attributes(axis, place) for axis in found["axes"]]  # type: ignore[attr-defined]
        return tuple(_axis(part.get("shape"), part.get("stride"), place) for part in parts)
    shape, stride = found.get("shape"), found.get("stride")
    if natural(shape) and natural(stride):
        shape, stride = (shape,), (stride,)
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise place.broken(f"its device mesh has the layout {brief(shape)} : {brief(stride)}.")
    return tuple(_axis(n, s, place) for n, s in zip(shape, stride, strict=True))


def _axis(shape: object, stride: object, place: Place) -> _Axis:
    """One dimension, of a number or a (nested) tuple of numbers each."""
    sizes, strides = _leaves(shape), _leaves(stride)
    if sizes is None or strides is None or len(sizes) != len(strides):
        raise place.broken(f"its device mesh has the layout {brief(shape)} : {brief(stride)}.")
    return tuple(zip(sizes, strides, strict=True))


def _leaves(value: object, depth: int = 0) -> list[int] | None:
    if natural(value):
        return [value]  # type: ignore[list-item]
    if not isinstance(value, tuple | list) or depth > 4 or len(value) > 32:
        return None
    inner = [_leaves(each, depth + 1) for each in value]
    if any(leaves is None for leaves in inner):
        return None
    return [leaf for leaves in inner for leaf in leaves or ()]


def _check_axes(axes: tuple[_Axis, ...], ranks: int, place: Place) -> None:
    """Each stride must step over whole groups of the smaller ones, within the map of ranks: then a
    position in the map has one coordinate."""
    reach = 1
    for size, stride in sorted((pair for axis in axes for pair in axis), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if not size or not stride or stride % reach or size * stride > ranks:
            raise place.broken(f"its device mesh of {ranks} ranks has the layout {brief(axes)}.")
        reach = size * stride


def _coordinate(axes: tuple[_Axis, ...], position: int) -> Shape:
    coordinate = []
    for axis in axes:
        index = 0
        for size, stride in axis:
            index = index * size + (position // stride % size if stride else 0)
        coordinate.append(index)
    return tuple(coordinate)


def _check_coordinate(
    stated: object, coordinate: Shape | None, same_rank: bool, place: Place
) -> None:
    """Where the file states a coordinate, of the rank whose file it is, it is the one found."""
    if (
        not same_rank
        or not isinstance(stated, tuple | list)
        or len(stated) != len(coordinate or ())
    ):
        return
    if tuple(stated) != coordinate:
        raise place.broken(
            f"its device mesh states the coordinate {brief(stated)}, and its ranks say "
            f"{coordinate}."
        )
