"""Real runs of the real DeepSpeed with tensor parallelism (AutoTP) or experts, and their truth.

Made by `python -m tests.deepspeed.parallel_oracle FOLDER`, each in ranks of its own:

FOLDER/<recipe>/checkpoint/              given to save_checkpoint
                truth_fp32.safetensors   the masters, gathered from the running engine
                truth_moments.safetensors    `exp_avg.NAME` and `exp_avg_sq.NAME`, gathered likewise
                truth_module.safetensors what the module computes with, by every name, whole
                base/                    the untrained model (those that transformers loads)

Which parts make a whole is asked of the running layers (`gather_params`), never of what is saved.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, distributed, nn

from tests.deepspeed.making import main
from tests.oracle import models
from tests.oracle.worker import Rank

_HIDDEN, _PACKED = 8, (8, 4, 4)


@dataclass(frozen=True)
class Recipe:
    """One run: `world` ranks, of which every `tensor_parallel` share one model."""

    name: str
    world: int
    stage: int
    model: str
    tensor_parallel: int = 1
    dtype: str = "bfloat16"
    steps: int = 2
    frozen: str = ""
    config: Mapping[str, object] = field(default_factory=dict)


# The layers of `Packed`; AutoTP knows those of transformers by itself.
_PACKED_LAYERS = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*packed\.weight$"],
            "partition_type": "column",
            "shape": [list(_PACKED), -1],
            "partition_dim": 0,
        },
        {
            "patterns": [r".*halves\.weight$"],
            "partition_type": "column",
            "shape": [2, -1],
            "partition_dim": 0,
        },
        {"patterns": [r".*down\.weight$"], "partition_type": "row"},
    ],
}
_DATA_FIRST = {"use_data_before_expert_parallelism": True}

_FROZEN = r".*layers\.0\..*|lm_head.*"

TENSOR_PARALLEL = (
    Recipe("tp-zero0", 2, 0, "llama", 2, "float32"),
    Recipe("tp-zero1", 2, 1, "qwen2", 2),
    Recipe("tp-zero2-w4", 4, 2, "qwen2", 2, frozen=_FROZEN),
    Recipe("tp-zero3-w4", 4, 3, "qwen2", 2, frozen=_FROZEN),
    Recipe("tp-tied-zero2", 2, 2, "llama-tied", 2),
    Recipe("tp-tied-zero3", 2, 3, "llama-tied", 2),
    Recipe("tp-three-zero2", 3, 2, "llama", 3, steps=0),
    Recipe("tp-packed-zero1-w4", 4, 1, "packed", 2),
    Recipe("tp-packed-zero3", 2, 3, "packed", 2),
)
EXPERTS = (
    Recipe("experts-zero0", 2, 0, "experts"),
    Recipe("experts-zero1", 2, 1, "experts"),
    Recipe("experts-zero2-w4", 4, 2, "experts"),
    Recipe("experts-data-first", 4, 1, "experts", config=_DATA_FIRST),
)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (*TENSOR_PARALLEL, *EXPERTS)}


class Packed(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """Projections that hold three unequal and two equal sub-parameters, biases, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, _HIDDEN)
        self.packed = nn.Linear(_HIDDEN, sum(_PACKED))
        self.halves = nn.Linear(_HIDDEN, 24)
        self.down = nn.Linear(12 + 8, _HIDDEN)
        self.head = nn.Linear(_HIDDEN, models.VOCAB, bias=False)
        self.register_buffer("count", torch.tensor(2**53 + 1))
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        packed = self.packed(x)  # a rank has its share of each sub-parameter
        shares = [packed.shape[-1] * size // sum(_PACKED) for size in _PACKED]
        a, b, c = packed.split(shares, dim=-1)
        gate, up = self.halves(x).chunk(2, dim=-1)
        mixed = torch.cat([a + torch.cat([b, c], dim=-1), torch.tanh(gate) * up], dim=-1)
        return models.next_token_loss(self.head(x + self.down(mixed)), ids)


class Mixtures(nn.Module):  # type: ignore[misc]
    """Four experts, two on each rank; then two on every rank, with a residual one beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 6)
        self.first = MoE(6, nn.Linear(6, 6), num_experts=4, ep_size=2, k=1, min_capacity=1)
        self.second = MoE(
            6, nn.Linear(6, 6), num_experts=2, ep_size=1, k=1, min_capacity=1, use_residual=True
        )
        self.head = nn.Linear(6, models.VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x, balance, _ = self.first(self.embed(ids))
        x, more, _ = self.second(x)
        return models.next_token_loss(self.head(x), ids) + 0.01 * (balance + more)


def make(recipe: Recipe, rank: Rank, folder: Path) -> None:
    """Train, save and write the truth of one recipe under `folder`."""
    torch.manual_seed(7)
    module = _module(recipe)
    if recipe.model not in ("packed", "experts") and rank.rank == 0:
        module.save_pretrained(folder / "base")
    for name, parameter in module.named_parameters():
        if re.fullmatch(recipe.frozen, name):
            parameter.requires_grad_(False)
    trained: Any = [p for p in module.parameters() if p.requires_grad]
    if recipe.model == "experts":
        trained = split_params_into_different_moe_groups_for_optimizer(
            {"params": trained, "name": "all"}
        )
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=trained, config=_config(recipe)
    )
    generator = torch.Generator().manual_seed(100 + rank.rank // recipe.tensor_parallel)
    for _ in range(recipe.steps):
        ids = torch.randint(models.VOCAB, (2, 9), generator=generator)
        named = {"input_ids": ids, "labels": ids} if hasattr(module, "config") else {"ids": ids}
        found = engine(**named)
        engine.backward(found if isinstance(found, Tensor) else found.loss)
        engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))
    masters, state = _truth(engine, recipe)
    moments = _moments(engine, recipe) if recipe.stage and recipe.steps else {}
    if rank.rank == 0:
        save_file(moments, folder / "truth_moments.safetensors")
        save_file(masters, folder / "truth_fp32.safetensors")
        save_file(state, folder / "truth_module.safetensors")


def _config(recipe: Recipe) -> dict[str, object]:
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "bf16": {"enabled": recipe.dtype == "bfloat16"},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": recipe.stage, "reduce_bucket_size": 4096},
        **recipe.config,
    }
    if recipe.tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": recipe.tensor_parallel}
    if recipe.model == "packed":
        config["tensor_parallel"] = {"autotp_size": 2, "partition_config": _PACKED_LAYERS}
    return config


def _module(recipe: Recipe) -> nn.Module:
    if recipe.model == "packed":
        return Packed()
    if recipe.model == "experts":
        return Mixtures()
    if recipe.model == "qwen2":
        return _qwen2().to(getattr(torch, recipe.dtype))
    return models.llama(tied=recipe.model == "llama-tied").to(getattr(torch, recipe.dtype))


def _qwen2() -> nn.Module:
    """A random Qwen2: unlike Llama's, its projections of queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=models.VOCAB,
            hidden_size=16,
            intermediate_size=22,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def _truth(engine: Any, recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masters and module of the whole model, of all ranks. A collective."""
    masters, state = {}, {}
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            part = tensor.detach().clone()
        state[name] = _whole(tensor, part)
        if tensor.requires_grad and recipe.stage:
            # A rank that holds no element of a parameter has no master of it.
            master = safe_get_full_fp32_param(tensor) if part.numel() else part.float()
            masters[name] = _whole(tensor, master.detach().clone())
        elif tensor.requires_grad and recipe.dtype == "float32":
            masters[name] = state[name]
    if recipe.model == "experts":
        masters, state = (_global_experts(tensors) for tensors in (masters, state))
    for name, master in masters.items():
        if not torch.equal(master.to(state[name].dtype), state[name]):
            raise RuntimeError(f"{name}: the master gathered is not what the module computes with")
    return masters, state


def _moments(engine: Any, recipe: Recipe) -> dict[str, Tensor]:
    """Adam's moments of the whole model, of all ranks. A collective."""
    found = {}
    for name, tensor in engine.module.named_parameters():
        if not tensor.requires_grad:
            continue
        for kind in ("exp_avg", "exp_avg_sq"):
            found[f"{kind}.{name}"] = _whole(tensor, full_moment(engine, tensor, kind))
    return _global_experts(found) if recipe.model == "experts" else found


def full_moment(engine: Any, parameter: Any, kind: str) -> Tensor:
    """A moment of what this rank's module has of a parameter. A collective.

    Below stage 3 by the parameter's place in its group's flat buffer, as in `tests.oracle.truth`:
    of groups of experts DeepSpeed's own table lacks the moments.
    """
    if engine.zero_optimization_stage() == 3:
        found: Tensor = safe_get_full_optimizer_state(parameter, kind)
        return found.detach().clone()
    outer = engine.optimizer
    for index, group in enumerate(outer.bit16_groups):
        if any(parameter is other for other in group):
            low = outer.bit16_groups_flat[index]
            mine = outer.optimizer.state[outer.single_partition_of_fp32_groups[index]][kind]
            ranks = outer.real_dp_process_group[index]
            parts = [torch.empty_like(mine) for _ in range(distributed.get_world_size(ranks))]
            distributed.all_gather(parts, mine.contiguous(), group=ranks)
            start = (parameter.data_ptr() - low.data_ptr()) // low.element_size()
            flat = torch.cat(parts)[start : start + parameter.numel()]
            return flat.reshape(parameter.shape).clone()
    raise RuntimeError("no group of the optimizer has the parameter")


def _whole(tensor: Tensor, part: Tensor) -> Tensor:
    """A parameter, given this rank's part: joined by the layer that split it, if any did."""
    if not hasattr(tensor, "gather_params"):
        return part
    kept = tensor.data
    tensor.data = part
    tensor.gather_params([tensor])
    whole = tensor.data.clone().contiguous()
    tensor.data = kept
    return whole


def _global_experts(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all ranks; experts under their global numbers."""
    rank = groups._get_expert_parallel_rank("ep_size_2")

    def globally(match: re.Match[str]) -> str:
        return f"{match[1]}{rank * 2 + int(match[2])}"

    named = {re.sub(r"(first\..*_experts\.)(\d+)", globally, n): t for n, t in mine.items()}
    everyone: list[dict[str, Tensor]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everyone, named)
    found: dict[str, Tensor] = {}
    for theirs in everyone:
        for name, tensor in theirs.items():
            if not torch.equal(found.setdefault(name, tensor), tensor):
                raise RuntimeError(f"{name}: two ranks differ")
    return found


if __name__ == "__main__":
    main(RECIPES, make, Path(sys.argv[1]), sys.argv[2:])
