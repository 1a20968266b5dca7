"""Every kind that is read as numbers, every way through: the table of `docs/quantised.md`.

The oracle is the model as transformers loads it on the CPU, its weights dequantised to bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli import app as cli
from reshard.cli.lightrft import ds2hf, fsdp2hf, hf2fsdp
from tests import zero3
from tests.quantised import makers
from tests.quantised.conftest import MAKERS, Get, Model
from tests.tensors import assert_same

KINDS = list(MAKERS)
IDS = torch.arange(40).reshape(2, 20)
pytestmark = pytest.mark.parametrize("kind", KINDS)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def numbers_of(model: Model) -> dict[str, torch.Tensor]:
    """The released files' tensors in bfloat16, as transformers saves the dequantised model."""
    state = model.model.state_dict()
    stacked = [name for name in state if name.endswith("experts.gate_up_proj")]
    if not stacked or "gpt_oss" in type(model.model).__module__:
        return dict(state)
    made = {name: value for name, value in state.items() if ".experts." not in name}
    for name in stacked:
        experts = name.removesuffix("gate_up_proj")
        for index, (both, down) in enumerate(
            zip(state[name], state[f"{experts}down_proj"], strict=True)
        ):
            gate, up = both.chunk(2)
            made[f"{experts}{index}.gate_proj.weight"] = gate
            made[f"{experts}{index}.up_proj.weight"] = up
            made[f"{experts}{index}.down_proj.weight"] = down
    return made


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def trained(model: Model) -> dict[str, torch.Tensor]:
    """A run's state dict in bfloat16, by the files' names: every tensor changed."""
    torch.manual_seed(5)
    return {
        name: (value.float() + torch.randn(value.shape) / 50).bfloat16()
        for name, value in numbers_of(model).items()
    }


def codes(report: reshard.Report) -> list[str]:
    """What a conversion finds, but for what transformers 5 leaves out of a config."""
    found = [finding.code for finding in report.findings]
    return [code for code in found if code != "base-config-fields"]


def test_a_model_becomes_the_16_bit_model(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    report = reshard.convert(made.folder, out, dtype="bfloat16")
    assert_same(tensors(out), numbers_of(made))
    assert codes(report) == ["dequantised"]
    stated = config_of(out)
    assert "quantization_config" not in stated
    assert stated["dtype"] == "bfloat16"
    loaded = makers.loaded(out)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, made.model(IDS).logits)
    assert reshard.verify(out).num_tensors == len(numbers_of(made))
    assert reshard.verify(out, made.folder).num_tensors == len(numbers_of(made))


