"""The kinds that are not read as numbers: refused by their name, in every direction."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.cli import app as cli
from reshard.cli.lightrft import hf2fsdp
from tests.quantised import makers

State = dict[str, torch.Tensor]
Codes = Callable[[str, torch.Tensor], State]


def _bytes(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.randint(0, 100, shape, dtype=torch.int32).to(dtype)


def _int8(name: str, w: torch.Tensor) -> State:
    codes = _bytes(*w.shape, dtype=torch.int8)
    return {f"{name}.weight": codes, f"{name}.SCB": torch.rand(w.shape[0])}


def _four(kind: str) -> Codes:
    """As bitsandbytes 0.48 saves: two codes a byte, scales of 64 codes, their types as JSON."""

    def codes(name: str, w: torch.Tensor) -> State:
        weight = f"{name}.weight"
        return {
            weight: _bytes(w.numel() // 2, 1),
            f"{weight}.absmax": torch.rand(w.numel() // 64),
            f"{weight}.quant_map": torch.rand(16),
            f"{weight}.quant_state.bitsandbytes__{kind}": _bytes(90),
        }

    return codes


def _packed(w: torch.Tensor, *, groups: int = 2) -> State:
    rows, columns = w.shape
    return {
        "qweight": _bytes(columns // 8, rows, dtype=torch.int32),
        "qzeros": _bytes(groups, rows // 8, dtype=torch.int32),
        "scales": torch.rand(groups, rows).half(),
    }


def _awq(name: str, w: torch.Tensor) -> State:
    return {f"{name}.{leaf}": value for leaf, value in _packed(w).items()}


def _gptq(name: str, w: torch.Tensor) -> State:
    return {**_awq(name, w), f"{name}.g_idx": _bytes(w.shape[1], dtype=torch.int32)}


def _int4(name: str, w: torch.Tensor) -> State:
    rows, columns = w.shape
    return {
        f"{name}.weight_packed": _bytes(rows, columns // 8, dtype=torch.int32),
        f"{name}.weight_scale": torch.rand(rows, columns // 32).bfloat16(),
        f"{name}.weight_shape": torch.tensor([rows, columns]),
    }


def _w8a8(name: str, w: torch.Tensor) -> State:
    codes = _bytes(*w.shape, dtype=torch.int8)
    return {f"{name}.weight": codes, f"{name}.weight_scale": torch.rand(w.shape[0], 1)}


def _nvfp4(name: str, w: torch.Tensor) -> State:
    rows, columns = w.shape
    return {
        f"{name}.weight": _bytes(rows, columns // 2),
        f"{name}.weight_scale": torch.rand(rows, columns // 16).to(torch.float8_e4m3fn),
        f"{name}.weight_scale_2": torch.rand(()),
        f"{name}.input_scale": torch.rand(()),
    }


def _modelopt_int4(name: str, w: torch.Tensor) -> State:
    """Two rows a byte, a scale for each group of columns."""
    rows, columns = w.shape
    return {
        f"{name}.weight": _bytes(rows // 2, columns),
        f"{name}.weight_scale": torch.rand(rows, columns // 32),
        f"{name}.pre_quant_scale": torch.rand(columns),
    }


def _mlx(name: str, w: torch.Tensor) -> State:
    rows, columns = w.shape
    return {
        f"{name}.weight": _bytes(rows, columns // 8, dtype=torch.int32).view(torch.uint32),
        f"{name}.scales": torch.rand(rows, columns // 32).bfloat16(),
        f"{name}.biases": torch.rand(rows, columns // 32).bfloat16(),
    }


def _unknown(name: str, w: torch.Tensor) -> State:
    return {f"{name}.weight": _bytes(*w.shape), f"{name}.grid": torch.rand(16)}


def _bnb(**settings: object) -> dict[str, Any]:
    return {"quant_method": "bitsandbytes", **settings}


#: Kind -> its codes, its statement in the config, and its name in the error.
KINDS: dict[str, tuple[Codes, dict[str, Any], str]] = {
    "int8": (_int8, _bnb(load_in_8bit=True), "bitsandbytes int8"),
    "nf4": (_four("nf4"), _bnb(load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes nf4"),
    "fp4": (_four("fp4"), _bnb(load_in_4bit=True, bnb_4bit_quant_type="fp4"), "bitsandbytes"),
    "awq": (_awq, {"quant_method": "awq", "bits": 4}, "AWQ"),
    "gptq": (_gptq, {"quant_method": "gptq", "bits": 4}, "GPTQ"),
    "int4": (
        _int4,
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        "compressed-tensors pack",
    ),
    "w8a8": (_w8a8, {"quant_method": "compressed-tensors", "format": "int-quantized"}, "int8"),
    "nvfp4": (_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "nvfp4, weights alone": (
        _nvfp4,
        {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"},
        "NVFP4",
    ),
    "modelopt int4": (
        _modelopt_int4,
        {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"},
        "packed int4",
    ),
    "mlx": (_mlx, {"group_size": 32, "bits": 4}, "MLX"),
    "unknown": (_unknown, {"quant_method": "frobnicate"}, "frobnicate"),
}
pytestmark = pytest.mark.parametrize("kind", KINDS)


def model(folder: Path, kind: str, *, stated: bool = True) -> Path:
    """A Llama whose projections are codes of a kind; `stated`: the config says so."""
    makers.llama().save_pretrained(folder)
    codes, statement, _ = KINDS[kind]
    state: State = {}
    for name, value in load_file(folder / "model.safetensors").items():
        is_code = name.endswith("proj.weight")
        state |= codes(name.removesuffix(".weight"), value) if is_code else {name: value}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    if stated:
        path = folder / "config.json"
        path.write_text(
            json.dumps({**json.loads(path.read_text()), "quantization_config": statement})
        )
    return folder


def refused(call: Callable[[], object], kind: str) -> str:
    with pytest.raises(reshard.UnsupportedError) as caught:
        call()
    first = str(caught.value).partition(". ")[0]
    assert KINDS[kind][2] in first
    assert "which reshard cannot dequantise" in first
    return str(caught.value)


def test_as_a_source(kind: str, tmp_path: Path) -> None:
    folder, out = model(tmp_path / "model", kind), tmp_path / "out"
    words = refused(lambda: reshard.convert(folder, out, dtype="bfloat16"), kind)
    assert "Convert the unquantised release" in words
    refused(lambda: reshard.convert(folder, out, to="dcp"), kind)
    refused(lambda: reshard.convert(folder, out, to="dcp", names="memory"), kind)
    assert not out.exists()


def test_hf2fsdp(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model(tmp_path / "model", kind)
    arguments = ["--hf_checkpoint", str(folder), "--output", str(tmp_path / "out")]
    assert cli.run(hf2fsdp.command, arguments) == 1
    assert KINDS[kind][2] in "".join(capsys.readouterr())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stated", [True, False])
def test_as_a_base(kind: str, stated: bool, tmp_path: Path) -> None:
    if kind == "unknown" and not stated:
        pytest.skip("nothing gives it away")
    folder = model(tmp_path / "model", kind, stated=stated)
    plain = {name: value.bfloat16() for name, value in makers.llama().state_dict().items()}
    torch.save(plain, tmp_path / "run.pt")
    for options in ({}, {"fill_from_base": True}, {"dtype": "keep"}):
        call = reshard.convert
        with pytest.raises(reshard.UnsupportedError, match="Name the unquantised release"):
            call(tmp_path / "run.pt", tmp_path / "out", base=folder, **options)
    # The hint, followed.
    makers.llama().save_pretrained(tmp_path / "release")
    state = {name: value + 1 for name, value in plain.items()}
    torch.save(state, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=tmp_path / "release")
    written: Mapping[str, torch.Tensor] = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_differences(kind: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", kind)
    same = reshard.diff(folder, folder)
    assert same.differences == ()
    assert [finding.code for finding in same.findings] == ["codes-compared"] * 2
    makers.llama().save_pretrained(tmp_path / "plain")
    refused(lambda: reshard.diff(folder, tmp_path / "plain"), kind)
    refused(lambda: reshard.diff(tmp_path / "plain", folder), kind)
    refused(lambda: reshard.verify(tmp_path / "plain", folder), kind)


def test_doctor_says_so(kind: str, tmp_path: Path) -> None:
    folder = model(tmp_path / "model", kind)
    makers.llama().save_pretrained(tmp_path / "plain")
    for base in (None, tmp_path / "plain"):
        findings = {found.code: found for found in reshard.doctor(folder, base=base).findings}
        assert KINDS[kind][2] in findings["codes-unread"].message
        assert "names-do-not-fit" not in findings
        assert "quantisation-contradicts-config" not in findings
    call = lambda: reshard.doctor(tmp_path / "plain", base=folder)  # noqa: E731
    refused(call, kind)


@pytest.mark.parametrize("stated", [True, False])
def test_inspect_says_so(kind: str, stated: bool, tmp_path: Path) -> None:
    if kind == "unknown" and not stated:
        pytest.skip("nothing gives it away")
    found = reshard.inspect(model(tmp_path / "model", kind, stated=stated)).codes
    assert found is not None
    assert not found.read
    ((name, count),) = found.kinds.items()
    assert (name.split()[0] in KINDS[kind][2]) or KINDS[kind][2] in name
    assert count == 14  # the projections of two layers
    assert "not read as numbers" in str(found)


def adapters_on(folder: Path, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A state dict of PEFT over codes (as QLoRA leaves it), and its adapters by weight."""
    torch.manual_seed(4)
    state: State = {}
    parts = {}
    for name, value in load_file(folder / "model.safetensors").items():
        at = name.find("q_proj.")
        if at >= 0:
            name = f"{name[:at]}q_proj.base_layer.{name[at + len('q_proj.') :]}"
        state[f"base_model.model.{name}"] = value
    for layer in range(2):
        module = f"model.layers.{layer}.self_attn.q_proj"
        a, b = torch.randn(4, 64) / 8, torch.randn(64, 4) / 8
        state[f"base_model.model.{module}.lora_A.default.weight"] = a
        state[f"base_model.model.{module}.lora_B.default.weight"] = b
        parts[f"{module}.weight"] = (a, b)
    torch.save(state, path)
    return parts


