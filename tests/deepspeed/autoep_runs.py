"""Runs whose experts AutoEP split over two ranks: `python -m tests.deepspeed.autoep_runs FOLDER`.

FOLDER/<run>/base/                      the model that the run starts from
             checkpoint/                given to save_checkpoint
             universal/                 what ds_to_universal makes of it
             truth.safetensors          the masters by name, gathered from the running engine
             moments.safetensors    `exp_avg.NAME` and `exp_avg_sq.NAME`, likewise
             logits.safetensors         what the running engine answers to IDS

Which expert a rank holds is asked of the running layers, never of what is saved.
"""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed")

import gc
import importlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.checkpoint import ds_to_universal
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.module_inject.auto_ep_presets import base
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import distributed

from tests.deepspeed.parallel_oracle import full_moment
from tests.oracle import launch, models
from tests.oracle.worker import Rank

STAGES = (2, 3)
IDS = torch.arange(9)[None]
_TINY: dict[str, Any] = {
    "vocab_size": models.VOCAB, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 6,
}  # fmt: skip
_MLA = {"q_lora_rank": 4, "kv_lora_rank": 4, "qk_rope_head_dim": 2, "qk_nope_head_dim": 4,
        "v_head_dim": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "n_routed_experts": 4, "n_shared_experts": 1}  # fmt: skip
#: Run -> (preset, config class, config, stage). Those but for Mixtral have shared experts.
RUNS: dict[str, tuple[str, str, dict[str, Any], int]] = {
    **{f"zero{stage}": ("mixtral", "MixtralConfig",
                        {**_TINY, "intermediate_size": 6, "num_local_experts": 4}, stage)
       for stage in STAGES},
    "qwen2_moe": ("qwen3_moe", "Qwen2MoeConfig",
                  {**_TINY, "shared_expert_intermediate_size": 6, "num_experts": 4}, 2),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Config",
                    {**_TINY, **_MLA, "num_key_value_heads": 2, "intermediate_size": 6}, 2),
}  # fmt: skip


def make(name: str, rank: Rank, folder: Path) -> None:
    """Train, save and write the truth of a tiny model."""
    preset, kind, settings, stage = RUNS[name]
    # DeepSpeed 0.19.8 asks transformers 5.23 for hooks that only record outputs, and fails.
    base._install_instance_transformers_output_recorders = lambda *_, **__: True
    torch.manual_seed(7)
    config = getattr(transformers, kind)(**settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    if rank.rank == 0:
        model.save_pretrained(folder / "base")
    engine, *_ = deepspeed.initialize(model=model, config=_config(stage, preset))
    generator = torch.Generator().manual_seed(100 + rank.rank)
    for _ in range(2):
        ids = torch.randint(models.VOCAB, (2, 9), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(folder / "checkpoint"))
    masters = _gathered(engine, safe_get_full_fp32_param)
    moments = {
        f"{kind}.{name}": tensor
        for kind in ("exp_avg", "exp_avg_sq")
        for name, tensor in _gathered(engine, partial(full_moment, engine, kind=kind)).items()
    }
    with torch.no_grad():
        logits = engine(input_ids=IDS).logits
    if rank.rank == 0:
        save_file(masters, folder / "truth.safetensors")
        save_file(moments, folder / "moments.safetensors")
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")


def _config(stage: int, preset: str) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10**9,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 4096},
        "expert_parallel": {
            "enabled": True, "autoep_size": 2, "preset_model": preset, "use_grouped_mm": False,
        },
    }  # fmt: skip


def _gathered(engine: Any, read: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `read` gives of each parameter; of experts all ranks', in the order of their numbers."""
    layers = {
        name: module
        for name, module in engine.module.named_modules()
        if isinstance(module, AutoEPMoELayer)
    }
    found = {}
    for name, parameter in engine.module.named_parameters():
        mine = read(parameter).detach().clone()
        layer = layers.get(name.rpartition(".experts.")[0])
        if layer is not None:
            parts: list[Any] = [None, None]
            distributed.all_gather_object(parts, (layer.ep_rank, mine))
            mine = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
        found[name] = mine
    return found


def main(folder: Path) -> None:
    for module in launch.PRELOADED:
        importlib.import_module(module)
    gc.freeze()
    launch._run([(name, partial(make, name)) for name in RUNS], 2, folder)
    for name in RUNS:
        here = folder / name
        (tag,) = (path for path in (here / "checkpoint").iterdir() if path.is_dir())
        sys.argv = ["ds_to_universal", "--input_folder", str(tag), "--output_folder",
                    str(here / "universal"), "--num_extract_workers", "1",
                    "--num_merge_workers", "1"]  # fmt: skip
        ds_to_universal.main(ds_to_universal.parse_arguments())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
