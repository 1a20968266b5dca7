"""What lies where: the state and the folders of each framework that saves by DCP."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import fsdp_utils
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

from tests.fsdp.oracle import shardings, writers
from tests.fsdp.oracle.cases import Case


@dataclass(frozen=True, slots=True)
class Run:
    """A running training run of one case, as this rank sees it."""

    case: Case
    model: nn.Module
    optimizer: torch.optim.Optimizer
    folder: Path

    @property
    def state(self) -> dict[str, Any]:
        return shardings.state(self.model, self.case)

    @property
    def optimizer_state(self) -> dict[str, Any]:
        return shardings.optimizer_state(self.model, self.optimizer)


def save(run: Run) -> None:
    """Save the run as its case's framework does."""
    _LAYOUTS[run.case.layout](run)


def _plain(run: Run) -> None:
    state = run.state
    if run.case.writer == "hf-full":
        state = shardings.gather(run.model)
    writers.save(state, run.folder, run.case.writer)


def _unflattened(run: Run) -> None:
    writers.save(run.state, run.folder, "default", flatten=False)


def _lightrft(run: Run) -> None:
    # lightrft/strategy/fsdp: the model's plain names, the optimizer in a checkpoint of its own.
    tag = run.folder / run.case.where
    writers.save(run.state, tag, "default")
    writers.save(run.optimizer_state, tag / "optim_states", "default")
    if distributed.get_rank() == 0:
        client_state = {"global_step": 6, "args": argparse.Namespace(lr=1e-6), "seed": (1, 2)}
        torch.save(client_state, tag / "client_state.pt")
        torch.save({"last_epoch": 6}, tag / "scheduler_state.pt")


def _accelerate(run: Run, ranks: bool = False) -> None:
    # accelerate's own functions; its Accelerator refuses FSDP without an accelerator device.
    plugin = SimpleNamespace(
        fsdp_version=1 if isinstance(run.model, FullyShardedDataParallel) else 2,
        state_dict_type=StateDictType.SHARDED_STATE_DICT,
        state_dict_config=None,
        optim_state_dict_config=None,
        optim_state_dict_type=StateDictType.SHARDED_STATE_DICT,
    )
    rank = distributed.get_rank()
    fsdp_utils.logger = SimpleNamespace(info=lambda message: None)
    accelerator = SimpleNamespace(process_index=rank, num_processes=run.case.world)
    fsdp_utils.save_fsdp_model(plugin, accelerator, run.model, run.folder, use_dcp=not ranks)
    fsdp_utils.save_fsdp_optimizer(
        plugin, accelerator, run.optimizer, run.model, run.folder, use_dcp=not ranks
    )


def _titan(run: Run) -> None:
    # torchtitan/components/checkpoint.py: the model's keys at the top level.
    optimizer = shardings.flat_optimizer_state(run.model, run.optimizer)
    progress = {"step": torch.tensor(5, dtype=torch.int32), "losses": [1.5, 1.25], "name": "run"}
    state = {
        **run.state,
        "optimizer": optimizer,
        "lr_scheduler": {"last_epoch": 5},
        "train_state": progress,
        "dataloader": {"dp_rank_0": b"position"},
    }
    writers.save(state, run.folder / run.case.where, run.case.writer)


def _nested(run: Run) -> None:
    state = {"model": run.state, "optimizer": run.optimizer_state, "step": 5}
    writers.save(state, run.folder, run.case.writer)


class _AppState:
    """A Stateful wrapper, as torch's own tutorial of DCP has it."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def state_dict(self) -> dict[str, Any]:
        return {"model": self._run.state, "optim": self._run.optimizer_state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _app(run: Run) -> None:
    writers.save({"app": _AppState(run)}, run.folder, run.case.writer)


def _lightning(run: Run) -> None:
    # lightning/fabric/strategies/model_parallel.py; the names carry the LightningModule's field.
    weights = {f"model.{name}": value for name, value in run.state.items()}
    writers.save({"state_dict": weights, "optimizer_0": run.optimizer_state}, run.folder, "default")
    if distributed.get_rank() == 0:
        torch.save({"epoch": 1, "global_step": 5}, run.folder / "meta.pt")


def _extras(run: Run) -> None:
    """Items that are not tensors, in every shape that flattening leaves them."""
    extras: dict[str, Any] = {
        "config": argparse.Namespace(lr=0.1),
        "tags": ["a", "b"],
        "history": [{"loss": torch.tensor(0.5)}, {"loss": 0.25}],
        "nothing": {},
        "epoch": 3,
    }
    writers.save({"model": run.state, "extra": extras}, run.folder, run.case.writer)


def _local(run: Run) -> None:
    name = f"pytorch_model_fsdp_rank{distributed.get_rank()}.bin"
    run.folder.mkdir(parents=True, exist_ok=True)
    torch.save(run.state, run.folder / name)


def _verl(run: Run) -> None:
    # verl/utils/checkpoint/fsdp_checkpoint_manager.py
    folder = run.folder / run.case.where
    folder.mkdir(parents=True, exist_ok=True)
    suffix = f"world_size_{run.case.world}_rank_{distributed.get_rank()}.pt"
    torch.save(run.state, folder / f"model_{suffix}")
    torch.save(run.optimizer_state, folder / f"optim_{suffix}")


_LAYOUTS: dict[str, Callable[[Run], None]] = {
    "plain": _plain,
    "unflattened": _unflattened,
    "lightrft": _lightrft,
    "accelerate": _accelerate,
    "accelerate-ranks": lambda run: _accelerate(run, ranks=True),
    "titan": _titan,
    "nested": _nested,
    "app": _app,
    "lightning": _lightning,
    "extras": _extras,
    "local": _local,
    "verl": _verl,
}
