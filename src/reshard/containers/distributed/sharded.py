"""ShardedTensor: what FSDP1 without a device mesh saves.

    _rebuild_from_type_v2(_rebuild_wrapper_subclass, ShardedTensor, (cls, dtype, size, ..), state)
    state: ([Shard of this rank, ..], metadata, process group, spec, init_rrefs)
    Shard: tensor, metadata {shard_offsets, shard_sizes, placement}
    metadata: shards_metadata (those of all ranks), size, tensor_properties
    process group: {local_rank, global_rank, local_world_size, global_world_size}

Read off torch 2.13 (torch/distributed/_shard/sharded_tensor/api.py, shard.py, metadata.py).
"""

from __future__ import annotations

from reshard.containers.distributed.local import (
    MAX_RANKS,
    Local,
    LocalFragment,
    Place,
    attributes,
    natural,
    shape_of,
    whole_shape,
)
from reshard.containers.torch import Opaque, TensorRef
from reshard.core.tensors import Box, Shape

_Cut = tuple[Shape, Shape]


def decode(value: Opaque, place: Place) -> Local:
    """One rank's part. Raises `FormatError`."""
    dtype, shape = whole_shape(value, place)
    if not isinstance(value.state, tuple) or len(value.state) < 3:
        raise place.broken("it has no shards.")
    shards, metadata, group = value.state[:3]
    stated = attributes(metadata, place)
    listed = stated.get("shards_metadata")
    if not isinstance(shards, list) or not isinstance(listed, list) or len(listed) > MAX_RANKS:
        raise place.broken("it lists no shards.")
    if shape_of(stated.get("size"), place) != shape:
        raise place.broken(f"its shape is {shape} and its shards are of another.")
    cuts = tuple(_cut(each, shape, place) for each in listed)
    known = set(cuts)
    fragments = []
    for shard in shards:
        held = attributes(shard, place)
        tensor, cut = held.get("tensor"), _cut(held.get("metadata"), shape, place)
        if not isinstance(tensor, TensorRef) or (tensor.shape, tensor.dtype) != (cut[1], dtype):
            raise place.broken("its shard is not a tensor of the shape that is stated.")
        if cut not in known:
            raise place.broken(f"its shard at {cut[0]} is not in the list of all ranks' shards.")
        fragments.append(LocalFragment(Box(shape, *cut), tensor))
    ranks = attributes(group, place)
    rank, world = ranks.get("global_rank"), ranks.get("global_world_size")
    return Local(
        "ShardedTensor",
        dtype,
        shape,
        tuple(fragments),
        cuts,
        world if type(world) is int and 0 < world <= MAX_RANKS else None,
        rank if type(rank) is int else None,
    )


def _cut(metadata: object, shape: Shape, place: Place) -> _Cut:
    """Offsets and sizes of a shard, inside the tensor."""
    found = attributes(metadata, place)
    offsets, sizes = found.get("shard_offsets"), found.get("shard_sizes")
    if not isinstance(offsets, tuple | list) or not all(map(natural, offsets)):
        raise place.broken("the offsets of a shard are not numbers.")
    cut = (tuple(offsets), shape_of(sizes, place))
    inside = len(cut[0]) == len(cut[1]) == len(shape) and all(
        offset + size <= limit for offset, size, limit in zip(*cut, shape, strict=True)
    )
    if not inside:
        raise place.broken(f"a shard at {cut[0]} of sizes {cut[1]} is not of shape {shape}.")
    return cut
