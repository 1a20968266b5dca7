"""The benchmark's checkpoints: `python -m benchmarks.inputs KIND FOLDER GB` makes one.

A folder holds `source`, the checkpoint, and `base`, the model that training started from. ZeRO
without training state and DCP of weights are laid out as their frameworks save them, in two ranks,
which is quicker than to train; training state comes from one step of the real DeepSpeed and of real
FSDP2. Megatron's and the universal checkpoint are conversions by reshard itself.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shapes import Model, model, random_values, save_base

WORLD = 2


def zero2(folder: Path, gb: float) -> None:
    """As ZeRO-2 saves: float32 masters by rank, and the module in bfloat16."""
    _save_zero(folder, gb, _save_stage2)


def zero3(folder: Path, gb: float) -> None:
    """As ZeRO-3 saves: float32 masters by rank, each parameter cut."""
    _save_zero(folder, gb, _save_stage3)


def dcp(folder: Path, gb: float) -> None:
    """As FSDP2 saves: float32 parameters, sharded over two ranks, by `dcp.save`."""
    save_base(folder / "base", model(gb))
    run_ranks("benchmarks.dcp_ranks", str(folder / "source"), str(gb))


def huggingface(folder: Path, gb: float) -> None:
    """A model in bfloat16."""
    save_base(folder / "source", model(gb))
    (folder / "base").symlink_to("source")


def fp8(folder: Path, gb: float) -> None:
    """The same in fp8, in blocks of 128 x 128, as DeepSeek and Qwen release them."""
    huggingface(folder, gb)
    _quantise(folder / "source")


def megatron(folder: Path, gb: float) -> None:
    """torch_dist, in bfloat16, made by reshard."""
    save_base(folder / "base", model(gb))
    save_base(folder / "trained", model(gb), seed=1)
    _reshard(folder / "trained", folder / "source", "--to", "megatron")
    remove(folder / "trained")


def tiny(folder: Path, gb: float) -> None:
    """A model of 0.2 MB."""
    save_base(folder / "source", Model(64, 1, vocabulary=256))


def zero2_state(folder: Path, gb: float) -> None:
    """By one step of the real DeepSpeed: bfloat16, with float32 masters and Adam's moments."""
    save_base(folder / "base", model(gb))
    run_ranks("benchmarks.train", str(folder / "base"), "2", str(folder / "source"))


def dcp_state(folder: Path, gb: float) -> None:
    """By one step of real FSDP2: float32 parameters with AdamW's moments, in one save."""
    save_base(folder / "base", model(gb))
    run_ranks("benchmarks.dcp_train", str(folder / "base"), str(folder / "source"), "state")


def universal(folder: Path, gb: float) -> None:
    """DeepSpeed's universal checkpoint, made by reshard from FSDP2's."""
    dcp_state(folder, gb)
    (folder / "source").rename(folder / "saved")
    _reshard(folder / "saved", folder / "source", "--to", "deepspeed")
    remove(folder / "saved")


def _reshard(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "reshard", "convert", *map(str, arguments)]
    subprocess.run([*command, "--quiet", "--no-verify"], check=True)


def run_ranks(module: str, *arguments: str) -> None:
    """Run `module` in two ranks, as torchrun does."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*launch, f"--nproc-per-node={WORLD}", "-m", module, *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )


def _save_zero(folder: Path, gb: float, save: Callable[[Path, Mapping[str, Any]], None]) -> None:
    import torch

    made = model(gb)
    save_base(folder / "base", made)
    tag = folder / "source" / "global_step1"
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text(tag.name, encoding="utf-8")
    save(tag, OrderedDict((name, torch.Size(shape)) for name, shape in made.shapes()))


def _common(shapes: Mapping[str, Any], module: Mapping[str, Any]) -> dict[str, Any]:
    """A model file's keys that readers look at (DeepSpeed 0.19.8, runtime/engine.py)."""
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": {},
        "global_steps": 1,
        "dp_world_size": WORLD,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": "0.19.8",
    }


