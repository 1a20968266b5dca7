"""DTensor: the box of the whole tensor that one rank holds.

    _rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, (cls, dtype, size, ..), state)
    state: (None, {"_local_tensor": tensor, "_spec": DTensorSpec})
    DTensorSpec: mesh, placements, tensor_meta, shard_order

A placement for each dimension of the mesh: `Shard(dim)` gives each rank `ceil(n / ranks)` rows of
what there is, the last ranks fewer or none; `Replicate()` gives each all. Where one dimension is
sharded twice, `shard_order` states which mesh dimension cuts first (torch 2.10 and later);
`_StridedShard(dim, split_factor)` comes after so many cuts of the mesh dimensions behind it (FSDP
over tensor parallelism). Read off torch 2.13 (torch/distributed/tensor/_dtensor_spec.py,
placement_types.py, _utils.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from reshard.containers.distributed.local import (
    Local,
    LocalFragment,
    Place,
    attributes,
    natural,
    whole_shape,
)
from reshard.containers.distributed.mesh import Mesh
from reshard.containers.torch import Opaque, TensorRef
from reshard.core.tensors import Box, Shape
from reshard.errors import UnsupportedError, brief


class Placement(Struct, frozen=True):
    """What happens along one dimension of a mesh; `dim` None: every rank holds all.

    `factor` is the number of pieces that dimensions of the mesh behind it cut first (a strided
    shard).
    """

    dim: int | None
    factor: int = 1


def decode(value: Opaque, mesh: Mesh, place: Place) -> Local:
    """One rank's part. Raises `FormatError`, `UnsupportedError` (a partial sum)."""
    dtype, shape = whole_shape(value, place)
    found = attributes(value, place)
    tensor, spec = found.get("_local_tensor"), attributes(found.get("_spec"), place)
    if not isinstance(tensor, TensorRef):
        what = tensor.describe() if isinstance(tensor, Opaque) else "nothing"
        raise UnsupportedError(
            f"a rank's part is {what}, which is not supported.",
            path=place.path,
            tensor=place.tensor,
        )
    placements = _placements(spec.get("placements"), len(shape), place)
    if len(placements) != len(mesh.shape):
        raise place.broken(
            f"it has {len(placements)} placements on a mesh of {len(mesh.shape)} dimensions."
        )
    order = _order(spec.get("shard_order"), placements, mesh, place)
    fragments: tuple[LocalFragment, ...] = ()
    if mesh.coordinate is not None:
        box = box_of(shape, mesh.shape, mesh.coordinate, placements, order)
        if box.sizes != tensor.shape or dtype != tensor.dtype:
            raise place.broken(
                f"its part is {tensor.dtype} {tensor.shape}, and {dtype} {box.sizes} is what its "
                f"placements give of shape {shape}."
            )
        fragments = (LocalFragment(box, tensor),)
    elif tensor.extent.nbytes:
        raise place.broken("it holds a part, and its rank is not in the device mesh.")
    return Local(
        "DTensor", dtype, shape, fragments, (mesh.shape, placements, order), mesh.ranks, mesh.rank
    )