def test_float32_holds_the_products_unrounded(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    reshard.convert(made.folder, out, dtype="float32")
    found = tensors(out)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert_same({name: value.bfloat16() for name, value in found.items()}, numbers_of(made))


def test_a_16_bit_run_is_written_without_scales(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    state = trained(made)
    torch.save({name: value.float() for name, value in state.items()}, tmp_path / "run.pt")
    report = reshard.convert(tmp_path / "run.pt", out, base=made.folder)
    assert_same(tensors(out), state)
    assert "quantization_config" not in config_of(out)
    assert codes(report) == ["dequantised"]
    assert report.changed == len(state)
    assert reshard.verify(out, tmp_path / "run.pt", base=made.folder).num_tensors == len(state)


def test_what_a_run_lacks_is_filled_with_numbers(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    state = {name: value for name, value in trained(made).items() if "layers.1" not in name}
    torch.save(state, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", out, base=made.folder, fill_from_base=True)
    assert_same(tensors(out), {**numbers_of(made), **state})


def test_an_unchanged_run_is_found_to_be_one(kind: str, model: Get, tmp_path: Path) -> None:
    made = model(kind)
    torch.save(numbers_of(made), tmp_path / "run.pt")
    with pytest.raises(reshard.VerificationError, match="so nothing was trained"):
        reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=made.folder)


def test_into_training(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "dcp"
    report = reshard.convert(made.folder, out, to="dcp")
    expected = numbers_of(made)
    found = {name: torch.zeros_like(value) for name, value in expected.items()}
    dcp.load(found, checkpoint_id=out)
    assert_same(found, expected)
    assert "dequantised" in codes(report)


def test_into_a_loaded_model(
    kind: str, model: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, out = model(kind), tmp_path / "dcp"
    arguments = ["--hf_checkpoint", str(made.folder), "--output", str(out), "--names", "memory"]
    assert cli.run(hf2fsdp.command, arguments) == 0
    assert "weights are quantised" in "".join(capsys.readouterr())
    found = {name: torch.zeros_like(value) for name, value in made.model.state_dict().items()}
    dcp.load(found, checkpoint_id=out)
    assert_same(found, made.model.state_dict())


def test_out_of_training(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    state = trained(made)
    dcp.save(dict(state), checkpoint_id=tmp_path / "run")
    arguments = [
        "--hf_base",
        made.folder,
        "--checkpoint_dir",
        tmp_path / "run",
        "--output_dir",
        out,
    ]
    assert cli.run(fsdp2hf.command, list(map(str, arguments))) == 0
    assert_same(tensors(out), state)
    assert "quantization_config" not in config_of(out)


def test_out_of_deepspeed(kind: str, model: Get, tmp_path: Path) -> None:
    """ZeRO-3 over two ranks, float32 masters (`test_deepspeed.py` has the real DeepSpeed's)."""
    made, out, run = model(kind), tmp_path / "out", tmp_path / "run" / "global_step1"
    state = trained(made)
    run.mkdir(parents=True)
    (run.parent / "latest").write_text(run.name)
    zero3.save(run, {name: value.float() for name, value in state.items()}, 2)
    arguments = ["--checkpoint_dir", run.parent, "--hf_base", made.folder, "--output_dir", out]
    assert cli.run(ds2hf.command, list(map(str, arguments))) == 0
    assert_same(tensors(out), state)
    assert "quantization_config" not in config_of(out)


def adapters(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of rank 4 for the attention's queries and values, by weight."""
    torch.manual_seed(9)
    return {
        name: (torch.randn(4, value.shape[1]) / 8, torch.randn(value.shape[0], 4) / 8)
        for name, value in state.items()
        if name.endswith(("q_proj.weight", "v_proj.weight"))
    }


def adapter_folder(folder: Path, parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """An adapter as PEFT saves it, alpha twice the rank."""
    folder.mkdir()
    saved: dict[str, torch.Tensor] = {}
    for name, (a, b) in parts.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        saved |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
    save_file(saved, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def products(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The numbers in float32, unrounded (see above for what they are held against)."""
    reshard.convert(folder, tmp_path / "float32", dtype="float32")
    return tensors(tmp_path / "float32")


def test_adapters_are_merged_onto_the_numbers(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    expected = numbers_of(made)
    parts = adapters(expected)
    folder = adapter_folder(tmp_path / "adapter", parts)
    reshard.convert(folder, out, base=made.folder, fill_from_base=True)
    found = tensors(out)
    exact = products(made.folder, tmp_path)
    for name, (a, b) in parts.items():
        merged = exact[name] + 2 * b @ a
        # One rounding to bfloat16, of a sum that another order of adding may change.
        torch.testing.assert_close(found.pop(name).float(), merged, rtol=2**-8, atol=1e-6)
        expected.pop(name)
    assert_same(found, expected)


def run_with_adapters(made: Model, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A state dict of PEFT over the quantised model itself: its codes and scales, and adapters."""
    stored = tensors(made.folder)
    parts = adapters(numbers_of(made))
    state = {}
    for name, value in stored.items():
        owner = next((n for n in parts if name.startswith(n.removesuffix("weight"))), None)
        if owner is not None:
            module = owner.removesuffix(".weight")
            name = name.replace(module, f"{module}.base_layer")
        state[f"base_model.model.{name}"] = value
    for name, (a, b) in parts.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        state |= {f"{stem}.lora_A.default.weight": a, f"{stem}.lora_B.default.weight": b}
    torch.save(state, path)
    return parts


def test_a_run_on_the_codes_is_merged(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    parts = run_with_adapters(made, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", out, base=made.folder, lora_alpha=8)
    found, expected = tensors(out), numbers_of(made)
    exact = products(made.folder, tmp_path)
    for name, (a, b) in parts.items():
        torch.testing.assert_close(
            found.pop(name).float(), exact[name] + 2 * b @ a, rtol=2**-8, atol=1e-6
        )
        expected.pop(name)
    assert_same(found, expected)


def test_a_run_on_the_codes_gives_its_adapter(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    parts = run_with_adapters(made, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", out, base=made.folder, lora="adapter", lora_alpha=8)
    found = load_file(out / "adapter_model.safetensors")
    for name, (a, b) in parts.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        assert torch.equal(found.pop(f"{stem}.lora_A.weight"), a)
        assert torch.equal(found.pop(f"{stem}.lora_B.weight"), b)
    assert not found


def test_differences(kind: str, model: Get, tmp_path: Path) -> None:
    made, out = model(kind), tmp_path / "out"
    reshard.convert(made.folder, out)
    for first, second in ((made.folder, out), (out, made.folder), (made.folder, made.folder)):
        assert reshard.diff(first, second).differences == ()
    state = tensors(out)
    name = next(name for name in state if name.endswith("o_proj.weight"))
    torch.save({**state, name: state[name] * 2}, tmp_path / "other.pt")
    (difference,) = reshard.diff(tmp_path / "other.pt", made.folder).differences
    assert difference.name == name


def test_a_changed_scale_is_a_difference(kind: str, model: Get, tmp_path: Path) -> None:
    made = model(kind)
    other = tmp_path / "other"
    other.mkdir()
    stored = tensors(made.folder)
    name = next(n for n in stored if n.endswith(("_scale_inv", "_scale", "_scales")))
    raw = stored[name].reshape(-1).view(torch.uint8).clone()
    raw[0] ^= 1
    stored[name] = raw.view(stored[name].dtype).reshape(stored[name].shape)
    save_file(stored, other / "model.safetensors")
    (other / "config.json").write_text((made.folder / "config.json").read_text())
    assert len(reshard.diff(other, made.folder).differences) == 1


@pytest.mark.parametrize("as_json", [True, False])
def test_inspect_says_so(
    kind: str, as_json: bool, model: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model(kind)
    stored = tensors(made.folder)
    count = len([n for n in stored if n.endswith(("_scale_inv", "_scale", "_scales"))])
    capsys.readouterr()  # what loading the model said
    assert cli.run(cli.reshard, ["inspect", str(made.folder), *["--json"] * as_json]) == 0
    shown = capsys.readouterr().out
    name = {"mxfp4": "MXFP4", "tensor": "one scale a tensor", "row": "one scale a row"}.get(kind)
    words = name or "fp8 in blocks of 32 x 32"
    if as_json:
        found = json.loads(shown)["quantised"]
        assert list(found["kinds"].values()) == [count]
        assert words in next(iter(found["kinds"]))
        assert found["read"]
        assert found["fault"] == ""
        method = config_of(made.folder)["quantization_config"]["quant_method"]
        assert found["stated"].lower().startswith(method)
    else:
        assert f"{count} weights" in " ".join(shown.split())
        assert words in " ".join(shown.split())
    reshard.convert(made.folder, tmp_path / "out")
    for first, second in ((made.folder, tmp_path / "out"), (tmp_path / "out", made.folder)):
        fitting = reshard.inspect(first, base=second).fitting
        assert fitting is not None
        assert fitting.fits
        assert fitting.matching.unexpected == ()
    assert reshard.inspect(tmp_path / "out").codes is None
    assert reshard.inspect(tmp_path / "out").to_json()["quantised"] is None


def test_one_tensor_is_read_as_it_is_stored(kind: str, model: Get) -> None:
    """`reshard.open` shows what is in the files."""
    made = model(kind)
    opened = reshard.open(made.folder).tensors
    assert set(opened) == set(tensors(made.folder))
    name = next(n for n in opened if n.endswith(("q_proj.weight", "down_proj_blocks")))
    stored = opened[name].numpy()
    assert stored.dtype in (np.uint8, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16)
