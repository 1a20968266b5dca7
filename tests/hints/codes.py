"""Hints about quantised models, in conversions and of doctor."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import reshard
from reshard.core import findings
from reshard.diagnosis.signs import Signs
from reshard.diagnosis.table import CHECKS
from tests.folders import edit_config, edit_weights
from tests.hints import tiny
from tests.hints.case import Case, follows
from tests.hints.doctors import is_well, looking
from tests.hints.folders import after, converting, moved

TOKENIZER = '{"model": {"vocab": {"a": 0}}}'


def _quantised(at: Path, **more: Any) -> Path:
    """A model with one weight as fp8 of one block, and its config's statement."""
    state = tiny.state(1)
    name = f"{tiny.ADAPTED}.weight"
    scale = state[name].abs().max() / 448
    state[name], state[f"{name}_scale_inv"] = (
        (state[name] / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
    )  # fmt: skip
    stated: dict[str, Any] = {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
    }
    return tiny.model(at, tensors=state, **stated, **more)


@follows("Name the model as it was released; reshard doctor says more about this one.")
def scales_of_other_weights(at: Path) -> Case:
    released, ill = _quantised(at / "released"), _quantised(at / "ill")
    name = f"{tiny.ADAPTED}.weight"
    edit_weights(ill, lambda held: held.update({name: held[name].bfloat16()}))
    assert reshard.doctor(ill).errors  # tells more
    return moved(ill, released, at)


@follows("Make the 16-bit model first, and repair that: reshard convert DIR OUT.")
def quantised_model_to_repair(at: Path) -> Case:
    ill = _quantised(at / "ill", architectures=["FSDPLlamaForCausalLM"])
    (ill / "tokenizer.json").write_text(TOKENIZER)
    sixteen = converting(ill, at / "sixteen")
    return Case(
        looking(ill, None, at / "one"),
        after(sixteen, looking(at / "sixteen", None, at / "two")),
        same=is_well,
    )


@follows("Repair the unquantised model that it was made from.")
def codes_that_are_not_read_to_repair(at: Path) -> Case:
    stated: dict[str, Any] = {"architectures": ["FSDPLlamaForCausalLM"]}
    plain = tiny.model(at / "plain", **stated)
    (plain / "tokenizer.json").write_text(TOKENIZER)
    codes = shutil.copytree(plain, at / "codes")

    edit_weights(codes, _awq)
    edit_config(codes, quantization_config={"quant_method": "awq", "bits": 4})
    return Case(
        looking(codes, None, at / "one"),
        looking(plain, None, at / "two"),
        same=lambda found: bool(found.repaired),
    )


@follows("Copy the model again.")
def scale_that_was_lost(at: Path) -> Case:
    whole, ill = _quantised(at / "whole"), _quantised(at / "ill")
    edit_weights(ill, lambda held: held.pop(f"{tiny.ADAPTED}.weight_scale_inv"))
    return Case(looking(ill), looking(whole), same=is_well)


@follows("Convert the quantised release again: reshard convert FP8MODEL OUT.")
def codes_that_were_cast(at: Path) -> Case:
    """As a script leaves them that casts every tensor: 448 where a weight of 0.1 was."""
    release, ill = _quantised(at / "release"), _quantised(at / "ill")
    edit_config(ill, quantization_config=None)
    name = f"{tiny.ADAPTED}.weight"
    edit_weights(ill, lambda held: held.update({name: held[name].bfloat16()}))
    again = after(converting(release, at / "out"), looking(at / "out"))
    return Case(looking(ill), again, same=is_well)


def _awq(held: tiny.State) -> None:
    weight = held.pop(f"{tiny.ADAPTED}.weight")
    held[f"{tiny.ADAPTED}.qweight"] = torch.ones(len(weight), 1, dtype=torch.int32)
    held[f"{tiny.ADAPTED}.qzeros"] = torch.ones(1, 1, dtype=torch.int32)
    held[f"{tiny.ADAPTED}.scales"] = torch.ones(1, len(weight))


@follows("To compare them, examine the unquantised model.")
def codes_that_are_not_compared(at: Path) -> Case:
    plain = tiny.model(at / "plain", 2)
    codes, base = shutil.copytree(plain, at / "codes"), tiny.model(at / "base")
    edit_weights(codes, _awq)
    edit_config(codes, quantization_config={"quant_method": "awq", "bits": 4})
    return Case(looking(codes, base), looking(plain, base), same=is_well)


@follows("Copy the config of the model that it was made from.")
def codes_without_their_config(at: Path) -> Case:
    codes = tiny.model(at / "codes")
    edit_weights(codes, _awq)
    stated = {"quant_method": "awq", "bits": 4}
    copied = functools.partial(edit_config, codes, quantization_config=stated)
    return Case(looking(codes), after(copied, looking(codes)), same=is_well)


@follows("Convert the run's checkpoint again: reshard convert RUN OUT.")
def repair_that_leaves_an_error(at: Path) -> Case:
    """Of a check that no repair satisfies: the folder is not shown as repaired."""
    ill = tiny.model(at / "ill", 2, architectures=["FSDPLlamaForCausalLM"])
    (ill / "tokenizer.json").write_text(TOKENIZER)
    run, base = tiny.zero(at / "run"), tiny.model(at / "base")

    def stubborn(case: Any) -> Signs | None:
        corrected = case.folder.settings["architectures"] == ["LlamaForCausalLM"]
        return Signs(("it is always there",)) if corrected else None

    def repair() -> Any:
        with (
            mock.patch.dict(findings.CODES, {"stubborn": findings.Code("error", "always there")}),
            mock.patch("reshard.diagnosis.diagnosis.CHECKS", {**CHECKS, "stubborn": stubborn}),
        ):
            return reshard.doctor(ill, repair=at / "out")

    return Case(repair, converting(run, at / "again", base=base))
