"""Training state that is damaged, or that is not what its name says.

Each case spoils a golden run's state in one way; what the hint says is done to the letter.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reshard
from tests.hints.case import Case, follows
from tests.hints.folders import after, converting
from tests.state.cases import case, copied

STEP = "_actor/global_step3"
ZERO = "global_step3_universal/zero"
NORM = f"{ZERO}/model.norm.weight"
FIRST = f"{ZERO}/model.layers.0.input_layernorm.weight"
DAMAGED = (
    "Copy the file again. If the run can start this part of its state anew, move the file away."
)
OTHER_SAVE = (
    "Copy the checkpoint again, or use another save. The weights alone: leave out --optimizer."
)


def convert(run: Path, out: Path, **options: Any) -> Callable[[], reshard.Report]:
    given: dict[str, Any] = {"to": "dcp", "optimizer": True, **options}
    return converting(run, out, **given)


def _put_back(path: Path, name: str, then: Callable[[], Any]) -> Callable[[], Any]:
    (whole,) = case(name).folder.rglob(path.name)
    return after(lambda: shutil.copy(whole, path), then)


def _beside(name: str, file: str, content: bytes | None, *, away: bool) -> Callable[[Path], Case]:
    """A file beside a save that is cut off, or holds something else; put back, or moved away."""

    def case_(at: Path) -> Case:
        run = copied(name, at)
        path = run / file
        if content is None:
            os.truncate(path, path.stat().st_size // 2)
        else:
            path.write_bytes(content)
        again = convert(run, at / "out")
        moved = after(lambda: path.rename(at / "away"), again)
        mend = moved if away else _put_back(path, name, again)
        return Case(again, mend, same=lambda report: bool(report.state.steps))

    return case_


for _name, _file, _content, _away in (
    ("fsdp2_lightrft_fp32", f"{STEP}/scheduler_state.pt", None, False),
    ("fsdp2_lightrft_fp32", f"{STEP}/scheduler_state.pt", None, True),
    ("fsdp2_lightrft_fp32", f"{STEP}/client_state.pt", None, False),
    ("fsdp1_accelerate_fp32", "checkpoint-3/scheduler.pt", None, True),
    ("fsdp1_accelerate_fp32", "checkpoint-3/scheduler.pt", b"", True),
    ("fsdp2_accelerate_bf16", "checkpoint-3/trainer_state.json", b'{"global_st', True),
):
    follows(DAMAGED)(_beside(_name, _file, _content, away=_away))


@follows(DAMAGED)
def verls_schedule(at: Path) -> Case:
    run = copied("fsdp2_verl_fp32", at)
    (path,) = run.rglob("extra_state_world_size_2_rank_0.pt")
    os.truncate(path, 100)
    again = convert(run, at / "out")
    return Case(again, _put_back(path, "fsdp2_verl_fp32", again))


def _moment(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], Case]:
    """The norm's second moment, changed; the weights alone are right."""

    def case_(at: Path) -> Case:
        run = copied("uc_s2_fp32", at)
        path = run / NORM / "exp_avg_sq.pt"
        content = torch.load(path)
        torch.save({**content, "param": change(content["param"])}, path)
        return Case(convert(run, at / "out"), convert(run, at / "out", optimizer=False))

    return case_


follows(OTHER_SAVE)(_moment(lambda squares: -squares))


@follows(OTHER_SAVE)
def one_moment_over_the_other(at: Path) -> Case:
    run = copied("uc_s2_fp32", at)
    shutil.copy(run / NORM / "exp_avg.pt", run / NORM / "exp_avg_sq.pt")
    other = case("uc_s2_fp32").folder
    return Case(convert(run, at / "out"), convert(other, at / "out"))


@follows(OTHER_SAVE)
def the_square_over_the_mean(at: Path) -> Case:
    run = copied("uc_s3_fp32_subgroups", at)
    shutil.copy(run / NORM / "exp_avg_sq.pt", run / NORM / "exp_avg.pt")
    return Case(convert(run, at / "out"), convert(run, at / "out", optimizer=False))


@follows("Copy or download the file again.")
def an_exported_model_that_was_cut_off(at: Path) -> Case:
    reshard.convert(case("ds_s2_fp32").folder, at / "model")
    path = at / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])

    def mend() -> reshard.Report:
        path.write_bytes(whole)
        return reshard.convert(at / "model", at / "out", to="dcp")

    return Case(lambda: reshard.convert(at / "model", at / "out", to="dcp"), mend)


@follows("Copy the checkpoint again, or use another save.")
def a_moment_of_another_parameter(at: Path) -> Case:
    run = copied("uc_s2_fp32", at)
    shutil.copy(run / FIRST / "exp_avg.pt", run / NORM / "exp_avg.pt")
    other = case("uc_s2_fp32").folder
    return Case(convert(run, at / "out"), convert(other, at / "out2"))


@follows("The folder may be a mixture of two. Make the universal checkpoint again.")
def a_parameter_too_many(at: Path) -> Case:
    run = copied("uc_s2_fp32", at)
    shutil.copytree(run / NORM, run / ZERO / "foo.weight")
    other = case("uc_s2_fp32").folder
    return Case(convert(run, at / "out"), convert(other, at / "out2"))


@follows("Correct its name, or leave it out.")
def a_hyperparameter_with_a_typo(at: Path) -> Case:
    known: dict[str, Any] = {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.1}
    file = at / "hyper.json"
    file.write_text(json.dumps([{**known, "amsgrat": False}] * 2))
    run = case("ds_s2_bf16_elastic").folder

    def mend() -> reshard.Report:
        file.write_text(json.dumps([{**known, "amsgrad": False}] * 2))
        return convert(run, at / "out2", hyperparameters=file)()

    return Case(convert(run, at / "out", hyperparameters=file), mend)


@follows("To verify the output: {}.")
def exchanged(at: Path) -> Case:
    run = case("fsdp2_lightrft_fp32").folder / STEP
    reshard.convert(run, at / "out", to="dcp", optimizer=True)
    return Case(
        lambda: reshard.verify(run, at / "out"),
        lambda: reshard.verify(at / "out", run),
        same=lambda found: found.num_tensors > 0 and not found.findings,
    )