def test_adapters_over_codes_are_merged_onto_the_16_bit_base(kind: str, tmp_path: Path) -> None:
    if kind == "unknown":
        pytest.skip("without a config nothing gives it away")
    folder, out = model(tmp_path / "model", kind), tmp_path / "out"
    makers.llama().save_pretrained(tmp_path / "base")
    parts = adapters_on(folder, tmp_path / "run.pt")
    options: dict[str, Any] = {"base": tmp_path / "base", "lora_alpha": 8}
    with pytest.raises(reshard.UnsupportedError, match="--base with --fill-from-base"):
        reshard.convert(tmp_path / "run.pt", out, **options)
    # The hint, followed.
    report = reshard.convert(tmp_path / "run.pt", out, fill_from_base=True, **options)
    assert "codes-left-out" in [finding.code for finding in report.findings]
    written = load_file(out / "model.safetensors")
    for name, value in load_file(tmp_path / "base" / "model.safetensors").items():
        if name in parts:
            a, b = parts[name]
            expected = value.float() + 2 * b @ a
            torch.testing.assert_close(written[name].float(), expected, rtol=2**-8, atol=1e-6)
        else:
            assert torch.equal(written[name], value)
    reshard.convert(tmp_path / "run.pt", tmp_path / "adapter", lora="adapter", **options)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * len(parts)
