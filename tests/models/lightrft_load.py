"""Loads a DCP folder as LightRFT does: `python -m tests.models.lightrft_load FOLDER NAME ...`

FOLDER/<name>/base   a Hugging Face folder, of which the config is used here
              run    what `--ckpt_path` names
The calls, their order and the wrapping are those of FSDPV2Strategy in LightRFT's
lightrft/strategy/fsdp/fsdpv2.py (`load_ckpt`, `_fsdp_init_model`) and find_latest_checkpoint_dir.
What a model of two ranks then holds is written as FOLDER/<name>/loaded.safetensors, what its
`client_state.pt` says as client_state.json. Then the code of docs/hf2fsdp.md is run on it, as
printed, and what the model holds is written as printed.safetensors.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests import child
from tests.fsdp.oracle import ranks, shardings
from tests.models import released

_PAGE = child.ROOT / "docs" / "hf2fsdp.md"


def main(folder: Path, names: list[str]) -> None:
    for name in names:  # imported once, before the ranks fork
        getattr(transformers, released.class_of(name))
    ranks.run(2, functools.partial(_load_all, folder, names))


def _load_all(folder: Path, names: list[str]) -> None:
    for name in names:
        here = folder / name
        model = _sharded(here / "base", released.class_of(name))
        states = _load_ckpt(model, here / "run" / "_actor")
        _write(model, here / "loaded.safetensors")
        (here / "client_state.json").write_text(json.dumps(states))
        model = _sharded(here / "base", released.class_of(name))
        _as_printed(model, here / "printed")
        _write(model, here / "printed.safetensors")


def _sharded(base: Path, class_name: str) -> nn.Module:
    """A loaded model of other values, in float32 as `prepare_model` makes it for training."""
    config = transformers.AutoConfig.from_pretrained(base)
    torch.manual_seed(11)
    model: nn.Module = getattr(transformers, class_name)._from_config(config)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    for module in model.modules():
        if type(module).__name__.endswith(("Embedding", "DecoderLayer", "VisionBlock")):
            fully_shard(module, mesh=mesh)
    for name, module in model.named_modules():
        if "lm_head" in name:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to(torch.float32)


def _load_ckpt(model: nn.Module, load_dir: Path) -> dict[str, int]:
    latest = max(load_dir.glob("global_step*"), key=lambda path: int(path.name[11:]))
    state = get_model_state_dict(model)
    dcp.load(state_dict=state, checkpoint_id=str(latest))
    set_model_state_dict(model, state)
    states: dict[str, int] = torch.load(latest / "client_state.pt")
    return states


def _as_printed(model: nn.Module, folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", _PAGE.read_text("utf-8"), re.DOTALL)
    os.chdir(folder)
    exec(code, {"model": model})


def _write(model: nn.Module, target: Path) -> None:
    found = shardings.gather(model)
    if distributed.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in found.items()}, target)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
