"""Which box a rank holds: against torch's own computation, and meshes of every release's form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from reshard.containers.distributed.dtensor import Placement, _order, _strided, box_of
from reshard.containers.distributed.local import Place
from reshard.containers.distributed.mesh import Mesh, parse
from reshard.containers.torch import Opaque, read
from reshard.errors import FormatError, UnsupportedError
from reshard.storage.local import Sources

_HERE = Place("rank.pt", "w")


@st.composite
def placed(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], list[int | None]]:
    shape = draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    mesh = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dims = [draw(st.none() | st.integers(0, len(shape) - 1)) for _ in mesh]
    return tuple(shape), tuple(mesh), dims


@given(placed())
def test_boxes_are_those_that_torch_computes(
    case: tuple[tuple[int, ...], tuple[int, ...], list[int | None]],
) -> None:
    shape, mesh, dims = case
    theirs = [Replicate() if dim is None else Shard(dim) for dim in dims]
    ours = [Placement(dim) for dim in dims]
    for coordinate in np.ndindex(*mesh):
        sizes, offsets = _compute_local_shape_and_global_offset(
            shape, mesh, list(coordinate), theirs
        )
        box = box_of(shape, mesh, coordinate, ours, range(len(mesh)))
        assert box.sizes == tuple(sizes)
        if box.numel:
            assert box.offsets == tuple(offsets)


def test_split_factors_give_the_order_of_cuts() -> None:
    def order(mesh: tuple[int, ...], *factors: int) -> list[int]:
        placements = [Placement(0, factor) for factor in factors]
        return _strided(range(len(mesh)), placements, Mesh(mesh, None, math.prod(mesh)), _HERE)

    assert order((2, 3), 3, 1) == [1, 0]  # FSDP over tensor parallelism
    assert order((2, 3), 1, 1) == [0, 1]
    assert order((2, 2, 3), 6, 3, 1) == [2, 1, 0]
    assert order((2, 2, 3), 2, 1, 1) == [1, 0, 2]
    assert order((2, 2, 3), 6, 1, 1) == [1, 2, 0]
    with pytest.raises(UnsupportedError, match="split factor is 4"):
        order((2, 3), 4, 1)


def test_two_cuts_of_one_dimension_need_their_order() -> None:
    twice = [Placement(0), Placement(0)]
    mesh = Mesh((2, 2), (0, 0), 4)
    entry = Opaque("ShardOrderEntry", (0, (1, 0)))
    assert _order((entry,), twice, mesh, _HERE) == (1, 0)
    with pytest.raises(UnsupportedError, match="does not state the order") as caught:
        _order(None, twice, mesh, _HERE)
    # What a newer torch saves is the entry above, which is read.
    assert "Save it again with a newer torch" in str(caught.value)
    with pytest.raises(FormatError, match="shard order"):
        _order((Opaque("ShardOrderEntry", (0, (1,))),), twice, mesh, _HERE)
    # A dimension of one rank cuts nothing.
    assert _order(None, twice, Mesh((1, 4), (0, 0), 4), _HERE) == (0, 1)


def record(**state: Any) -> Opaque:
    return Opaque("torch.distributed.device_mesh.DeviceMesh", state=state)


def layout(*pairs: tuple[Any, Any]) -> Opaque:
    axes = tuple(Opaque("_FlatLayout", state={"shape": n, "stride": s}) for n, s in pairs)
    return Opaque("_MeshLayout", state={"axes": axes})


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_coordinates_in_a_slice_of_a_mesh(sizes: list[int], data: st.DataObject) -> None:
    """A sliced mesh keeps the whole map of ranks, in any order, and strides into it."""
    world = math.prod(sizes)
    ranks = data.draw(st.permutations(range(world)))
    kept = data.draw(st.lists(st.sampled_from(range(len(sizes))), unique=True, min_size=1))
    strides = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    # torch leaves out sizes of 1.
    flat = [((sizes[d],), (strides[d],)) if sizes[d] > 1 else ((), ()) for d in sorted(kept)]
    with Sources() as sources:
        for position, rank in enumerate(ranks):
            whole = np.unravel_index(position, sizes)
            expected = tuple(int(whole[dim]) for dim in sorted(kept))
            mesh = record(_flatten_rank_map=tuple(ranks), _layout=layout(*flat))
            found = parse(mesh, rank, sources, _HERE)
            assert found.coordinate == expected
            assert found.shape == tuple(sizes[dim] for dim in sorted(kept))
            older = Opaque(
                "_MeshLayout",
                state={
                    "shape": tuple(sizes[d] for d in sorted(kept)),
                    "stride": tuple(strides[d] for d in sorted(kept)),
                },
            )
            mesh = record(_flatten_rank_map=tuple(ranks), _layout=older)
            assert parse(mesh, rank, sources, _HERE).coordinate == expected


def test_meshes_before_layouts(tmp_path: Path) -> None:
    """torch 2.8 and older pickle the ranks as a tensor of the mesh's shape."""
    torch.save({"mesh": torch.tensor([[4, 1], [0, 3]])}, tmp_path / "x.pt")
    with Sources() as sources:
        file = read(sources.open(tmp_path / "x.pt"))
        assert isinstance(file.value, dict)
        tensor = file.value["mesh"]
        for mesh in (record(mesh=tensor), record(mesh=tensor, _flatten_mesh_list=(4, 1, 0, 3))):
            assert parse(mesh, 3, sources, _HERE) == Mesh((2, 2), (1, 1), 4)
            assert parse(mesh, 2, sources, _HERE).coordinate is None
        stored = record(_rank_map=tensor, _layout=layout(((4,), (1,))))
        assert parse(stored, 0, sources, _HERE) == Mesh((4,), (2,), 4)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"_flatten_rank_map": (0, 0), "_layout": layout(((2,), (1,)))},
        {"_flatten_rank_map": (0, -1), "_layout": layout(((2,), (1,)))},
        {"_flatten_rank_map": (0, 1), "_layout": None},
        {"_flatten_rank_map": (0, 1), "_layout": layout(((3,), (1,)))},
        {"_flatten_rank_map": (0, 1, 2, 3), "_layout": layout(((2,), (1,)), ((2,), (1,)))},
        {"_flatten_rank_map": (0, 1), "_layout": layout(((2,), (0,)))},
        {"_flatten_rank_map": (0, 1), "_layout": layout(((2,), "x"))},
        {
            "_flatten_rank_map": (0, 1),
            "_layout": layout(((2,), (1,))),
            "_rank": 1,
            "_coordinate_on_dim": (0,),
        },
    ],
)
def test_a_mesh_that_contradicts_itself(state: dict[str, Any]) -> None:
    with Sources() as sources, pytest.raises(FormatError, match=r"rank\.pt: tensor 'w'"):
        parse(record(**state), 1, sources, _HERE)
