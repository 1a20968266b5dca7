"""The oracle against itself: where DeepSpeed's own tools can read a checkpoint, they agree."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.oracle.cache import Array, Oracle, Saved, to_numpy
from tests.oracle.recipes import PARALLEL, RECIPES, Recipe


def _ids(recipes: list[Recipe]) -> list[str]:
    return [recipe.name for recipe in recipes]


# What zero_to_fp32 0.19.8 cannot read, or reads wrongly: stage 0, BF16_Optimizer, legacy files.
READABLE = [
    recipe
    for recipe in RECIPES
    if recipe.stage > 0 and "data_types" not in recipe.config and "checkpoint" not in recipe.config
]


def same(mine: Array, theirs: Array) -> bool:
    """Same dtype, shape and bits."""
    return (
        mine.dtype == theirs.dtype
        and mine.shape == theirs.shape
        and mine.tobytes() == theirs.tobytes()
    )


@pytest.mark.parametrize("recipe", READABLE, ids=_ids(READABLE))
def test_zero_to_fp32_reads_the_truth(oracle: Oracle, recipe: Recipe, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    for index, saved in enumerate(oracle[recipe.name].saves):
        # Under a plain name: zero_to_fp32 globs the tag's path, so a tag with `[` finds nothing.
        (tmp_path / str(index)).symlink_to(saved.path)
        state = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path), tag=str(index))
        for name, master in saved.masters().items():
            assert same(master, to_numpy(state[name])), name


@pytest.mark.parametrize("recipe", RECIPES, ids=_ids(list(RECIPES)))
def test_truth_holds_every_tensor(oracle: Oracle, recipe: Recipe) -> None:
    saved = oracle[recipe.name].last
    masters, module = saved.masters(), saved.module()
    tied, frozen = saved.facts["tied"], saved.facts["frozen"]
    assert set(masters) == set(module) - set(tied) - set(frozen) - set(saved.facts["buffers"])
    for name, master in masters.items():
        low = recipe.name.startswith("low-masters")
        assert master.dtype == (module[name].dtype if low else np.float32)
        assert same(master.astype(module[name].dtype), module[name]), name
    for alias, name in tied.items():
        assert same(module[alias], module[name])


@pytest.mark.parametrize("recipe", RECIPES, ids=_ids(list(RECIPES)))
def test_masters_are_not_just_the_module(oracle: Oracle, recipe: Recipe) -> None:
    """A reader that took the bf16 weights for the masters must fail somewhere."""
    saved = oracle[recipe.name].last
    module = saved.module()
    finer = sum(
        not np.array_equal(master, module[name].astype(np.float32))
        for name, master in saved.masters().items()
    )
    trained = any(save.steps for save in recipe.saves)
    low = recipe.name.startswith("low-masters")
    assert (finer > 0) == (recipe.dtype == "bfloat16" and trained and not low)


def optimizer_states(saved: Saved) -> list[dict[str, Any]]:
    """What each rank saved of its optimizer, in rank order (fewer than ten ranks)."""
    files = sorted(saved.path.glob("*_optim_states.pt"))
    return [torch.load(file, weights_only=False)["optimizer_state_dict"] for file in files]


def model_state(saved: Saved) -> dict[str, Any]:
    """Rank 0's model file."""
    file = min(saved.path.glob("*_model_states.pt"))
    state: dict[str, Any] = torch.load(file, weights_only=False)
    return state