def box_of(
    shape: Shape,
    mesh: Shape,
    coordinate: Shape,
    placements: Sequence[Placement],
    order: Sequence[int],
) -> Box:
    """The box that the rank at `coordinate` of a mesh holds of a tensor of `shape`.

    `order` are the dimensions of the mesh in the order in which they cut. A rank that holds nothing
    begins where there is nothing left.

    >>> twice = [Placement(0), Placement(0)]
    >>> box_of((10,), (2, 2), (1, 0), twice, (0, 1)), box_of((10,), (2, 2), (1, 0), twice, (1, 0))
    (Box(shape=(10,), offsets=(5,), sizes=(3,)), Box(shape=(10,), offsets=(3,), sizes=(2,)))
    """
    starts, stops = [0] * len(shape), list(shape)
    for axis in order:
        dim = placements[axis].dim
        if dim is None:
            continue
        start, stop = starts[dim], stops[dim]
        step = -(-(stop - start) // mesh[axis])
        starts[dim] = min(start + coordinate[axis] * step, stop)
        stops[dim] = min(starts[dim] + step, stop)
    sizes = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
    return Box(shape, tuple(starts), sizes)


def _placements(value: object, dims: int, place: Place) -> tuple[Placement, ...]:
    if not isinstance(value, tuple | list):
        raise place.broken("it has no placements.")
    return tuple(_placement(each, dims, place) for each in value)


def _placement(value: object, dims: int, place: Place) -> Placement:
    kind = value.short_name if isinstance(value, Opaque) else ""
    if kind == "Replicate":
        return Placement(None)
    if kind.endswith("Partial"):
        raise UnsupportedError(
            "its parts must still be summed over the ranks (a Partial placement).",
            path=place.path,
            tensor=place.tensor,
            hint="Save it after redistributing it to Shard or Replicate.",
        )
    if kind not in ("Shard", "_StridedShard", "StridedShard"):
        raise UnsupportedError(
            f"its placement is {brief(value)}, which is not supported.",
            path=place.path,
            tensor=place.tensor,
        )
    found = attributes(value, place)
    dim, factor = found.get("dim"), found.get("split_factor", 1)
    if not natural(dim) or not natural(factor) or not dim < dims or not factor:  # type: ignore[operator]
        raise place.broken(f"it is sharded along {brief(dim)} by {brief(factor)}.")
    if kind != "Shard" and "split_factor" not in found:
        raise place.broken("it is a strided shard without a split factor.")
    return Placement(dim, factor)  # type: ignore[arg-type]


def _order(
    stated: object, placements: Sequence[Placement], mesh: Mesh, place: Place
) -> tuple[int, ...]:
    """The mesh's dimensions in the order in which they cut."""
    default = tuple(range(len(placements)))
    cuts: dict[int, list[int]] = {}
    for axis, placement in enumerate(placements):
        if placement.dim is not None:
            cuts.setdefault(placement.dim, []).append(axis)
    if any(placement.factor > 1 for placement in placements):
        return tuple(a for axes in cuts.values() for a in _strided(axes, placements, mesh, place))
    twice = [axes for axes in cuts.values() if sum(mesh.shape[axis] > 1 for axis in axes) > 1]
    if not twice:
        return default
    listed = _listed(stated, len(placements))
    if listed is None:
        raise UnsupportedError(
            "several mesh dimensions shard the same dimension of it, and the file does not state "
            "the order (torch 2.10 and later state it).",
            path=place.path,
            tensor=place.tensor,
            hint="Save it again with a newer torch, or with torch.distributed.checkpoint.",
        )
    if any(not {*axes} <= {*listed} for axes in twice):
        raise place.broken(f"its shard order is {brief(stated)}.")
    return (*listed, *(axis for axis in default if axis not in listed))


def _strided(
    axes: Sequence[int], placements: Sequence[Placement], mesh: Mesh, place: Place
) -> list[int]:
    """The order of mesh dimensions that cut one dimension, from the split factors: each comes after
    as many of those behind it as make that many pieces."""
    order: list[int] = []
    for axis in reversed(axes):
        pieces, at = 1, 0
        while at < len(order) and pieces < placements[axis].factor:
            pieces *= mesh.shape[order[at]]
            at += 1
        if pieces != placements[axis].factor:
            raise UnsupportedError(
                f"a strided shard's split factor is {placements[axis].factor}, which is "
                f"impossible on a mesh of {mesh.shape}.",
                path=place.path,
                tensor=place.tensor,
            )
        order.insert(at, axis)
    return order


def _listed(stated: object, dims: int) -> tuple[int, ...] | None:
    """The mesh dimensions of `((tensor dim, mesh dims), ..)`, each once; None where it is not."""
    if not isinstance(stated, tuple):
        return None
    listed: list[int] = []
    for entry in stated:
        pair = entry.args if isinstance(entry, Opaque) else entry
        if not isinstance(pair, tuple) or len(pair) != 2 or not isinstance(pair[1], tuple):
            return None
        listed += [axis for axis in pair[1] if natural(axis) and axis < dims]
    return tuple(listed) if len({*listed}) == len(listed) else None