def _save_stage3(tag: Path, shapes: Mapping[str, Any]) -> None:
    import torch

    pieces = sum(-(-math.prod(shape) // WORLD) for shape in shapes.values())
    placeholders = {name: torch.empty(0, dtype=torch.bfloat16) for name in shapes}
    for rank in range(WORLD):
        state = {
            "zero_stage": 3,
            "partition_count": WORLD,
            "optimizer_state_dict": {"state": {}, "param_groups": []},
            "fp32_flat_groups": [random_values(pieces, torch.float32).add_(rank)],
        }
        _save_optimizer(tag, rank, state)
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save(_common(shapes, placeholders), tag / name)


def _save_stage2(tag: Path, shapes: Mapping[str, Any]) -> None:
    import torch

    total = sum(math.prod(shape) for shape in shapes.values())
    part = -(-total // (2 * WORLD)) * 2
    flat = torch.empty(total, dtype=torch.bfloat16)
    for rank in range(WORLD):
        mine = flat[rank * part : (rank + 1) * part]
        masters = random_values(mine.numel(), torch.float32).add_(rank)
        mine.copy_(masters)
        state = {
            "zero_stage": 2,
            "partition_count": [WORLD],
            "group_paddings": [part - mine.numel()],
            "base_optimizer_state": {"state": {}, "param_groups": []},
            "single_partition_of_fp32_groups": [masters],
            "param_slice_mappings": [OrderedDict()],
        }
        _save_optimizer(tag, rank, state)
        del masters, state
    views = torch.split(flat, [math.prod(shape) for shape in shapes.values()])
    module = OrderedDict(
        (name, view.reshape(shape))
        for (name, shape), view in zip(shapes.items(), views, strict=True)
    )
    torch.save(_common(shapes, module), tag / "mp_rank_00_model_states.pt")


def _save_optimizer(tag: Path, rank: int, state: Mapping[str, Any]) -> None:
    import torch

    file = {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.19.8"}
    torch.save(file, tag / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


_FP8_BLOCK = [128, 128]


def _quantise(folder: Path) -> None:
    """Quantise the model in `folder`, in its place, by transformers' own quantiser: every
    projection is codes, embedding, head and norms stay bfloat16."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
    from transformers.utils.quantization_config import FineGrainedFP8Config

    settings = FineGrainedFP8Config(weight_block_size=_FP8_BLOCK)
    quantiser = Fp8Quantize(FineGrainedFP8HfQuantizer(settings))
    weights = folder / "model.safetensors"
    state: dict[str, Any] = {}
    with safe_open(weights, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            value = file.get_tensor(name)
            codes = name.endswith("proj.weight")
            state.update(quantiser.convert({name: value}) if codes else {name: value})
    weights.unlink()
    save_file(state, weights, {"format": "pt"})
    path = folder / "config.json"
    stated = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": _FP8_BLOCK,
        "activation_scheme": "dynamic",
        "modules_to_not_convert": ["lm_head"],
    }
    config = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": stated}
    path.write_text(json.dumps(config), encoding="utf-8")


MAKERS: Mapping[str, Callable[[Path, float], None]] = {
    maker.__name__: maker
    for maker in (
        zero2,
        zero3,
        dcp,
        huggingface,
        fp8,
        megatron,
        zero2_state,
        dcp_state,
        universal,
        tiny,
    )
}


def remove(folder: Path) -> None:
    """Remove an input, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def make(kind: str, folder: Path, gb: float) -> None:
    """Make an input in a process of its own: the benchmark's own stays small, because its children
    begin as large as it is."""
    remove(folder)
    folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", __name__, kind, str(folder), str(gb)], check=True)


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in MAKERS:
        sys.exit(f"{__doc__}\nKIND: {', '.join(MAKERS)}")
    MAKERS[sys.argv[1]](Path(sys.argv[2]), float(sys.argv[3]))
