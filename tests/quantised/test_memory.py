"""Dequantising takes blocks of memory, not tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.budget import MIB, needs_proc, peak

_CODE = "import reshard; reshard.convert(sys.argv[1], sys.argv[2], threads=2)"
# MiB by which a weight of 128 MiB as bfloat16 may raise the peak.
_ALLOWED = 48


def peak_of(folder: Path, rows: int, columns: int) -> float:
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
    return peak(_CODE, folder, f"{folder}-out") / MIB


@needs_proc
def test_memory_does_not_grow_with_a_quantised_weight(tmp_path: Path) -> None:
    small = peak_of(tmp_path / "small", 100, 300)
    # Edges that are not whole blocks, and rows of more than a block.
    large = peak_of(tmp_path / "large", 3600, 18432)
    assert large - small < _ALLOWED
