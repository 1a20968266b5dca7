"""The benchmark's FSDP checkpoints, and the Hugging Face folders that are converted for FSDP.

The small one comes from real FSDP2 ranks: float32 parameters, one step, saved by DCP as accelerate
and the HF Trainer save them. The large one is saved by DCP in one process.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.inputs import Recipe, random_base, random_values, run_ranks, save_large_base


def sharded(folder: Path) -> None:
    """By real FSDP2 ranks. Needs 8 GB of memory and 3 GB of disk."""
    random_base(folder / "base")
    run_ranks("benchmarks.dcp_train", str(folder / "base"), str(folder / "source"))


def sharded_state(folder: Path) -> None:
    """The same with AdamW's moments. Needs 14 GB of memory and 7 GB of disk."""
    random_base(folder / "base")
    run_ranks("benchmarks.dcp_train", str(folder / "base"), str(folder / "source"), "state")


def sharded_large(folder: Path) -> None:
    """The large model by DCP, in float32. Needs 8 GB of memory, 8 GB of disk."""
    _in_process("save_sharded", folder)


def pretrained(folder: Path) -> None:
    """The small model as it would be downloaded."""
    random_base(folder / "source")
    (folder / "base").symlink_to("source")


def pretrained_large(folder: Path) -> None:
    """The large model's files. Needs 4 GB of memory, 4 GB of disk."""
    _in_process("save_pretrained", folder)
    (folder / "base").symlink_to("source")


def _in_process(function: str, folder: Path) -> None:
    """The benchmark's own process stays small: its children begin as large as it is."""
    subprocess.run([sys.executable, "-m", __name__, function, str(folder)], check=True)


def save_pretrained(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    shapes = save_large_base(folder / "source")
    state = _random_state(shapes, torch.bfloat16)
    save_file(state, folder / "source/model.safetensors", {"format": "pt"})


def save_sharded(folder: Path) -> None:
    import torch
    from torch.distributed import checkpoint as dcp

    state = _random_state(save_large_base(folder / "base"), torch.float32)
    dcp.save({"model": state}, checkpoint_id=folder / "source", no_dist=True)


def _random_state(shapes: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    return {
        name: random_values(math.prod(shape), dtype).reshape(shape)
        for name, shape in shapes.items()
    }


RECIPES: tuple[Recipe, ...] = (
    Recipe("fsdp-0.5b", "dcp", sharded),
    Recipe("fsdp-state-0.5b", "fsdp-state", sharded_state),
    Recipe("fsdp-1.9b", "dcp", sharded_large, large=True),
    Recipe("hf-0.5b", "huggingface", pretrained),
    Recipe("hf-1.9b", "huggingface", pretrained_large, large=True),
)

_FUNCTIONS = {function.__name__: function for function in (save_pretrained, save_sharded)}

if __name__ == "__main__":
    _FUNCTIONS[sys.argv[1]](Path(sys.argv[2]))
