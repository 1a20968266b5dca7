"""doctor and quantised models: sound ones are, and what codes, scales and config get wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.naming.quantised import refused
from tests.naming import tables
from tests.quantised.conftest import MAKERS, Get

KINDS = list(MAKERS)
State = dict[str, torch.Tensor]
#: What the tiny models of these tests lack beside their weights.
# The configs are as transformers 5 writes them.
LACKING = {"tokenizer-missing", "generation-config-missing", "chat-template-missing",
           "config-fields-missing"}  # fmt: skip


def found(folder: Path, base: Path | None = None) -> set[str]:
    return {finding.code for finding in reshard.doctor(folder, base=base).findings} - LACKING


def changed(
    folder: Path,
    out: Path,
    tensors: Callable[[State], State] = dict,
    config: Callable[[dict[str, Any]], object] = dict,
) -> Path:
    shutil.copytree(folder, out)
    state = tensors(load_file(out / "model.safetensors"))
    save_file(state, out / "model.safetensors", {"format": "pt"})
    path = out / "config.json"
    settings = json.loads(path.read_text())
    config(settings)
    path.write_text(json.dumps(settings))
    return out


def unstated(settings: dict[str, Any]) -> None:
    del settings["quantization_config"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_model_is_one(kind: str, model: Get, tmp_path: Path) -> None:
    folder, out = model(kind).folder, tmp_path / "out"
    assert found(folder) == set()
    reshard.convert(folder, out)
    assert found(out) == set()
    for one, other in ((out, folder), (folder, out)):
        assert found(one, other) <= {"identical-to-base"}


def test_a_finetuned_model_beside_its_quantised_base(model: Get, tmp_path: Path) -> None:
    folder = model("blocks").folder
    state = {k: v + 0.01 for k, v in model("blocks").model.state_dict().items()}
    torch.save(state, tmp_path / "run.pt")
    reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=folder)
    assert found(tmp_path / "out", folder) == set()


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_the_config_does_not_speak_of(kind: str, model: Get, tmp_path: Path) -> None:
    made = model(kind)
    ill = changed(made.folder, tmp_path / "ill", config=unstated)
    if kind != "blocks":  # of blocks of 32 the config alone tells
        assert found(ill) == {"quantisation-contradicts-config"}


def test_a_config_that_speaks_of_codes_that_are_not_there(model: Get, tmp_path: Path) -> None:
    made = model("blocks")
    reshard.convert(made.folder, tmp_path / "numbers")
    stated = json.loads((made.folder / "config.json").read_text())["quantization_config"]
    ill = changed(
        tmp_path / "numbers",
        tmp_path / "ill",
        config=lambda settings: settings.update(quantization_config=stated),
    )
    assert found(ill) == {"quantisation-contradicts-config"}
    # As a base it is taken for what its weights are.
    state = {k: v + 0.01 for k, v in load_file(ill / "model.safetensors").items()}
    torch.save(state, tmp_path / "run.pt")
    report = reshard.convert(tmp_path / "run.pt", tmp_path / "out", base=ill)
    assert [finding.code for finding in report.findings] == ["quantisation-unfounded"]
    assert found(tmp_path / "out") == set()


def numbers_with_scales(state: State, *, cast: bool) -> State:
    """What scripts leave behind that take codes for weights, or forget their scales."""
    made = {}
    for name, value in state.items():
        if value.dtype == torch.float8_e4m3fn:
            scale = state[f"{name}_scale_inv"].repeat_interleave(32, 0).repeat_interleave(32, 1)
            value = value.float() * (1 if cast else scale)
        made[name] = value.bfloat16() if not name.endswith("_inv") else value
    return made


@pytest.mark.parametrize("cast", [True, False])
def test_scales_beside_weights_that_are_no_codes(cast: bool, model: Get, tmp_path: Path) -> None:
    made = model("blocks")
    ill = changed(
        made.folder,
        tmp_path / "ill",
        lambda state: numbers_with_scales(state, cast=cast),
        config=unstated,
    )
    diagnosis = reshard.doctor(ill)
    (finding,) = (f for f in diagnosis.findings if f.code == "scales-left-over")
    assert ("the codes themselves" in finding.message) == cast
    assert (finding.code not in diagnosis.repairable) == cast
    roles: tuple[dict[str, Any], ...] = ({"base": ill}, {})
    for role in roles:
        source = tmp_path / "run.pt" if role else ill
        torch.save(made.model.state_dict(), tmp_path / "run.pt")
        with pytest.raises(reshard.FormatError, match="reshard doctor"):
            reshard.convert(source, tmp_path / "out", **role)


def test_leftover_scales_are_mended(model: Get, tmp_path: Path) -> None:
    made = model("blocks")

    def complete(folder: Path) -> Path:
        (folder / "tokenizer.json").write_text("{}")
        (folder / "tokenizer_config.json").write_text("{}")
        return folder

    ill = changed(
        made.folder, tmp_path / "ill", lambda state: numbers_with_scales(state, cast=False)
    )
    complete(ill)
    diagnosis = reshard.doctor(ill, repair=tmp_path / "out")
    assert diagnosis.repaired is not None, [str(f) for f in diagnosis.findings]
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in made.model.state_dict().items():
        assert torch.equal(written[name], value), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    # A sound quantised model with another fault is not made a 16-bit one on the way.
    lacking = changed(made.folder, tmp_path / "lacking")
    complete(lacking)
    (lacking / "tokenizer_config.json").unlink()
    base = complete(changed(made.folder, tmp_path / "base"))
    other = dict(load_file(base / "model.safetensors"))
    other["model.norm.weight"] = other["model.norm.weight"] * 2
    save_file(other, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(reshard.PlanError, match="reshard convert DIR OUT"):
        reshard.doctor(lacking, base=base, repair=tmp_path / "no")


def test_a_code_without_its_scale(model: Get, tmp_path: Path) -> None:
    made = model("blocks")
    lost = "model.layers.0.mlp.up_proj.weight_scale_inv"
    ill = changed(
        made.folder, tmp_path / "ill", lambda s: {k: v for k, v in s.items() if k != lost}
    )
    assert found(ill) == {"codes-unreadable"}
    with pytest.raises(reshard.IncompleteError, match="but it has no scale"):
        reshard.convert(ill, tmp_path / "out")


@pytest.mark.parametrize(
    ("leaf", "value"),
    [("weight_scale_inv", torch.ones(5, 2)), ("weight_scale_inv", torch.ones(0, 2)),
     ("weight", torch.zeros((), dtype=torch.float8_e4m3fn))],
    ids=["too many scales", "no scales", "no dimensions"],
)  # fmt: skip
def test_scales_of_another_shape(
    leaf: str, value: torch.Tensor, model: Get, tmp_path: Path
) -> None:
    made = model("blocks")
    name = f"model.layers.0.mlp.up_proj.{leaf}"
    ill = changed(made.folder, tmp_path / "ill", lambda s: {**s, name: value})
    assert found(ill) == {"codes-unreadable"}
    with pytest.raises(reshard.UnsupportedError, match="does not match codes of shape"):
        reshard.convert(ill, tmp_path / "out")


def test_packed_codes_without_dimensions() -> None:
    found = refused(tables.entries({"x.weight_packed": (), "x.weight_scale": (2,)}), None)
    assert found is not None
    assert found.modules == {"x"}
