"""DeepSpeed's own optimizers, live on both sides: what was saved is what a new engine holds.

Muon with its Adam; DeepSpeedCPUAdam and FusedAdam, whose operators are torch's here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

import reshard
from tests.state.cases import opened
from tests.state.conftest import Ranks
from tests.state.jobs import Job, Place

Live = dict[str, torch.Tensor]
ZERO2 = Job("zero2", 2, "", (1, 3), kind="llama", frozen=False)
SOURCES: dict[str, Job] = {
    "muon": replace(ZERO2, optimizer="muon"),
    "muon_offloaded": replace(ZERO2, optimizer="muon_offloaded"),
    "torch": ZERO2,
    "fsdp2": replace(ZERO2, engine="fsdp2"),
}
# What is loaded into: the source, and who loads.
TARGETS: dict[str, tuple[str, Job]] = {
    "muon offloaded from muon": ("muon", replace(ZERO2, optimizer="muon_offloaded")),
    "muon alone from muon": ("muon", replace(ZERO2, optimizer="muon", world=1)),
    "cpu_adam": ("torch", replace(ZERO2, optimizer="cpu_adam", world=1)),
    "cpu_adam of fsdp2": ("fsdp2", replace(ZERO2, optimizer="cpu_adam", world=3)),
    "fused_adam": ("torch", replace(ZERO2, optimizer="fused_adam", world=3)),
    "fused_adam of fsdp2": ("fsdp2", replace(ZERO2, optimizer="fused_adam")),
}


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of each source, saved; converted; and loaded by each target before its next."""
    root = tmp_path_factory.mktemp("live")
    saves = []
    for name, job in SOURCES.items():
        layout = "nested" if job.engine == "fsdp2" else "deepspeed"
        place = Place(str(root / name / "saved"), layout)  # type: ignore[arg-type]
        saves.append(replace(job, out=str(root / name), save=place))
    ranks.run(*saves)
    for name in SOURCES:
        report = reshard.convert(root / name / "saved", root / name / "universal", to="deepspeed")
        found = {finding.code: finding.to_json()["fix"] for finding in report.findings}
        assert ("universal-muon" in found) == ("muon" in name)
        assert found["universal-stage3"].startswith("Load it with ZeRO stage 1 or 2")
        assert ("run the code" in found["universal-stage3"]) == ("muon" not in name)
    loads = []
    for name, (source, job) in TARGETS.items():
        place = Place(str(root / source / "universal"), "universal")
        loads.append(replace(job, out=str(root / name), load=place, steps=(3, 4), spoilt=True))
    ranks.run(*loads)
    return root


def live(folder: Path, when: str) -> Live:
    """What the engine held, but for what a forward pass alone needs."""
    found: Live = load_file(folder / f"{when}.safetensors")
    return found


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_read_is_the_live_optimizers(name: str, runs: Path) -> None:
    want = live(runs / name, "end")
    with opened(runs / name / "saved") as found:
        held = {f"{k}.{n}": e for k, table in found.state.moments.items() for n, e in table.items()}
        got = {key: torch.from_numpy(found.array(e).astype("float32")) for key, e in held.items()}
    moments = {key: value for key, value in want.items() if not key.startswith("param.")}
    assert got.keys() == moments.keys()
    assert [key for key, value in moments.items() if not torch.equal(got[key], value)] == []
    assert any(key.startswith("momentum_buffer") for key in got) == ("muon" in name)
    assert any(key.startswith("exp_avg_sq") for key in got)


def test_what_deepspeed_makes_of_muon_on_several_ranks(
    runs: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """What the finding says: a rank's part is not the momentum of whole parameters."""
    place = Place(str(runs / "muon" / "universal"), "universal")
    job = replace(ZERO2, optimizer="muon", out=str(tmp_path), load=place, steps=(3, 4))
    with pytest.raises(AssertionError, match="is invalid for input of size"):
        ranks.run(job)


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_saved_is_what_the_target_holds(name: str, runs: Path) -> None:
    source, _ = TARGETS[name]
    want, found = live(runs / source, "end"), live(runs / name, "start")
    assert found.keys() == want.keys()
    assert [key for key, value in want.items() if not torch.equal(found[key], value)] == []
    before = json.loads((runs / source / "end.json").read_text())
    after = json.loads((runs / name / "start.json").read_text())
    assert after["steps"] == before["steps"]


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("g++")), reason="no compiler for the operator"
)
def test_the_compiled_operator(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeedCPUAdam as it runs in users' scripts, on both sides; compiled once, in a minute."""
    saved, moved = str(tmp_path / "saved"), str(tmp_path / "moved")
    compiled = replace(ZERO2, optimizer="compiled_cpu_adam")
    ranks.run(replace(compiled, out=str(tmp_path / "before"), save=Place(saved, "deepspeed")))
    want = live(tmp_path / "before", "end")
    moments = {key: value for key, value in want.items() if not key.startswith("param.")}
    assert len(moments) > 30
    with opened(tmp_path / "saved") as found:
        for key, value in moments.items():
            kind, _, name = key.partition(".")
            held = found.array(found.state.moments[kind][name])
            assert torch.equal(torch.from_numpy(held.copy()), value), key
        assert {step.count for step in found.state.steps.values()} == {2}
    assert reshard.convert(tmp_path / "saved", tmp_path / "moved", to="deepspeed").verified
    place = Place(moved, "universal")
    after = str(tmp_path / "after")
    ranks.run(replace(compiled, world=3, out=after, load=place, steps=(3, 4), spoilt=True))
    start = live(tmp_path / "after", "start")
    assert start.keys() == want.keys()
    assert [key for key, value in want.items() if not torch.equal(start[key], value)] == []
