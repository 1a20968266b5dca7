"""One torch.save file a rank: what FSDP runs save without torch.distributed.checkpoint.

verl (role folders; see `files` for how they are found):

    run/latest_checkpointed_iteration.txt                 "7"
    run/global_step_7/actor/fsdp_config.json              {"FSDP_version": 2, "world_size": 4}
    run/global_step_7/actor/model_world_size_4_rank_0.pt  {name: DTensor, ShardedTensor or Tensor}
    run/global_step_7/actor/huggingface/                  config, tokenizer; weights if asked for
    run/global_step_7/critic/...

accelerate and the HF Trainer, with use_dcp=False or LOCAL_STATE_DICT:

    pytorch_model_fsdp_0_rank0.bin    pytorch_model_fsdp_rank0.bin    one a rank

any script's `torch.save(model.state_dict(), f"model_rank{rank}.pt")`. FSDP1's LOCAL_STATE_DICT
holds flat parameters (see `local`).

A file holds a rank's parts of all tensors, and says of each which part it is: a DTensor by mesh and
placements, a ShardedTensor by offsets. Plain tensors are the same in every file. Optimizer files
(`optimizer`) and extra states lie beside; they are opened where the training state is asked for.
Read off verl 0.9.1 (utils/checkpoint/fsdp_checkpoint_manager.py), accelerate 1.15
(utils/fsdp_utils.py), torch 2.13, and files of theirs.
"""

from __future__ import annotations

from pathlib import Path

from reshard.core.catalog import Catalog
from reshard.formats import Selection
from reshard.formats.rank_files import files
from reshard.storage.local import Sources

# Every conversion asks each format whether it knows the folder: what that takes is imported above,
# the rest by those who need it.


def detect(path: Path) -> str | None:
    """Rank files in a folder, or in verl's role folders in it; or one such file."""
    return files.why(path)


def read(path: Path, sources: Sources, selection: Selection) -> Catalog:
    """The tensors of all ranks, each proven to be tiled by their parts."""
    from reshard.formats.rank_files import reading

    return reading.read(path, sources, selection)
