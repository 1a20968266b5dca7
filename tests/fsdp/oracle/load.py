"""Loads a checkpoint of a `Decoder` into FSDP models: `python -m tests.fsdp.oracle.load DCP OUT`.

Writes what each kind of model gathers after loading, as OUT/<kind>-<world>.safetensors.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from tests.fsdp.oracle import ranks, shardings
from tests.fsdp.oracle.cases import Case

_CASES = (
    Case("fsdp2-4", 4),
    Case("fsdp2-2", 2),
    Case("fsdp2-1", 1),
    Case("fsdp1-2", 2, sharding="fsdp1"),
)


def main(checkpoint: Path, out: Path) -> None:
    # One GPU holds one rank.
    cases = [case for case in _CASES if ranks.DEVICE == "cpu" or case.world == 1]
    for case in cases:
        ranks.run(case.world, functools.partial(_load, case, checkpoint, out))


def _load(case: Case, checkpoint: Path, out: Path) -> None:
    model = shardings.build(case)
    state = shardings.state(model, case)
    dcp.load(state, checkpoint_id=checkpoint)
    _set(model, state)
    truth = shardings.gather(model)
    if distributed.get_rank() == 0:
        truth = {name: value.cpu() for name, value in truth.items()}
        save_file(truth, out / f"{case.name}.safetensors")


def _set(model: nn.Module, state: dict[str, object]) -> None:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT):
            model.load_state_dict(state)
    else:
        set_model_state_dict(model, state)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
