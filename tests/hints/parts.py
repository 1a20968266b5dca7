"""Hints that name an option for a reward model, a head or an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.flags import with_options


def _reward(at: Path) -> tuple[Path, Path]:
    width = tiny.config()["hidden_size"]
    body = {f"model.{k}": v for k, v in tiny.state().items() if k != tiny.HEAD}
    heads = {
        "preference_head.0.weight": torch.randn(width, width),
        "preference_head.0.bias": torch.randn(width),
        "preference_head.1.weight": torch.randn(width),
        "preference_head.3.weight": torch.randn(1, width),
    }
    base = tiny.model(at / "base", architectures=["LlamaForCausalLM"])
    return tiny.saved(at / "x.pt", {**body, **heads}), base


def _of_rewards(at: Path, wrong: dict[str, Any], right: dict[str, Any]) -> Case:
    run, base = _reward(at)
    common = {"base": base, "model_type": "srm_vl", "srm_format": "split"}
    return with_options(run, at, {**common, **wrong}, {**common, **right})


@follows("Pass --pooling_method {}.")
def pooling(at: Path) -> Case:
    return _of_rewards(at, {"pooling_method": "attn"}, {"pooling_method": "last"})


@follows("Leave out --scale_for_train.")
def scale(at: Path) -> Case:
    return _of_rewards(at, {"scale_for_train": True}, {})


@follows("Pass --heads_types {}.")
def heads(at: Path) -> Case:
    return _of_rewards(at, {"heads_types": ["safety"]}, {"heads_types": ["preference"]})


@follows("Pass --probing_layer between {} and {}.")
def probing(at: Path) -> Case:
    layers = tiny.config()["num_hidden_layers"]
    return _of_rewards(at, {"probing_layer": layers}, {"probing_layer": layers - 1})


@follows("Pass --probing-layer with the value used in training.")
def assumed(at: Path) -> Case:
    return _of_rewards(at, {}, {"probing_layer": 0})


@follows("Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.")
def alpha(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    return with_options(run, at, {"base": base}, {"base": base, "lora_alpha": 4})


@follows("Pass --lora-alpha, or --adapter-config with the run's adapter_config.json.")
def alpha_from_its_config(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    config = tiny.adapter_config(at / "elsewhere")
    return with_options(run, at, {"base": base}, {"base": base, "adapter_config": config})


@follows("Pass --lora-alpha.")
def alpha_of_zero(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    tiny.adapter_config(at / "run", lora_alpha=0)
    return with_options(run, at, {"base": base}, {"base": base, "lora_alpha": 4})


@follows("Pass the run's own with --adapter-config, or --lora-alpha.")
def config_of_another_rank(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    tiny.adapter_config(at / "run", r=8)
    return with_options(run, at, {"base": base}, {"base": base, "lora_alpha": 4})


@follows("Pass the run's own with --adapter-config.")
def named_config_of_another_rank(at: Path) -> Case:
    run, base = tiny.saved(at / "run" / "x.pt", tiny.tuned()), tiny.model(at / "base")
    other, own = tiny.adapter_config(at / "other", r=8), tiny.adapter_config(at / "own")
    common: dict[str, Any] = {"base": base, "lora_alpha": 4}
    return with_options(
        run, at, {**common, "adapter_config": other}, {**common, "adapter_config": own}
    )


@follows("Leave out --lora.")
def no_adapters(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(run, at, {"base": base, "lora": "adapter"}, {"base": base})


@follows("Leave the option out, or name the checkpoint that holds the adapters.")
def alpha_without_adapters(at: Path) -> Case:
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")
    return with_options(run, at, {"base": base, "lora_alpha": 4}, {"base": base})


@follows("Name the one to use with --adapter.")
def two_adapters(at: Path) -> Case:
    second = {k.replace("default", "other"): v + 1 for k, v in tiny.adapters().items()}
    run = tiny.saved(at / "run" / "x.pt", {**tiny.tuned(), **second})
    common: dict[str, Any] = {"base": tiny.model(at / "base"), "lora_alpha": 4}
    return with_options(run, at, common, {**common, "adapter": "other"})


def _norm_trained(at: Path) -> Path:
    """A run that trained a norm beside its adapters."""
    tensors = tiny.tuned()
    tensors["base_model.model.model.norm.weight"] += 1
    return tiny.saved(at / "run" / "x.pt", tensors)


@follows("To write the whole model, pass --lora merge; to leave them out, --allow {}.")
def trained_beside_adapters(at: Path) -> Case:
    run = _norm_trained(at)
    common: dict[str, Any] = {"base": tiny.model(at / "base"), "lora_alpha": 4}
    return with_options(run, at, {**common, "lora": "adapter"}, {**common, "lora": "merge"})


@follows("To write the whole model, pass --lora merge; to leave them out, --allow {}.")
def trained_beside_adapters_left_out(at: Path) -> Case:
    run = _norm_trained(at)
    common = {"base": tiny.model(at / "base"), "lora_alpha": 4, "lora": "adapter"}
    allowing = {**common, "allow": ["model.norm.weight"]}
    return with_options(run, at, common, allowing)


@follows("To write the whole model, pass --lora merge.")
def adapters_alone(at: Path) -> Case:
    run = _norm_trained(at)
    common: dict[str, Any] = {"base": tiny.model(at / "base"), "lora_alpha": 4}
    alone = {**common, "lora": "adapter", "allow": ["model.norm.weight"]}
    return with_options(run, at, alone, {**common, "lora": "merge"})
