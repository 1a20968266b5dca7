"""Loads a DCP folder into modules named as each transformers version names a model's tensors.

`python -m tests.models.versions FOLDER`, where FOLDER/<model>/dcp is the checkpoint and
FOLDER/<model>/<version>.json maps each name of that version to a shape. What an FSDP1 and an FSDP2
module of two ranks hold after LightRFT's own calls is written as <version>-<kind>.safetensors.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard

from tests.fsdp.oracle import ranks, shardings


def main(folder: Path) -> None:
    ranks.run(2, functools.partial(_load_all, folder))


def _load_all(folder: Path) -> None:
    for named in sorted(folder.glob("*/*.json")):
        shapes = json.loads(named.read_text())
        for kind, load in (("fsdp1", _fsdp1), ("fsdp2", _fsdp2)):
            found = load(tree(shapes), named.parent / "dcp")
            if distributed.get_rank() == 0:
                tensors = {name: value.clone().contiguous() for name, value in found.items()}
                save_file(tensors, named.with_name(f"{named.stem}-{kind}.safetensors"))
            distributed.barrier()


def tree(shapes: Mapping[str, list[int]]) -> nn.Module:
    """A module of modules whose parameters have these names, all of minus one."""
    root = nn.Module()
    for name, shape in shapes.items():
        module = root
        *path, last = name.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_parameter(last, nn.Parameter(torch.full(shape, -1.0)))
    return root


def _fsdp1(module: nn.Module, checkpoint: Path) -> dict[str, torch.Tensor]:
    model = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
        state = dict(model.state_dict())
        dcp.load(state, checkpoint_id=checkpoint)
        model.load_state_dict(state)
    return shardings.gather(model)


def _fsdp2(module: nn.Module, checkpoint: Path) -> dict[str, torch.Tensor]:
    # As LightRFT's FSDPV2Strategy.load_ckpt: the mesh, and the three calls.
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(module, mesh=mesh)
    state = get_model_state_dict(module)
    dcp.load(state_dict=state, checkpoint_id=checkpoint)
    set_model_state_dict(module, state)
    return shardings.gather(module)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
