"""One rank: makes every recipe of its world size, one after the other, in one process group."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import argparse
import copy
import gc
import importlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.utils import groups as ds_groups
from safetensors.torch import save_file
from torch import distributed, nn

from tests.oracle import models, truth
from tests.oracle.recipes import Recipe, Save


@dataclass(frozen=True, slots=True)
class Rank:
    """Which process this is."""

    rank: int
    world: int


class TorchAdam:
    """The operator of DeepSpeedCPUAdam in torch; the real one would have to be compiled first.

    DeepSpeed allows bf16 masters with no other optimizer. How a step rounds is all the same to the
    checkpoint's layout.
    """

    def load(self) -> TorchAdam:
        return self

    def create_adam(self, *_: object) -> None:
        """The compiled operator keeps a table of optimizers; nothing to keep here."""

    destroy_adam = create_adam

    def adam_update(
        self,
        optimizer: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        decay: float,
        correct_bias: bool,
        parameter: torch.Tensor,
        gradient: torch.Tensor,
        mean: torch.Tensor,
        square: torch.Tensor,
    ) -> None:
        gradient = gradient.to(mean.dtype)
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient**2, 1 - beta2)
        corrections = (1 - beta1**step, 1 - beta2**step) if correct_bias else (1.0, 1.0)
        update = mean / corrections[0] / ((square / corrections[1]).sqrt() + eps)
        parameter.mul_(1 - lr * decay).sub_(lr * update.to(parameter.dtype))


class TorchFusedAdam:
    """The operator of FusedAdam on the CPU in torch, for the same reason: Muon takes it for what is
    no matrix."""

    def load(self) -> TorchFusedAdam:
        return self

    def multi_tensor_adam(
        self,
        chunk: int,
        overflow: torch.Tensor,
        lists: list[list[torch.Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        decoupled: int,
        correct_bias: int,
        decay: float,
    ) -> None:
        assert decoupled
        for gradient, parameter, mean, square in zip(*lists, strict=True):
            TorchAdam().adam_update(
                0, step, lr, beta1, beta2, eps, decay, bool(correct_bias), parameter, gradient,
                mean, square,
            )  # fmt: skip


def without_shm_op() -> None:
    """Have DeepSpeed use gloo alone: its shared-memory operator is compiled when first used, for a
    minute, and hangs with several ranks on few cores."""
    # `deepspeed.comm.torch` as an attribute is torch itself, hence the import by name.
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined]


def join(rank: Rank, rendezvous: Path) -> None:
    """Enter the process group whose ranks meet at the file `rendezvous`."""
    without_shm_op()
    cpu_adam = importlib.import_module("deepspeed.ops.adam.cpu_adam")
    cpu_adam.CPUAdamBuilder = TorchAdam  # type: ignore[attr-defined]
    if _device() == "cpu":
        fused_adam = importlib.import_module("deepspeed.ops.adam.fused_adam")
        fused_adam.FusedAdamBuilder = TorchFusedAdam  # type: ignore[attr-defined]
    gpus = torch.cuda.device_count() if _device() == "cuda" else 0
    # NCCL refuses several ranks on one GPU; gloo copies their tensors through the CPU.
    backend_name = "cpu:gloo,cuda:nccl" if gpus >= rank.world else "gloo"
    os.environ["LOCAL_RANK"] = str(rank.rank % gpus if gpus else rank.rank)
    distributed.init_process_group(
        backend_name, init_method=f"file://{rendezvous}", rank=rank.rank, world_size=rank.world
    )
    deepspeed.init_distributed(backend_name, auto_mpi_discovery=False)


def _device() -> str:
    """What DeepSpeed trains on: `cpu` or `cuda`; the environment's DS_ACCELERATOR says which."""
    name: str = get_accelerator().device_name()
    return name


def make(recipe: Recipe, rank: Rank, folder: Path) -> None:
    """Train, save and write the truth of one recipe under `folder`."""
    torch.manual_seed(7)
    config = _config(recipe)
    module = _module(recipe, config)
    if rank.rank == 0:
        _save_base(recipe, module, folder / "base")
    groups = _groups(recipe, module)
    named = dict(module.named_parameters())
    optimizer, parameters = _optimizer(recipe, groups, named)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, model_parameters=parameters, config=config
    )
    batches = _batches(rank)
    for index, save in enumerate(recipe.saves):
        for _ in range(save.steps):
            engine.backward(_loss(engine, next(batches).to(_device())))
            engine.step()
        _save(engine, recipe, save, folder)
        _write_truth(truth.gather(engine, groups), recipe, save, rank, folder / f"truth-{index}")
    if recipe.universal and rank.rank == 0:
        _universal(folder / "checkpoint" / recipe.saves[-1].tag, folder / "universal")
    engine.destroy()
    ds_groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ leaves its group to later engines
    gc.collect()
    distributed.barrier()


