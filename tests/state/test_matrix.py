"""The matrix of docs/training-state.md: each row has a source here, each cell is run.

That moments are those of the live optimizers, and that torch and DeepSpeed load the outputs, is
proven for each source in the modules beside; here, that no cell of the matrix is a mere claim.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reshard
from reshard.errors import PlanError
from reshard.formats.dcp.state_layout import LAYOUTS
from tests.megatron import golden as megatron
from tests.oracle.cache import Oracle
from tests.state.cases import case
from tests.state.test_whole_files import trained

PAGE = Path(__file__).parents[2] / "docs" / "training-state.md"
COLUMNS = {
    "DCP `lightrft`": ("lightrft",),
    "DCP `accelerate`, `nested`, `torchtitan`": ("accelerate", "nested", "torchtitan"),
    "DeepSpeed universal": ("universal",),
}
Source = tuple[Path, dict[str, Any]]


def _golden(name: str) -> Callable[[Path, pytest.FixtureRequest], Source]:
    return lambda folder, request: (case(name).folder, {})


def _elastic(folder: Path, request: pytest.FixtureRequest) -> Source:
    group = {"lr": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    file = folder / "groups.json"
    file.write_text(json.dumps([group, group]))
    return case("ds_s2_bf16_elastic").folder, {"hyperparameters": file}


def _megatron(folder: Path, request: pytest.FixtureRequest) -> Source:
    name = "mcore012_llama_dp2_distopt_modelspace_bf16"
    return megatron.checkpoint(name), {"base": megatron.base(name, folder / "base")}


def _pipeline(folder: Path, request: pytest.FixtureRequest) -> Source:
    run = request.getfixturevalue("pipeline_runs") / "tied"
    return run / "checkpoint", {"base": run / "base"}


def _one_file(folder: Path, request: pytest.FixtureRequest) -> Source:
    model, optimizer, _ = trained()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, folder / "last.pt")
    return folder / "last.pt", {}


ROWS: dict[str, tuple[Callable[[Path, pytest.FixtureRequest], Source], ...]] = {
    "ZeRO-1, 2, 3, BF16_Optimizer, no ZeRO, universal": tuple(
        map(_golden, ("ds_s1_bf16", "ds_s1_bf16_gradacc32", "ds_s0_fp32", "uc_s3_fp32_subgroups"))
    ),
    "ZeRO, elastic": (_elastic,),
    "DCP: LightRFT, accelerate (FSDP1, FSDP2), nested, flattened, torchtitan's": tuple(
        map(_golden, ("fsdp2_lightrft_fp32", "fsdp1_accelerate_fp32", "fsdp2_titan_fp32"))
    ),
    "files of each rank: verl (FSDP1, FSDP2), accelerate, a script's": (
        _golden("fsdp2_verl_fp32"),
    ),
    "Megatron-Core, DeepSpeed's pipelines": (_megatron, _pipeline),
    "one file: FULL_STATE_DICT, the HF Trainer, a script's": (_one_file,),
}


def test_the_page_and_this_module_name_the_same_cells() -> None:
    """A row or column that is new on the page asks for its source here."""
    lines = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("|")]
    start = next(at for at, line in enumerate(lines) if line.startswith("| from"))
    head, _, *rows = [[c.strip() for c in re.split(r"\|", ln)[1:-1]] for ln in lines[start:]]
    assert head[1:] == list(COLUMNS)
    assert {layout for layouts in COLUMNS.values() for layout in layouts} == {*LAYOUTS, "universal"}
    rows = rows[: len(ROWS)]
    assert [row[0] for row in rows] == list(ROWS)
    for row in rows:
        want = "with `--hyperparameters`" if "elastic" in row[0] else "yes"
        assert row[1:] == [want] * len(COLUMNS)


CELLS = [
    (row, at, layout)
    for row, makers in ROWS.items()
    for at in range(len(makers))
    for layouts in COLUMNS.values()
    for layout in layouts
]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("row", "at", "layout"), CELLS, ids=[f"{r.split()[0]}{at}-{to}" for r, at, to in CELLS]
)
def test_each_cell(
    row: str, at: int, layout: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, options = ROWS[row][at](tmp_path, request)
    to: dict[str, Any] = {"to": "deepspeed"}
    if layout != "universal":
        to = {"to": "dcp", "optimizer": True, "layout": layout}
    report = reshard.convert(source, tmp_path / "out", **to, **options)
    assert report.verified
    assert report.state is not None
    against = {key: value for key, value in options.items() if key == "base"}
    found = reshard.open(tmp_path / "out").optimizer
    assert found is not None
    assert sum(map(len, found.moments.values())) == 2 * report.state.num_parameters > 20
    assert all(group.hyperparameters["lr"] for group in found.groups)
    if "elastic" not in row:
        assert reshard.verify(tmp_path / "out", against=source, **against).num_tensors


def test_merged_adapters(oracle: Oracle, tmp_path: Path) -> None:
    """They have no moments of their own; both ways that the hint names are taken."""
    run = oracle["lora-zero2"]
    merge: dict[str, Any] = {
        "base": run.base, "lora": "merge", "lora_alpha": 6, "allow_unchanged": True
    }  # fmt: skip
    for to in ("dcp", "deepspeed"):
        with pytest.raises(PlanError, match="LoRA is merged into 4 of the weights") as caught:
            reshard.convert(run.root, tmp_path / "out", to=to, optimizer=True, **merge)
        assert not (tmp_path / "out").exists()
        assert "leave out --base and the options that act on it" in str(caught.value)
        report = reshard.convert(run.root, tmp_path / to, to=to, optimizer=True)
        assert report.state is not None
        assert report.state.num_parameters == 8
    assert reshard.convert(run.root, tmp_path / "merged", to="hf", **merge).verified
