"""The benchmark's checkpoints, made once under a folder and found again.

The small ones come from the real DeepSpeed: two ranks, one step, bfloat16 with float32 masters and
Adam's moments, of a random model with the shapes of Qwen2-0.5B. The large ones have four times the
parameters and are laid out by torch.save in the same structure, without the moments, which no
conversion reads.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORLD = 2

# The shapes of Qwen/Qwen2-0.5B's config.json, but for the head: half the vocabulary, untied, makes
# the same 494 million parameters. (DeepSpeed's zero_to_fp32 cannot write tied ones to safetensors:
# "Some tensors share memory".) The large one has 1.94 thousand million: 3.9 times as many.
SMALL: Mapping[str, Any] = {
    "vocab_size": 75968,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
LARGE: Mapping[str, Any] = {
    **SMALL,
    "hidden_size": 1792,
    "intermediate_size": 9728,
    "num_hidden_layers": 28,
}


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint to convert: `kind` is the format, `base` the model that training started from.

    Only contenders with this `kind` run on it; `large` says that those which hold whole models in
    memory do not.
    """

    name: str
    kind: str
    source: Path
    base: Path
    large: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an input is made: `make(folder)` writes `folder/base` and `folder/source`."""

    name: str
    kind: str
    make: Callable[[Path], None]
    large: bool = False


def ready(recipe: Recipe, parent: Path) -> Input:
    """The input under `parent`, made now if it is missing. Renamed into place when whole."""
    folder = parent / recipe.name
    if not folder.is_dir():
        partial = parent / f".{recipe.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        recipe.make(partial)
        partial.rename(folder)
    return Input(recipe.name, recipe.kind, folder / "source", folder / "base", recipe.large)


def trained(stage: int) -> Callable[[Path], None]:
    """By the real DeepSpeed. Needs 14 GB of memory and 7 GB of disk."""

    def make(folder: Path) -> None:
        random_base(folder / "base")
        run_ranks("benchmarks.train", str(folder / "base"), str(stage), str(folder / "source"))

    return make


def laid_out(stage: int) -> Callable[[Path], None]:
    """The large model, laid out as stage 2 or 3 has it. Needs 5 GB of memory, 12 GB of disk."""

    def make(folder: Path) -> None:
        _in_process("save_layout", str(stage), str(folder))

    return make


def random_base(folder: Path) -> None:
    """A random model of the small shapes in bfloat16, as `save_pretrained` writes it."""
    _in_process("save_random_base", str(folder))


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


def _in_process(function: str, *arguments: str) -> None:
    """Call `function` of this module in a process of its own.

    The benchmark's own process stays small: its children begin as large as it is.
    """
    subprocess.run([sys.executable, "-m", __name__, function, *arguments], check=True)


def save_random_base(folder: str) -> None:
    """Called in a process of its own by `random_base`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).to(torch.bfloat16)
    model.save_pretrained(folder)


def save_layout(stage: str, folder: str) -> None:
    """The large model's base (sparse zeros) and its checkpoint (repeated random values)."""
    shapes = save_large_base(Path(folder, "base"))
    tag = Path(folder, "source", "global_step1")
    tag.mkdir(parents=True)
    (tag.parent / "latest").write_text(tag.name, encoding="utf-8")
    (_save_stage3 if stage == "3" else _save_stage2)(tag, shapes)


def save_large_base(base: Path) -> Mapping[str, Any]:
    """The large model in bfloat16, all zeros; its tensors' shapes."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**LARGE))
    shapes = OrderedDict((name, value.shape) for name, value in model.named_parameters())
    base.mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(base)
    _save_sparse(base / "model.safetensors", shapes)
    return shapes


def random_values(numel: int, dtype: Any) -> Any:
    """`numel` random values of `dtype`; a block of them is repeated, which is quicker."""
    import torch

    block = torch.rand(1 << 22).sub_(0.5).to(dtype)
    return block.repeat(-(-numel // block.numel()))[:numel]


def _save_sparse(path: Path, shapes: Mapping[str, Any]) -> None:
    """A safetensors file of bfloat16 zeros that takes no space on disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


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


RECIPES: tuple[Recipe, ...] = (
    Recipe("zero2-0.5b", "deepspeed", trained(2)),
    Recipe("zero3-0.5b", "deepspeed", trained(3)),
    Recipe("zero2-state-0.5b", "state", trained(2)),
    Recipe("zero2-1.9b", "deepspeed", laid_out(2), large=True),
    Recipe("zero3-1.9b", "deepspeed", laid_out(3), large=True),
)

_FUNCTIONS: Mapping[str, Callable[..., None]] = {
    "save_random_base": save_random_base,
    "save_layout": save_layout,
}

if __name__ == "__main__":
    _FUNCTIONS[sys.argv[1]](*sys.argv[2:])