def _config(recipe: Recipe) -> dict[str, Any]:
    zero: dict[str, object] = {"stage": recipe.stage, "reduce_bucket_size": 4096}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        # A scale of 2 ** 8: with the usual 2 ** 16 the first steps overflow and are skipped.
        "fp16": {"enabled": recipe.dtype == "float16", "initial_scale_power": 8},
        "zero_optimization": zero | dict(recipe.zero),
        "zero_allow_untested_optimizer": True,
        **recipe.config,
    }
    if recipe.optimizer == "Muon":
        config["optimizer"] = {"type": "Muon", "params": {"lr": 0.05}}
    return config


def _module(recipe: Recipe, config: dict[str, Any]) -> nn.Module:
    if recipe.zero_init:
        with deepspeed.zero.Init(config_dict_or_path=config):
            return models.build(recipe.model)
    return models.build(recipe.model)


def _save_base(recipe: Recipe, module: nn.Module, folder: Path) -> None:
    """The model before training, in the training run's type, for those that transformers loads."""
    if recipe.model.startswith("llama"):
        plain = copy.deepcopy(module)
    elif recipe.model.startswith("lora"):
        plain = copy.deepcopy(module).unload()  # without the adapters, which begin as no change
    else:
        return
    plain.to(getattr(torch, recipe.dtype)).save_pretrained(folder)


def _groups(recipe: Recipe, module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of each of the optimizer's groups, empty groups left out."""
    if recipe.optimizer == "Muon":
        return ()  # DeepSpeed makes its own groups: Muon's and Adam's
    trainable = {n: p for n, p in module.named_parameters() if truth.is_optimized(p)}
    if recipe.groups == "one":
        return (tuple(trainable),)
    single = {n for n, p in trainable.items() if p.numel() == 1 and recipe.groups == "three"}
    plain = {n for n, p in trainable.items() if p.ndim < 2} - single
    matrices = tuple(n for n in trainable if n not in plain | single)
    split = (matrices, tuple(n for n in trainable if n in plain), tuple(sorted(single)))
    return tuple(group for group in split if group)


def _optimizer(
    recipe: Recipe, groups: tuple[tuple[str, ...], ...], named: dict[str, nn.Parameter]
) -> tuple[torch.optim.Optimizer | None, Any]:
    if recipe.optimizer == "Muon":
        return None, list(named.values())
    split = [
        {"params": [named[n] for n in group], "weight_decay": 0.1 if i == 0 else 0.0}
        for i, group in enumerate(groups)
    ]
    if recipe.optimizer == "CPUAdam":
        return DeepSpeedCPUAdam(split, lr=0.01), None
    if recipe.optimizer == "FusedAdam":
        return FusedAdam(split, lr=0.01), None
    return torch.optim.AdamW(split, lr=0.01), None


def _batches(rank: Rank) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank.rank)
    while True:
        yield torch.randint(models.VOCAB, (2, 9), generator=generator)


def _loss(engine: Any, ids: torch.Tensor) -> torch.Tensor:
    if hasattr(engine.module, "config"):  # transformers
        loss: torch.Tensor = engine(input_ids=ids, labels=ids).loss
    else:
        loss = engine(ids)
    return loss


def _save(engine: Any, recipe: Recipe, save: Save, folder: Path) -> None:
    root = folder / "checkpoint"
    engine.save_checkpoint(
        str(root),
        tag=save.tag,
        client_state=_client_state() if recipe.client_state else {},
        save_latest=save.latest,
        exclude_frozen_parameters=save.exclude_frozen,
    )
    if recipe.export_16bit:
        engine.save_16bit_model(str(folder / "export"))


def _client_state() -> dict[str, object]:
    """What users put beside their weights: classes of their own, numpy, recursion."""
    own: dict[str, object] = {"episode": 3, "args": argparse.Namespace(lr=0.1, name="run")}
    own["self"] = own
    return {
        "ds_oracle_user": own,
        "ds_oracle_numpy": {"loss": np.float64(0.5), "array": np.arange(3)},
        "ds_oracle_save": Save(),
        "ds_oracle_tensor": torch.arange(3),
    }


def _write_truth(found: truth.Truth, recipe: Recipe, save: Save, rank: Rank, folder: Path) -> None:
    if rank.rank != 0:
        return
    folder.mkdir(parents=True)
    save_file(found.masters, folder / "truth_fp32.safetensors")
    save_file(found.module, folder / "truth_module.safetensors")
    facts = {
        "recipe": recipe.name,
        "tag": save.tag,
        "world_size": rank.world,
        "zero_stage": recipe.stage,
        "deepspeed": deepspeed.__version__,
        "torch": torch.__version__,
        "buffers": found.buffers,
        "frozen": found.frozen,
        "tied": found.tied,
        "groups": found.groups,
        "dtypes": {n: str(t.dtype).removeprefix("torch.") for n, t in found.module.items()},
        "shapes": {n: list(t.shape) for n, t in found.module.items()},
    }
    (folder / "truth.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _universal(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
