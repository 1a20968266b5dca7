"""Training states that do not belong to their model or to one save, format by format.

Beside `test_refusals` and `test_damaged`: what those show of one format is shown of the others
here. Each is refused with nothing written, and each intact original is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import reshard
from reshard.errors import (
    FormatError,
    IncompleteError,
    PlanError,
    ReshardError,
    UnsupportedError,
)
from tests.state.cases import copied, opened
from tests.state.test_refusals import MODEL

Edit = Callable[[dict[str, Any]], None]
MOMENTS = ("exp_avg", "exp_avg_sq")


def edited(path: Path, edit: Edit) -> None:
    content = torch.load(path, weights_only=False)
    edit(content)
    torch.save(content, path)


def refused(run: Path, kind: type[ReshardError], words: str) -> ReshardError:
    """What is said of it; both targets are left alone, and no way around is offered that fails."""
    error: ReshardError | None = None
    for to in ("dcp", "deepspeed"):
        out = run.parent / f"out-{to}"
        with pytest.raises(kind, match=words) as caught:
            reshard.convert(run, out, to=to, optimizer=True)
        assert not out.exists()
        error = caught.value
    assert error is not None
    if "without --optimizer" in str(error.hint):
        assert reshard.convert(run, run.parent / "weights", to="dcp").verified
    return error


def zero3(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["optimizer_state_dict"]["optimizer_state_dict"]
    return found


def zero12(content: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = content["optimizer_state_dict"]["base_optimizer_state"]
    return found


ZERO = {
    "ds_s1_bf16": ("global_step3/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", zero12),
    "ds_s3_fp32_subgroups": ("global_step3/zero_pp_rank_1_mp_rank_00_optim_states.pt", zero3),
}


@pytest.mark.parametrize("name", ZERO)
def test_zero_with_ranks_of_different_steps(name: str, tmp_path: Path) -> None:
    run = copied(name, tmp_path)
    file, base = ZERO[name]

    def later(content: dict[str, Any]) -> None:
        for state in base(content)["state"].values():
            state["step"] += 1

    edited(run / file, later)
    error = refused(run, FormatError, "is at step 4, that of .* at step 3")
    assert str(error.path).endswith(Path(file).name)


@pytest.mark.parametrize("name", ZERO)
def test_zero_with_groups_that_do_not_cover_the_parameters(name: str, tmp_path: Path) -> None:
    run = copied(name, tmp_path)
    _, base = ZERO[name]

    def fewer(content: dict[str, Any]) -> None:
        base(content)["param_groups"].pop()

    for path in run.glob("global_step3/*optim_states.pt"):
        edited(path, fewer)
    refused(run, FormatError, "cover the flat tensors|parameter groups")


@pytest.mark.parametrize("name", ZERO)
def test_zero_of_another_model(name: str, tmp_path: Path) -> None:
    """As optimizer files of another run in this one's folder: their flat tensors are longer."""
    run = copied(name, tmp_path)

    def longer(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            return torch.cat([value, torch.ones(64, dtype=value.dtype)])
        if isinstance(value, dict):
            return {key: longer(each) for key, each in value.items()}
        return [longer(each) for each in value] if isinstance(value, list) else value

    for path in run.glob("global_step3/*optim_states.pt"):
        edited(path, lambda content: content.update(longer(content)))
    refused(run, IncompleteError, r"elements.* (must hold 2935|need \[833, 740)")


def universal(tmp_path: Path) -> tuple[Path, Path]:
    run = copied("uc_s2_fp32", tmp_path)
    return run, run / "global_step3_universal" / "zero"


def test_universal_of_another_model(tmp_path: Path) -> None:
    run, zero = universal(tmp_path)
    for kind in MOMENTS:
        edited(
            zero / "model.norm.weight" / f"{kind}.pt",
            lambda content: content.update(param=torch.ones(18)),
        )
    error = refused(run, FormatError, r"\(18,\)")
    assert error.tensor == "model.norm.weight"
    assert "(17,)" in str(error)


def test_universal_with_groups_that_do_not_cover_the_parameters(tmp_path: Path) -> None:
    run, zero = universal(tmp_path)
    edited(zero / "optimizer_state.pt", lambda content: content["param_groups"].pop())
    # Each group is matched by its place, and the file has fewer than the model's list.
    refused(run, ReshardError, "does not hold the lr, betas, eps, weight_decay of parameter group")


def test_a_rank_of_dcp_is_missing(tmp_path: Path) -> None:
    run = copied("fsdp2_lightrft_fp32", tmp_path)
    lost = run / "_actor/global_step3/optim_states/__1_0.distcp"
    lost.unlink()
    assert refused(run, IncompleteError, "__1_0.distcp").path


class Script:
    """A script's files of two ranks, both whole: the model's, and the optimizer's by names."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        model = torch.nn.ModuleDict({name: torch.nn.Linear(3, 3) for name in "ab"})
        self.weights = model.state_dict()
        names = list(self.weights)
        optimizer = torch.optim.AdamW(model.parameters())
        model["b"](model["a"](torch.ones(2, 3))).sum().backward()
        optimizer.step()
        held = optimizer.state_dict()
        (group,) = held["param_groups"]
        self.state: dict[str, Any] = {
            "state": {names[at]: state for at, state in held["state"].items()},
            "param_groups": [{**group, "params": names}],
        }

    def ranks(self) -> Path:
        for rank in range(2):
            torch.save(self.weights, self.folder / f"model_rank{rank}.pt")
            torch.save(self.state, self.folder / f"optim_rank{rank}.pt")
        return self.folder

    def one_file(self) -> Path:
        save_file(self.weights, self.folder / "model.safetensors", {"format": "pt"})
        torch.save(self.state, self.folder / "optimizer.bin")
        return self.folder


FORMS = [Script.ranks, Script.one_file]


@pytest.mark.parametrize("save", FORMS)
def test_names_of_another_model_in_files(save: Callable[[Script], Path], tmp_path: Path) -> None:
    script = Script(tmp_path / "run")
    with opened(save(script)) as found:
        assert len(found.state.moments["exp_avg"]) == 4
    script.state["state"] = {f"critic.{n}": s for n, s in script.state["state"].items()}
    group = script.state["param_groups"][0]
    group["params"] = [f"critic.{name}" for name in group["params"]]
    refused(save(script), FormatError, "4 parameters that the model does not have: critic")


@pytest.mark.parametrize("save", FORMS)
@pytest.mark.parametrize("twice", [True, False])
def test_groups_that_do_not_cover_the_parameters_in_files(
    save: Callable[[Script], Path], twice: bool, tmp_path: Path
) -> None:
    script = Script(tmp_path / "run")
    names = script.state["param_groups"][0]["params"]
    if twice:
        names.append(names[1])
    else:
        names.remove("a.bias")
    what = "a.bias is in several" if twice else "a.bias is in none"
    refused(save(script), FormatError, f"do not cover the parameters: {what}")


@pytest.mark.parametrize("save", FORMS)
def test_shapes_of_another_model_in_files(save: Callable[[Script], Path], tmp_path: Path) -> None:
    script = Script(tmp_path / "run")
    for kind in MOMENTS:
        script.state["state"]["a.bias"][kind] = torch.ones(4)
    error = refused(save(script), FormatError, r"\(4,\)")
    assert error.tensor == "a.bias"


def test_numbers_of_another_model(tmp_path: Path) -> None:
    """By numbers nothing but order and shapes can tell, and these are another model's."""
    script = Script(tmp_path / "run")
    names = script.state["param_groups"][0]["params"]
    script.state["state"] = {at: script.state["state"][name] for at, name in enumerate(names)}
    script.state["param_groups"][0]["params"] = list(range(4))
    path = tmp_path / "run" / "last.pt"
    torch.save({"model": script.weights, "optimizer": script.state}, path)
    with opened(path) as found:
        assert list(found.state.moments["exp_avg"]) == names
    for kind in MOMENTS:
        script.state["state"][1][kind] = torch.ones(4)
    torch.save({"model": script.weights, "optimizer": script.state}, path)
    refused(
        tmp_path / "run" / "last.pt", UnsupportedError, "match the model's parameters in no way"
    )


@pytest.mark.parametrize(
    ("layout", "unwritten", "kept"),
    [
        ("lightrft", {"global_steps", "global_samples", "skipped_steps"}, {"consumed_samples"}),
        ("accelerate", {"consumed_samples", "note", "global_steps"}, set()),
        ("nested", {"consumed_samples", "note", "global_steps"}, set()),
        ("torchtitan", {"consumed_samples", "note", "global_samples"}, {"global_steps"}),
    ],
)
def test_what_a_layout_has_no_place_for_is_named(
    layout: Any, unwritten: set[str], kept: set[str], tmp_path: Path
) -> None:
    """The target cannot hold it: a finding, which --strict makes a refusal."""
    asked: dict[str, Any] = {"to": "dcp", "optimizer": True, "layout": layout}
    run = copied("ds_s2_fp32", tmp_path)
    report = reshard.convert(run, tmp_path / "out", **asked)
    (found,) = [f for f in report.findings if f.code == "run-state-left-out"]
    assert unwritten <= (words := set(found.message.replace(",", " ").replace(";", " ").split()))
    assert not kept & words
    with pytest.raises(PlanError, match="run-state-left-out"):
        reshard.convert(run, tmp_path / "strict", strict=["run-state-left-out"], **asked)
    assert not (tmp_path / "strict").exists()


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"last_batch_iteration": 2}, "is not that of a scheduler of torch"),
        ({"last_epoch": 3, "base_lrs": [0.1] * 3}, "is of 3 parameter groups, and the optimizer"),
    ],
)
def test_a_schedule_that_the_target_would_not_take(
    schedule: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = copied("ds_s2_fp32", tmp_path)
    edited(run / MODEL, lambda content: content.update(lr_scheduler=schedule))
    report = reshard.convert(run, tmp_path / "out", to="dcp", optimizer=True)
    (found,) = [f for f in report.findings if f.code == "scheduler-left-out"]
    assert words in found.message
    assert not (tmp_path / "out" / "scheduler_state.pt").exists()
    intact = reshard.convert(
        copied("ds_s2_fp32", tmp_path / "again"), tmp_path / "whole", to="dcp", optimizer=True
    )
    assert "scheduler-left-out" not in [f.code for f in intact.findings]
    assert (tmp_path / "whole" / "scheduler_state.pt").exists()
