"""Loads DCP checkpoints into running FSDP2 models: `python -m tests.models.running FOLDER NAME ...`

FOLDER/<name>/base/                    a Hugging Face folder, of which the config is used here
              dcp/                     the checkpoint to load
              running-<w>.safetensors   written: what the model of w ranks holds after dcp.load
              keys.json                 written: the keys that it asked for
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard

from tests.fsdp.oracle import ranks
from tests.models import released


def main(folder: Path, names: list[str]) -> None:
    for name in names:  # imported once, before the ranks fork
        getattr(transformers, released.class_of(name))
    for world in (1, 2):
        ranks.run(world, functools.partial(_load_all, folder, names))


def _load_all(folder: Path, names: list[str]) -> None:
    for name in names:
        _load(folder / name, released.class_of(name))


def _load(folder: Path, class_name: str) -> None:
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    torch.manual_seed(11)
    model: nn.Module = getattr(transformers, class_name)._from_config(config)
    for module in model.modules():
        if type(module).__name__.endswith(("DecoderLayer", "EncoderLayer", "VisionBlock")):
            fully_shard(module)
    fully_shard(model)
    state = get_model_state_dict(model)
    keys = list(state)
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_model_state_dict(model, state)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if distributed.get_rank() == 0:
        tensors = {name: value.clone().contiguous() for name, value in full.items()}
        save_file(tensors, folder / f"running-{distributed.get_world_size()}.safetensors")
        (folder / "keys.json").write_text(json.dumps(keys))
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
