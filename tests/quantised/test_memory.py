"""Dequantising takes blocks of memory, not tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

# VmHWM, unlike ru_maxrss, does not count what the test held when it forked.
_CHILD = (
    "import sys, reshard\n"
    "reshard.convert(sys.argv[1], sys.argv[2], threads=2)\n"
    "status = open('/proc/self/status').read()\n"
    "print(status.split('VmHWM:')[1].split()[0])"
)
# MiB by which a weight of 128 MiB as bfloat16 may raise the peak.
_ALLOWED = 48


def peak(folder: Path, rows: int, columns: int) -> float:
    """MiB at most that converting one fp8 weight takes."""
    folder.mkdir()
    grid = (-(-rows // 128), -(-columns // 128))
    codes = torch.randint(0, 120, (rows, columns), dtype=torch.uint8)
    state = {
        "model.weight": codes.view(torch.float8_e4m3fn),
        "model.weight_scale_inv": torch.rand(grid),
    }
    save_file(state, folder / "model.safetensors")
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {"model_type": "llama", "quantization_config": stated}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = [sys.executable, "-c", _CHILD, str(folder), f"{folder}-out"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def test_memory_does_not_grow_with_a_quantised_weight(tmp_path: Path) -> None:
    small = peak(tmp_path / "small", 100, 300)
    # Edges that are not whole blocks, and rows of more than a block.
    large = peak(tmp_path / "large", 3600, 18432)
    assert large - small < _ALLOWED
