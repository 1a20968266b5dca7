"""Saves each rank's state dict with torch.save, in real ranks: `python -m tests.ranks.save FOLDER`.

The models and the ways of laying them over ranks are those of `tests.fsdp.oracle`.
"""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed

from tests.fsdp.oracle import ranks, shardings
from tests.fsdp.oracle.cases import Case


@dataclass(frozen=True)
class Save:
    """A case of the oracle, and where its ranks save: `{world}` and `{rank}` stand for numbers."""

    case: Case
    file: str


_VERL = "run/global_step_3/actor/model_world_size_{world}_rank_{rank}.pt"
_ACCELERATE = "pytorch_model_fsdp_0_rank{rank}.bin"
_LOCAL = "pytorch_model_fsdp_rank{rank}.bin"
SAVES: tuple[Save, ...] = (
    Save(Case("hsdp", 4, sharding="hsdp"), _VERL),
    Save(Case("fsdp-tp", 4, sharding="fsdp-tp"), "model_rank_{rank}_of_{world}.pt"),
    Save(Case("fsdp1-w4", 4, sharding="fsdp1", dtype="bfloat16"), _VERL),
    Save(Case("odd-w4", 4, model="odd"), _ACCELERATE),
    Save(Case("odd-verl", 3, model="odd"), _VERL),
    Save(Case("fsdp2-w3", 3, dtype="bfloat16"), "rank{rank}.pt"),
    Save(Case("st-w3", 3, sharding="fsdp1-st"), _VERL),
    Save(Case("dtypes-w3", 3, model="dtypes", sharding="shards"), "shards.rank-{rank}.pth"),
    Save(Case("lightrft-mesh", 2, sharding="lightrft"), _VERL),
    Save(Case("tied", 2, model="tied"), _VERL),
    Save(Case("local-w2", 2, sharding="fsdp1-local"), _LOCAL),
    Save(Case("local-bf16", 2, sharding="fsdp1-local", dtype="bfloat16"), _LOCAL),
    Save(Case("local-cloned", 2, sharding="fsdp1-local"), _LOCAL),
    Save(Case("flat-w2", 2, sharding="fsdp1-flat"), _LOCAL),
    Save(Case("one-rank", 1), _VERL),
    Save(Case("one-rank-fsdp1", 1, sharding="fsdp1-st"), _VERL),
    Save(Case("one-file", 1), "model.pt"),
)
BY_NAME = {save.case.name: save for save in SAVES}


def main(folder: Path) -> None:
    for world in sorted({save.case.world for save in SAVES}):
        mine = [save for save in SAVES if save.case.world == world]
        ranks.run(world, functools.partial(_save_all, mine, folder))


def _save_all(saves: list[Save], folder: Path) -> None:
    for save in saves:
        _save(save, folder / save.case.name)
        distributed.barrier()


def _save(save: Save, folder: Path) -> None:
    torch.manual_seed(11)
    case, rank = save.case, distributed.get_rank()
    if case.model == "dtypes":
        state, truth = shardings.every_dtype(case.world)
    else:
        model = shardings.build(case)
        state, truth = shardings.state(model, case), shardings.gather(model)
    if case.name == "local-cloned":  # as when each tensor is copied to the CPU
        state = {n: t.clone() if type(t) is torch.Tensor else t for n, t in state.items()}
    path = folder / "checkpoint" / save.file.format(rank=rank, world=case.world)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    if rank == 0:
        if path.name.startswith("model_world_size"):
            config = {"FSDP_version": 2, "world_size": case.world}
            path.with_name("fsdp_config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file({n: t.contiguous() for n, t in truth.items()}, folder / "truth.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
