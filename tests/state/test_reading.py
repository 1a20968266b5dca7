"""Training states of real runs are read bit for bit, with everything that belongs to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reshard.core.state import Step
from reshard.formats import Selection, locate
from reshard.formats.info import OWN
from reshard.storage.local import Sources
from tests.state.cases import DEEPSPEED, FSDP, Opened, case, copied, opened, plain

EVERY = (*DEEPSPEED, *FSDP)


@pytest.mark.parametrize("name", EVERY)
def test_every_moment_and_master_is_the_live_engines(name: str) -> None:
    run = case(name)
    with opened(run.folder) as found:
        got = {e.spec.name: found.stored(e) for e in found.state.entries()}
        weights = {n: found.stored(entry) for n, entry in found.catalog.entries.items()}
    moments = {key: value for key, value in got.items() if not key.startswith("master.")}
    assert moments == run.moments()
    for key, want in run.truth().items():
        kind, _, tensor = key.partition(".")
        if kind in ("master", "param"):
            assert got.get(key, weights[tensor]) == want


@pytest.mark.parametrize("name", EVERY)
def test_groups_steps_and_schedule_are_those_of_the_run(name: str) -> None:
    run = case(name)
    with opened(run.folder) as found:
        state = found.state
    frozen, trained = set(run.facts["frozen"]), {k.partition(".")[2] for k in run.moments()}
    assert set(state.steps) == trained
    assert {step.count for step in state.steps.values()} == {run.facts["optimizer_step"]}
    assert {step.stored for step in state.steps.values()} == {"float32"}
    names = [list(group.names) for group in state.groups]
    if run.facts["group_names"] is not None:
        assert list(map(sorted, names)) == list(map(sorted, run.facts["group_names"]))
    assert {n for group in names for n in group} == trained
    assert not frozen & set(state.names)
    assert not set(run.facts["tied"]) & set(state.names)
    if "elastic" in name:
        assert not state.hyperparameters_known
    else:
        assert [plain(g.hyperparameters) for g in state.groups] == run.facts["param_groups"]


@pytest.mark.parametrize("name", DEEPSPEED)
def test_the_run_of_deepspeed(name: str) -> None:
    run = case(name)
    with opened(run.folder) as found:
        state = found.state
    assert plain(state.scheduler) == run.facts["lr_scheduler"]
    assert state.counters == {"global_steps": 3, "global_samples": 12, "skipped_steps": 0}
    assert state.client_state == {"consumed_samples": 12, "note": "hello"}
    assert state.left_out == ()
    assert state.scaler == {}


@pytest.mark.parametrize(
    ("name", "client", "counters"),
    [
        ("fsdp2_lightrft_fp32", {"consumed_samples": 12}, {}),
        ("fsdp2_accelerate_bf16", {}, {}),
        ("fsdp2_titan_fp32", {}, {"step": 3, "ntokens_seen": 144}),
    ],
)
def test_the_run_of_fsdp(name: str, client: dict[str, int], counters: dict[str, int]) -> None:
    run = case(name)
    with opened(run.folder) as found:
        state = found.state
    schedule = run.facts["lr_scheduler"]
    want = {"last_epoch": schedule["last_epoch"]} if "titan" in name else schedule
    assert plain(state.scheduler) == want
    assert (state.client_state, state.counters, state.left_out) == (client, counters, ())


def test_the_hf_trainers_step(tmp_path: Path) -> None:
    run = copied("fsdp2_accelerate_bf16", tmp_path)
    (run / "checkpoint-3/trainer_state.json").write_text('{"global_step": 3, "epoch": 0.5}')
    with opened(run / "checkpoint-3") as found:
        assert found.state.counters == {"global_steps": 3}


@pytest.mark.parametrize("name", ["ds_s0_bf16", "ds_s0_bf16_fused"])
def test_without_zero_the_masters_are_the_weights(name: str) -> None:
    run = case(name)
    with opened(run.folder) as found:
        catalog = found.catalog
    kinds = {name: entry.kind for name, entry in catalog.entries.items()}
    assert [name for name, kind in kinds.items() if kind == "frozen"] == run.facts["frozen"]
    trained = [entry for entry in catalog.entries.values() if entry.kind == "parameter"]
    assert {entry.spec.dtype.name for entry in trained} == {"float32"}
    assert not catalog.findings


def test_names_that_only_the_order_tells_are_said() -> None:
    with opened(case("ds_s0_fp32").folder) as found:
        codes = [finding.code for finding in found.state.findings]
    assert codes == ["state-named-by-order"]
    with opened(case("ds_s0_bf16").folder) as found:
        assert found.state.findings == ()


def test_a_step_of_a_dry_run_stays() -> None:
    with opened(case("ds_s0_bf16").folder) as found:
        state = found.state
    assert set(state.steps.values()) == {Step(4, "float32")}
    assert state.counters["global_steps"] == 3


def test_the_state_is_read_only_when_it_is_asked_for() -> None:
    with Sources() as sources:
        catalog = locate.read(case("uc_s2_fp32").folder, sources, Selection())
        before = set(sources.paths())
        assert not any("exp_avg" in path.name for path in before)
        assert catalog.optimizer is not None
        catalog.optimizer()
        assert any("exp_avg" in path.name for path in sources.paths())


def test_the_formats_that_hold_state_say_so() -> None:
    assert {info.name for info in OWN if info.training_state} >= {"deepspeed", "dcp", "ranks"}


def test_sizes_and_names() -> None:
    with opened(case("ds_s2_fp32").folder) as found:
        _check_sizes(found)


def _check_sizes(found: Opened) -> None:
    state = found.state
    numel = sum(e.spec.numel for e in state.masters.values())
    assert state.nbytes == 2 * 4 * numel
    renamed = state.renamed(lambda name: f"actor.{name}")
    assert renamed.names == tuple(f"actor.{name}" for name in state.names)
    assert set(renamed.moments["exp_avg"]) == set(renamed.names) == set(renamed.steps)
