"""The real frameworks, each behind the same few verbs: train, save, load, and look inside."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Protocol

import msgspec
import torch
from safetensors.torch import save_file
from torch import distributed

from tests.state import model as models
from tests.state.deepspeed_engine import Deepspeed
from tests.state.engine_parts import Tensors
from tests.state.fsdp_engine import Fsdp
from tests.state.jobs import Job, Place, Result


class Framework(Protocol):
    """A model in training."""

    def step(self, ids: torch.Tensor) -> torch.Tensor: ...
    def save(self, place: Place) -> None: ...
    def load(self, place: Place) -> dict[str, object]: ...
    def tensors(self) -> Tensors:
        """Weights and moments in full and in float32, as `param.NAME` and `exp_avg.NAME`."""

    def optimizer(self) -> torch.optim.Optimizer: ...
    def end(self) -> None: ...


def work(job: Job) -> None:
    """Do a job; every rank of its world calls it."""
    framework = Deepspeed(job) if job.engine.startswith("zero") else Fsdp(job)
    client: dict[str, object] = {} if job.load is None else framework.load(job.load)
    record(job, framework, "start", client)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    losses = []
    for step in range(*job.steps):
        ids = models.batch(step, rank, world)
        loss = framework.step(ids).detach().double().reshape(1).clone()
        distributed.all_reduce(loss)
        losses.append(loss.item() / world)
    for place in (*(() if job.save is None else (job.save,)), *job.more):
        framework.save(place)
    record(job, framework, "end", client, losses)
    framework.end()
    distributed.barrier()


def record(
    job: Job, framework: Framework, when: str, client: dict[str, object], losses: Any = ()
) -> None:
    """Write `<when>.safetensors` and `<when>.json` (a `Result`) in the job's folder."""
    tensors = framework.tensors()
    inner = framework.optimizer()
    groups = tuple(
        {k: v for k, v in group.items() if k in ("lr", "weight_decay", "betas", "initial_lr")}
        for group in inner.param_groups
    )
    counts = {float(state["step"]) for state in inner.state.values() if "step" in state}
    if distributed.get_rank() == 0:
        out = Path(job.out)
        out.mkdir(parents=True, exist_ok=True)
        save_file({n: t.detach().float().contiguous().clone() for n, t in tensors.items()},
                  out / f"{when}.safetensors")  # fmt: skip
        result = Result(tuple(losses), groups, tuple(sorted(counts)), client)
        (out / f"{when}.json").write_bytes(msgspec.json.encode(result))


def _operators() -> None:
    """DeepSpeed's operators in torch, which would have to be compiled first."""
    from tests.oracle.worker import TorchAdam, TorchFusedAdam

    for name, builder, made in (
        ("cpu_adam", "CPUAdamBuilder", TorchAdam),
        ("fused_adam", "FusedAdamBuilder", TorchFusedAdam),
    ):
        setattr(importlib.import_module(f"deepspeed.ops.adam.{name}"), builder, made)


def join(rank: int, world: int, meeting: str) -> None:
    """Enter the process group whose ranks meet at the file `meeting`."""
    import deepspeed

    from tests.oracle.worker import without_shm_op

    without_shm_op()
    _operators()
    os.environ["LOCAL_RANK"] = str(rank)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