class TestRecipesAreWhatTheySay:
    """A recipe that silently fell back to the ordinary layout would test nothing."""

    def test_padding_leaves_a_rank_with_nothing(self, oracle: Oracle) -> None:
        states = optimizer_states(oracle["three-groups-zero2"].last)
        lengths = [[part.numel() for part in s["single_partition_of_fp32_groups"]] for s in states]
        assert [group[-1] for group in lengths] == [1, 0, 0]

    def test_a_tensor_spans_three_partitions(self, oracle: Oracle) -> None:
        saved = oracle["zero2-fp32-w3"].last
        group = optimizer_states(saved)[0]["single_partition_of_fp32_groups"][0]
        assert saved.masters()["embed.weight"].size > 2 * group.numel()

    def test_sub_groups(self, oracle: Oracle) -> None:
        for name in ("sub-groups", "sub-groups-w3"):
            saved = oracle[name].last
            (first, *_) = optimizer_states(saved)
            assert len(first["fp32_flat_groups"]) == 5
            assert len(saved.facts["groups"]) == 2

    def test_round_robin_changes_the_order(self, oracle: Oracle) -> None:
        for name in ("round-robin-zero1", "round-robin-zero2"):
            saved = oracle[name].last
            stored = [list(group) for group in model_state(saved)["param_shapes"]]
            given = [list(group) for group in saved.facts["groups"]]
            assert stored != given
            assert [sorted(group) for group in stored] == [sorted(group) for group in given]

    def test_elastic(self, oracle: Oracle) -> None:
        for name in ("elastic-zero1", "elastic-zero2"):
            (first, *_) = optimizer_states(oracle[name].last)
            assert isinstance(first["base_optimizer_state"], list)

    def test_bf16_optimizer_states_no_stage(self, oracle: Oracle) -> None:
        (first, *_) = optimizer_states(oracle["bf16-optimizer"].last)
        assert "zero_stage" not in first

    def test_alignment_leaves_gaps(self, oracle: Oracle) -> None:
        for name in ("aligned-bf16", "aligned-fp32"):
            (first, *_) = optimizer_states(oracle[name].last)
            assert sum(map(sum, first["param_alignment_paddings"])) > 0

    def test_muon_makes_groups_of_its_own(self, oracle: Oracle) -> None:
        (first, *_) = optimizer_states(oracle["muon-zero2"].last)
        names = {group["use_muon"] for group in first["base_optimizer_state"]["param_groups"]}
        assert names == {True, False}

    def test_low_masters(self, oracle: Oracle) -> None:
        (first, *_) = optimizer_states(oracle["low-masters-zero2"].last)
        assert first["single_partition_of_fp32_groups"][0].dtype == torch.bfloat16

    def test_legacy_container(self, oracle: Oracle) -> None:
        for stage in (1, 2, 3):
            files = list(oracle[f"legacy-zero{stage}"].last.path.glob("*.pt"))
            assert files
            assert not any(zipfile.is_zipfile(file) for file in files)

    def test_frozen_left_out(self, oracle: Oracle) -> None:
        for stage in (0, 1, 2, 3):
            saved = oracle[f"excluded-zero{stage}"].last
            assert set(saved.facts["frozen"]) == {"frozen.weight", "frozen.bias"}
            assert not set(saved.facts["frozen"]) & set(model_state(saved)["module"])

    def test_empty_parameter(self, oracle: Oracle) -> None:
        for stage in (1, 2, 3):
            saved = oracle[f"empty-zero{stage}"].last
            assert saved.module()["void.weight"].shape == (0, 3)
            assert "void.weight" in model_state(saved)["module"]

    def test_tags(self, oracle: Oracle) -> None:
        latest = oracle["two-tags"].root / "latest"
        assert latest.read_text() == "global_step2"
        assert not (oracle["no-latest"].root / "latest").exists()
        first, second = oracle["two-tags"].saves
        assert not same(first.masters()["up.weight"], second.masters()["up.weight"])

    def test_client_state_holds_user_objects(self, oracle: Oracle) -> None:
        state = model_state(oracle["client-state-zero2"].last)
        assert type(state["ds_oracle_save"]).__name__ == "Save"

    def test_export_16bit(self, oracle: Oracle) -> None:
        for stage in (2, 3):
            case = oracle[f"export-16bit-zero{stage}"]
            exported = torch.load(case.export / "pytorch_model.bin", weights_only=True)
            module = case.last.module()
            assert set(exported) == set(module)
            for name, tensor in exported.items():
                assert same(to_numpy(tensor), module[name]), name

    def test_universal(self, oracle: Oracle) -> None:
        for stage in (2, 3):
            case = oracle[f"universal-zero{stage}"]
            weights = torch.load(case.universal / "zero/up.weight/fp32.pt", weights_only=False)
            tensor = weights["param"] if isinstance(weights, dict) else weights
            assert to_numpy(tensor).tobytes() == case.last.masters()["up.weight"].tobytes()

    def test_bases_are_not_what_was_trained(self, oracle: Oracle) -> None:
        for name in ("llama-zero2", "llama-tied-zero3"):
            case = oracle[name]
            base = load_file(case.base / "model.safetensors")
            module = case.last.module()
            assert set(base) == set(module) - set(case.last.facts["tied"])
            changed = [n for n, t in base.items() if not same(to_numpy(t), module[n])]
            assert changed == list(base)

    def test_lora(self, oracle: Oracle) -> None:
        for stage in (2, 3):
            case = oracle[f"lora-zero{stage}"]
            base = load_file(case.base / "model.safetensors")
            masters = case.last.masters()
            assert masters
            assert all(".lora_" in name for name in masters)
            frozen = set(case.last.facts["frozen"])
            wrapped = {
                n.removeprefix("base_model.model.").replace(".base_layer.", ".") for n in frozen
            }
            assert wrapped == set(base)


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_runs_left_their_marks(oracle: Oracle, name: str) -> None:
    files = [file.name for file in oracle.parallel(name).rglob("*.pt")]
    marks = {
        "pipeline": "layer_02-model_states.pt",
        "experts": "layer_0_expert_1_mp_rank_00_model_states.pt",
        "tensor-parallel-zero1": "mp_rank_01_model_states.pt",
        "tensor-parallel-zero3": "zero_pp_rank_0_mp_rank_01_model_states.pt",
    }
    assert marks[name] in files
