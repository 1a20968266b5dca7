"""DTensor: the box of the whole tensor that one rank holds.

    _rebuild_from_type_v2(_rebuild_wrapper_subclass, DTensor, (cls, dtype, size, ..), state)
    state: (None, {"_local_tensor": tensor, "_spec": DTensorSpec})
    DTensorSpec: mesh, placements, tensor_meta, shard_order

A placement for each dimension of the mesh: `Shard(dim)` gives each rank `ceil(n / ranks)` rows of
what there is, the last ranks fewer or none; `Replicate()` gives each all. Where one dimension is
sharded twice, `shard_order` states which mesh dimension cuts first (torch 2.10 and later);
`_StridedShard(dim, split_factor)` is cut as if after the mesh dimensions behind it (FSDP over
tensor parallelism). Read off torch 2.13 (torch/distributed/tensor/_dtensor_spec.py,
placement_types.py, _utils.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from reshard.containers.distributed.local import (
    Local,
    Part,
    Place,
    attributes,
    natural,
    short_name,
    whole_shape,
)
from reshard.containers.distributed.mesh import Mesh
from reshard.containers.torch import Opaque, TensorRef
from reshard.core.tensors import Box, Shape
from reshard.errors import UnsupportedError, brief

# Stretches `[start, stop)` of one dimension, in the order of the local tensor.
_Runs = list[tuple[int, int]]


class Placement(Struct, frozen=True):
    """What happens along one dimension of a mesh; `dim` None: every rank holds all.

    `factor` counts the cuts that come first although they stand behind (a strided shard).
    """

    dim: int | None
    factor: int = 1


def decode(value: Opaque, mesh: Mesh, place: Place) -> Local:
    """One rank's part. Raises `FormatError`, `UnsupportedError` (a sum that is not made yet)."""
    dtype, shape = whole_shape(value, place)
    found = attributes(value, place)
    tensor, spec = found.get("_local_tensor"), attributes(found.get("_spec"), place)
    if not isinstance(tensor, TensorRef):
        what = tensor.describe() if isinstance(tensor, Opaque) else "nothing"
        raise UnsupportedError(
            f"a rank's part is {what}, which is not handled.", path=place.path, tensor=place.tensor
        )
    placements = _placements(spec.get("placements"), len(shape), place)
    if len(placements) != len(mesh.shape):
        raise place.broken(
            f"it has {len(placements)} placements on a mesh of {len(mesh.shape)} dimensions."
        )
    order = _order(spec.get("shard_order"), placements, mesh, place)
    parts: tuple[Part, ...] = ()
    if mesh.coordinate is not None:
        box = box_of(shape, mesh.shape, mesh.coordinate, placements, order, place)
        if box.sizes != tensor.shape or dtype != tensor.dtype:
            raise place.broken(
                f"its part is {tensor.dtype} {tensor.shape}, and {dtype} {box.sizes} is what its "
                f"placements give of shape {shape}."
            )
        parts = (Part(box, tensor),)
    elif tensor.extent.nbytes:
        raise place.broken("it holds a part, and its rank is not in the device mesh.")
    return Local(
        "DTensor", dtype, shape, parts, (mesh.shape, placements, order), mesh.ranks, mesh.rank
    )


def box_of(
    shape: Shape,
    mesh: Shape,
    coordinate: Shape,
    placements: Sequence[Placement],
    order: Sequence[int],
    place: Place,
) -> Box:
    """The box that the rank at `coordinate` of a mesh holds of a tensor of `shape`.

    `order` are the dimensions of the mesh in the order in which they cut.
    """
    runs: list[_Runs] = [[(0, size)] for size in shape]
    for axis in order:
        placement, ranks, index = placements[axis], mesh[axis], coordinate[axis]
        if placement.dim is None:
            continue
        have = runs[placement.dim]
        length = sum(stop - start for start, stop in have)
        pieces = ranks * placement.factor
        if placement.factor > 1 and length % pieces:
            raise UnsupportedError(
                f"{length} rows are spread over {pieces} strided shards, which do not come out "
                "even.",
                path=place.path,
                tensor=place.tensor,
            )
        step = -(-length // pieces)
        runs[placement.dim] = [
            run
            for piece in range(index, pieces, ranks)
            for run in _between(have, piece * step, (piece + 1) * step)
        ]
    joined = [_join(each) for each in runs]
    if any(len(each) > 1 for each in joined):
        raise UnsupportedError(
            "a rank's part of it is several pieces of the whole, which is not handled.",
            path=place.path,
            tensor=place.tensor,
        )
    # A rank that holds nothing begins where the tensor ends.
    ends = [each[0] if each else (size, size) for each, size in zip(joined, shape, strict=True)]
    return Box(shape, tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


def _between(runs: _Runs, start: int, stop: int) -> _Runs:
    """Elements `[start, stop)` of the runs laid end to end."""
    found, done = [], 0
    for first, last in runs:
        low, high = max(start - done, 0), min(stop - done, last - first)
        if low < high:
            found.append((first + low, first + high))
        done += last - first
    return found


def _join(runs: _Runs) -> _Runs:
    joined: _Runs = []
    for start, stop in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        elif start < stop:
            joined.append((start, stop))
    return joined


def _placements(value: object, dims: int, place: Place) -> tuple[Placement, ...]:
    if not isinstance(value, tuple | list):
        raise place.broken("it has no placements.")
    return tuple(_placement(each, dims, place) for each in value)


def _placement(value: object, dims: int, place: Place) -> Placement:
    kind = short_name(value)
    if kind == "Replicate":
        return Placement(None)
    if kind.endswith("Partial"):
        raise UnsupportedError(
            "its parts are yet to be summed over the ranks (a Partial placement).",
            path=place.path,
            tensor=place.tensor,
            hint="Save it after redistributing it to Shard or Replicate.",
        )
    if kind not in ("Shard", "_StridedShard", "StridedShard"):
        raise UnsupportedError(
            f"its placement is {brief(value)}, which is not handled.",
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
        if placement.dim is not None and mesh.shape[axis] > 1:
            cuts.setdefault(placement.dim, []).append(axis)
    twice = [axes for axes in cuts.values() if len(axes) > 1]
    if not twice or any(placement.factor > 1 for placement in placements):
        return default
    listed = _listed(stated, len(placements))
    if listed is None:
        raise UnsupportedError(
            "several dimensions of the mesh cut the same dimension of it, and the file does not "
            "say in which order (torch 2.10 and later do).",
            path=place.path,
            tensor=place.tensor,
            hint="Save it again with a newer torch, or with torch.distributed.checkpoint.",
        )
    if any(not {*axes} <= {*listed} for axes in twice):
        raise place.broken(f"its shard order is {brief(stated)}.")
    return (*listed, *(axis for axis in default if axis not in listed))


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
