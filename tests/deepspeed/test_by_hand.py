"""What only files laid out by hand show: ranks that state their parameters in another order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from tests import zero3
from tests.folders import edit_saved

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) + 100,
}


def backwards(content: dict[str, Any]) -> None:
    (shapes,) = content["param_shapes"]
    content["param_shapes"] = [dict(reversed(shapes.items()))]


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_state_their_parameters_in_another_order(tmp_path: Path, rank: int) -> None:
    """Equal as dicts; but the order says where each lies in the flat tensors."""
    zero3.save(tmp_path, TENSORS, world=2)
    edit_saved(tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", backwards)
    with pytest.raises(reshard.FormatError, match="its list of parameters is not that of"):
        reshard.open(tmp_path)


def test_ranks_that_all_state_another_order_are_read_in_it(tmp_path: Path) -> None:
    zero3.save(tmp_path, dict(reversed(TENSORS.items())), world=2)
    tensors = reshard.open(tmp_path).tensors
    for name, tensor in TENSORS.items():
        assert torch.equal(torch.from_numpy(tensors[name].numpy()), tensor)


def test_frozen_parameters_in_another_order(tmp_path: Path) -> None:
    zero3.save(tmp_path, TENSORS, world=2)
    shapes = {"f": torch.Size([2]), "g": torch.Size([2])}
    for rank in range(2):
        order = dict(reversed(shapes.items())) if rank else shapes
        fragments = {name: torch.ones(1) for name in order}

        def change(content: dict[str, Any], order: Any = order, fragments: Any = fragments) -> None:
            content["frozen_param_shapes"] = order
            content["frozen_param_fragments"] = fragments

        edit_saved(tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", change)
    with pytest.raises(reshard.FormatError, match="its list of frozen parameters is not that of"):
        reshard.open(tmp_path)
