"""The fp32 masters of the optimizer's state, in place of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import reshard
from tests.megatron.golden import base, checkpoint, saved, truth

_NAME = "bridge_llama_tp2_bf16"
_REAL = "mcore012_llama_dp2_distopt_modelspace_bf16"
State = dict[str, torch.Tensor]


@pytest.fixture
def native(tmp_path: Path) -> State:
    """A model by Megatron's names, in bfloat16."""
    reshard.convert(checkpoint(_NAME), tmp_path / "native")
    return dict(load_file(tmp_path / "native" / "model.safetensors"))


def _masters(native: State) -> State:
    """Masters that the weights are rounded from."""
    torch.manual_seed(3)
    found = {}
    for name, tensor in native.items():
        near = tensor.float() * (1 + torch.rand(tensor.shape) * 2**-10)
        found[name] = torch.where(near.bfloat16() == tensor, near, tensor.float())
    return found


def _in_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """As `fully_sharded_model_space` stores it: each dimension in two, blocks flattened."""
    parts: list[torch.Tensor] = [tensor]
    for dim in range(tensor.dim()):
        parts = [half for part in parts for half in part.chunk(2, dim)]
    return torch.stack([part.flatten() for part in parts]).reshape(*[2] * tensor.dim(), -1)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("key", "stored"),
    [
        ("optimizer.state.fp32_param.{}", torch.clone),
        ("optimizer.state.param.{}", torch.clone),
        ("chained_1.optimizer.state.fp32_param.{}", torch.clone),
        ("optimizer.state.fp32_param.{}", _in_blocks),
    ],
)
def test_masters_stand_in_for_the_weights(
    key: str, stored: Callable[[torch.Tensor], torch.Tensor], native: State, tmp_path: Path
) -> None:
    masters = _masters(native)
    state = {key.format(name): stored(tensor) for name, tensor in masters.items()}
    moments = {name.replace("param", "exp_avg"): t + 1 for name, t in state.items()}
    folder = saved(tmp_path / "run", {**native, **state, **moments})
    model = base(_NAME, tmp_path / "base")
    reshard.convert(folder, tmp_path / "plain", masters=True)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == native.keys()
    assert all(torch.equal(plain[name], masters[name]) for name in native)
    reshard.convert(folder, tmp_path / "out", base=model, masters=True, dtype="float32")
    reshard.convert(folder, tmp_path / "same", base=model, dtype="float32")
    for against in (None, model):
        assert reshard.verify(tmp_path / "out", folder, base=against).num_tensors
        assert reshard.verify(tmp_path / "same", folder, base=against).num_tensors
    wide, narrow = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "same"))
    assert all(torch.equal(wide[n].bfloat16(), narrow[n].bfloat16()) for n in narrow)
    assert any(not torch.equal(wide[n], narrow[n]) for n in narrow)


def test_those_that_megatron_core_wrote_round_to_its_weights(tmp_path: Path) -> None:
    model = base(_REAL, tmp_path / "base")
    reshard.convert(checkpoint(_REAL), tmp_path / "out", base=model, masters=True, dtype="float32")
    reshard.convert(checkpoint(_REAL), tmp_path / "same", base=model, dtype="keep")
    wide, narrow = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "same"))
    assert wide.keys() == truth(_REAL).keys()
    for name, tensor in narrow.items():
        assert torch.equal(wide[name].to(tensor.dtype), tensor)
        assert not torch.equal(wide[name], tensor.float())


def test_what_has_no_master_is_a_finding(native: State, tmp_path: Path) -> None:
    lost = "decoder.final_layernorm.weight"
    state = {f"optimizer.state.param.{n}": t for n, t in _masters(native).items() if n != lost}
    folder = saved(tmp_path / "run", {**native, **state})
    report = reshard.convert(folder, tmp_path / "out", masters=True)
    found = next(each for each in report.findings if each.code == "masters-missing")
    assert lost in found.message
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written[lost].dtype == torch.bfloat16


def test_a_master_of_another_shape(native: State, tmp_path: Path) -> None:
    name = "decoder.final_layernorm.weight"
    for shape in ((3,), (2, 3), (1, 2, 16)):
        state = {f"optimizer.state.param.{name}": torch.ones(shape)}
        folder = saved(tmp_path / f"run{len(shape)}", {**native, **state})
        with pytest.raises(reshard.FormatError, match="its shape is"):
            reshard.convert(folder, tmp_path / "out", masters=True)


def test_two_masters_of_one_tensor(native: State, tmp_path: Path) -> None:
    name = "decoder.final_layernorm.weight"
    keys = ("optimizer.state.param", "chained_0.optimizer.state.param")
    state = {f"{key}.{name}": native[name].float() for key in keys}
    folder = saved(tmp_path / "run", {**native, **state})
    with pytest.raises(reshard.FormatError, match="masters of one tensor"):
        reshard.convert(folder, tmp_path / "out", masters=True)


def test_without_masters_to_read(native: State, tmp_path: Path) -> None:
    """Buckets without names, no optimizer, another format: refused, and read without the flag."""
    named = base(_NAME, tmp_path / "base")
    for source, message in (
        (checkpoint("mlm_llama_dp2_distopt_dp_bf16"), "dp_reshardable"),
        (saved(tmp_path / "run", native), "no fp32 masters"),
        (named, "cannot read masters"),
    ):
        with pytest.raises(reshard.ReshardError, match=message) as caught:
            reshard.convert(source, tmp_path / "out", masters=True)
        assert str(caught.value.hint).startswith("Leave out --masters")
        assert reshard.convert(source, tmp_path / message.replace(" ", "-")).num_tensors
