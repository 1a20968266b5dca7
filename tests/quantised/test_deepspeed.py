"""Checkpoints of the real DeepSpeed onto an fp8 base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reshard.cli import app as cli
from reshard.cli.lightrft import ds2hf
from tests.oracle.cache import Oracle
from tests.quantised import makers


@pytest.mark.parametrize("recipe", ["llama-zero2", "llama-zero3"])
def test_ds2hf(recipe: str, oracle: Oracle, tmp_path: Path) -> None:
    case = oracle[recipe]
    shutil.copytree(case.base, tmp_path / "base")
    base, out = makers.in_blocks(tmp_path / "base", [2, 2]), tmp_path / "out"
    arguments = ["--checkpoint_dir", case.root, "--hf_base", base, "--output_dir", out]
    assert cli.run(ds2hf.command, list(map(str, arguments))) == 0
    stored, found = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    expected = {name: torch.from_numpy(value) for name, value in case.last.expected().items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        code = f"{name}_scale_inv" in stored
        assert value.dtype == (torch.bfloat16 if code else stored[name].dtype)
        assert torch.equal(value, expected[name].to(value.dtype)), name
    assert sum(value.dtype == torch.float8_e4m3fn for value in stored.values()) == 14
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
