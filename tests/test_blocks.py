"""The buffers that the engine's blocks live in, and the blocks' comparison with the base model."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.transfer.fill import page_aligned

NUMEL = 700_001


@pytest.mark.parametrize("nbytes", [1, mmap.PAGESIZE - 1, 3 << 20])
def test_a_buffer_begins_with_a_page(nbytes: int) -> None:
    buffer = page_aligned(nbytes)
    buffer[:] = 7
    assert (buffer.nbytes, int(buffer.min())) == (nbytes, 7)
    assert buffer.ctypes.data % mmap.PAGESIZE == 0


@pytest.mark.parametrize("where", [0, 16 << 10, (112 << 10) - 1, 240 << 10, NUMEL - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_other_element_is_seen(tmp_path: Path, where: int, dtype: torch.dtype) -> None:
    same, trained = torch.arange(NUMEL).to(dtype), torch.arange(NUMEL).to(dtype)
    trained[where] += 100_000
    for name, weight in (("base", same), ("run", trained)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "none"}))
        save_file({"frozen": same.clone(), "w": weight}, tmp_path / name / "model.safetensors")
    report = reshard.convert(tmp_path / "run", tmp_path / "out", base=tmp_path / "base")
    assert (report.changed, report.compared) == (1, 2)
