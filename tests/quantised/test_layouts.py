"""Whole conversions of models laid out as other libraries write them (`layouts.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from tests.quantised import layouts
from tests.tensors import assert_same


@pytest.mark.parametrize("layout", layouts.READ)
def test_a_model_becomes_the_16_bit_model(layout: str, tmp_path: Path) -> None:
    made, out = layouts.READ[layout](tmp_path / "model"), tmp_path / "out"
    report = reshard.convert(made.folder, out, dtype="bfloat16")
    found = [finding.code for finding in report.findings]
    # The config is as transformers 5 writes it.
    assert [code for code in found if code != "base-config-fields"] == ["dequantised"]
    assert_same(load_file(out / "model.safetensors"), made.numbers)
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert not (out / "hf_quant_config.json").exists()
    assert reshard.verify(out, made.folder).num_tensors == len(made.numbers)
    # A run onto it, in 32 bits, that lacks some weights.
    state = {
        name: value.float() + 1 if value.is_floating_point() else value
        for name, value in made.numbers.items()
        if ".layers.0." not in name
    }
    torch.save(state, tmp_path / "run.pt")
    run, target = tmp_path / "run.pt", tmp_path / "trained"
    reshard.convert(run, target, base=made.folder, fill_from_base=True)
    trained = {
        name: state[name].to(value.dtype) if name in state else value
        for name, value in made.numbers.items()
    }
    assert_same(load_file(tmp_path / "trained" / "model.safetensors"), trained)


def test_nvfp4_is_refused_by_its_name(tmp_path: Path) -> None:
    made = layouts.nvfp4(tmp_path / "model")
    with pytest.raises(reshard.UnsupportedError, match=r"NVFP4 \(compressed-tensors nvfp4"):
        reshard.convert(made.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
