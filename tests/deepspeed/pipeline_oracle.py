"""Real pipeline-parallel runs of the real DeepSpeed (`PipelineModule`), and their truth.

Made by `python -m tests.deepspeed.pipeline_oracle FOLDER`:

FOLDER/<recipe>/checkpoint/              given to save_checkpoint
                universal/               what ds_to_universal made of it (tied)
                base/                    the untrained model, as transformers saves it
                truth.safetensors        by the hub's names: masters, else what the module holds
                moments.safetensors      `exp_avg.<name>`, `exp_avg_sq.<name>`

Layers are transformers' own: an embedding, a Llama's layers, a norm, a head.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from safetensors.torch import save_file
from torch import Tensor, distributed, nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from tests.deepspeed.making import main
from tests.oracle import worker
from tests.oracle.models import VOCAB, next_token_loss
from tests.oracle.worker import Rank

_LENGTH = 9
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Recipe:
    """One run: two stages, each of `world` / 2 data parallel ranks.

    `wrapped`: each layer is a module of the user's around the model's own. `tied`: the head is the
    embedding. `model_axis`: the topology has an axis of tensor parallelism, of one rank. Not
    `staged`: the same layers in an `nn.Sequential`, without stages.
    """

    name: str
    world: int = 2
    stage: int = 1
    dtype: str = "bfloat16"
    wrapped: bool = False
    tied: bool = False
    model_axis: bool = False
    frozen: bool = False
    staged: bool = True
    steps: int = 2
    config: Mapping[str, object] = field(default_factory=dict)


_FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("plain"),
        Recipe("wrapped-w4", 4, dtype="float32", wrapped=True),
        Recipe("tied", tied=True),
        Recipe("tied-frozen-w4", 4, tied=True, frozen=True),
        Recipe("model-axis", model_axis=True, config=_FP32_ACCUMULATION),
        Recipe("no-zero", stage=0, dtype="float32"),
        Recipe("no-zero-bf16", stage=0),
        Recipe("sequential", staged=False),
    )
}


class Embed(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """The embedding as users wrap it."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(rows, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)


class Block(LlamaDecoderLayer):  # type: ignore[misc]
    """A layer that takes and gives hidden states alone."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1])[None]
        angles = self.rotary(hidden, positions)
        return super().forward(hidden, position_embeddings=angles, position_ids=positions)


class Wrapped(nn.Module):  # type: ignore[misc]
    """A layer within a module of the user's."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.layer = Block(config, index)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(hidden)


class Norm(nn.Module):  # type: ignore[misc]
    """The last norm and the head, in one layer."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.lm_head(self.norm(hidden))


def _head(embedding: nn.Embedding, hidden: Tensor) -> Tensor:
    return functional.linear(hidden, embedding.weight)


def _config(tied: bool) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=22,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )


def _layers(recipe: Recipe, config: Any) -> tuple[list[Any], dict[str, str]]:
    """The pipeline's layers, and the hub's prefix of what each of its own names begins with."""
    rows, width = config.vocab_size, config.hidden_size
    numbers = range(config.num_hidden_layers)
    last = config.num_hidden_layers
    if recipe.wrapped:
        blocks = [LayerSpec(Wrapped, config, index) for index in numbers]
        names = {f"{1 + index}.layer.": f"model.layers.{index}." for index in numbers}
        names |= {"0.": "model.", f"{last + 1}.norm.": "model.norm.", f"{last + 1}.": ""}
        return [LayerSpec(Embed, rows, width), *blocks, LayerSpec(Norm, config)], names
    blocks = [LayerSpec(Block, config, index) for index in numbers]
    names = {f"{2 + index}.": f"model.layers.{index}." for index in numbers}
    norm = LayerSpec(nn.RMSNorm, width, config.rms_norm_eps)
    names[f"{last + 2}."] = "model.norm."
    if recipe.tied:
        first = TiedLayerSpec("embed", nn.Embedding, rows, width)
        end = TiedLayerSpec("embed", nn.Embedding, rows, width, forward_fn=_head)
        names["tied_modules.embed."] = "model.embed_tokens."
    else:
        first = LayerSpec(nn.Embedding, rows, width)
        end = LayerSpec(nn.Linear, width, rows, bias=False)
        names |= {"0.": "model.embed_tokens.", f"{last + 3}.": "lm_head."}
    # A layer without parameters, as users have for masks and reshapes.
    return [first, LayerSpec(nn.Dropout, 0.0), *blocks, norm, end], names


def make(recipe: Recipe, rank: Rank, folder: Path) -> None:
    """Train, save and write the truth of one recipe under `folder`."""
    torch.manual_seed(7)
    config = _config(recipe.tied)
    layers, names = _layers(recipe, config)
    module = _module(recipe, layers)
    for name, parameter in module.named_parameters():
        if recipe.frozen and "q_proj" in name:
            parameter.requires_grad_(False)
    if rank.rank == 0:
        torch.manual_seed(8)
        transformers.LlamaForCausalLM(config).to(getattr(torch, recipe.dtype)).save_pretrained(
            folder / "base"
        )
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=[p for p in module.parameters() if p.requires_grad],
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_print": 10**9,
            "bf16": {"enabled": recipe.dtype == "bfloat16"},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": recipe.stage},
            **recipe.config,
        },
    )
    batches = _batches(rank)
    for _ in range(recipe.steps):
        if recipe.staged:
            engine.train_batch(batches)
            continue
        for _ in range(engine.gradient_accumulation_steps()):
            ids, labels = next(batches)
            engine.backward(next_token_loss(engine(ids), labels))
            engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))
    _write_truth(engine, recipe, names, rank, folder)
    if recipe.name == "tied" and rank.rank == 0:
        worker._universal(folder / "checkpoint" / "global_step2", folder / "universal")


def _module(recipe: Recipe, layers: list[Any]) -> nn.Module:
    if not recipe.staged:
        return nn.Sequential(*(layer.build() for layer in layers)).to(getattr(torch, recipe.dtype))
    topology = PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=recipe.world // 2)
    stages = {"topology": topology} if recipe.model_axis else {"num_stages": 2}
    return PipelineModule(layers, loss_fn=next_token_loss, partition_method="uniform", **stages)


def _batches(rank: Rank) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank.rank % max(rank.world // 2, 1))
    while True:
        ids = torch.randint(VOCAB, (2, _LENGTH), generator=generator)
        yield ids, ids


def _write_truth(
    engine: Any, recipe: Recipe, names: Mapping[str, str], rank: Rank, folder: Path
) -> None:
    """What all stages hold. A collective."""
    mine: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for own, parameter in engine.module.named_parameters():
        start = max((s for s in names if own.startswith(s)), key=len)
        name = names[start] + own.removeprefix(start)
        value = parameter.detach()
        if parameter.requires_grad and hasattr(parameter, "_hp_mapping"):
            value = safe_get_full_fp32_param(parameter)
            for kind in _MOMENTS:
                moment = safe_get_full_optimizer_state(parameter, kind)
                moments[f"{kind}.{name}"] = moment.detach().clone()
        mine[name] = value.detach().clone().contiguous()
    everyone: list[Any] = [None] * rank.world
    distributed.all_gather_object(everyone, (mine, moments))
    if rank.rank == 0:
        weights = {name: tensor for held, _ in everyone for name, tensor in held.items()}
        states = {name: tensor for _, held in everyone for name, tensor in held.items()}
        save_file(weights, folder / "truth.safetensors")
        save_file(states or {"none": torch.zeros(1)}, folder / "moments.safetensors")


if __name__ == "__main__":
    main(RECIPES, make, Path(sys.argv[1]), sys.argv[2:])
