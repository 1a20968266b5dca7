"""AutoTP runs: parts of several tensor parallel ranks, joined as their metadata says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

import reshard
from reshard.containers.torch.plain import PlainData
from reshard.formats.deepspeed import files, place, state
from reshard.storage.local import Sources
from tests.deepspeed.conftest import ParallelRuns
from tests.deepspeed.parallel_oracle import RECIPES, TENSOR_PARALLEL
from tests.deepspeed.test_reading import same_bits
from tests.folders import edit_saved
from tests.oracle.cache import Oracle, to_numpy

NAMES = [recipe.name for recipe in TENSOR_PARALLEL]


KEY = "universal_checkpoint_info"


def model_files(tag: Path) -> list[Path]:
    return sorted(tag.glob("*_model_states.pt"))


def edit_info(tag: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metadata of tensor parallelism in every model file."""
    for path in model_files(tag):
        edit_saved(path, lambda content: change(content[KEY]))


def check_against_truth(checkpoint: reshard.Checkpoint, runs: ParallelRuns, name: str) -> None:
    expected = runs[name].expected()
    assert set(checkpoint.tensors) == set(expected)
    for tensor in checkpoint.tensors.values():
        assert same_bits(tensor.numpy(), expected[tensor.name]), tensor.name


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_live_engines(parallel_runs: ParallelRuns, name: str) -> None:
    recipe = RECIPES[name]
    checkpoint = reshard.open(parallel_runs[name].root)
    check_against_truth(checkpoint, parallel_runs, name)
    assert checkpoint.world_size == recipe.world
    assert checkpoint.catalog.origin.details["tensor_parallel"] == recipe.tensor_parallel
    kinds = {t.name: t.kind for t in checkpoint.tensors.values()}
    assert ("lm_head.weight", "tied") in kinds.items() or "tied" not in name
    frozen = {n for n, kind in kinds.items() if kind == "frozen"}
    assert bool(frozen) == bool(recipe.frozen)
    assert all(n == "lm_head.weight" or ".layers.0." in n for n in frozen)
    assert {n for n, kind in kinds.items() if kind == "buffer"} == (
        {"count", "mean"} if recipe.model == "packed" else set()
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_lists_say_what_the_map_says(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str
) -> None:
    """DeepSpeed 0.19.6 wrote the lists alone; newer ones write them for older readers."""
    tag = parallel_runs[name].copy(tmp_path)
    edit_info(tag, lambda info: info.pop("affine_map"))
    check_against_truth(reshard.open(tag), parallel_runs, name)


@pytest.mark.parametrize("version", [0.2, 0.3])
def test_lists_that_are_not_complete_are_refused(
    parallel_runs: ParallelRuns, tmp_path: Path, version: float
) -> None:
    """As DeepSpeed 0.18.9 to 0.19.5 wrote them: what AutoTP left whole is in no list.

    Read by the rule that such parameters are split along dimension 0, as ds_to_universal of those
    versions did, every norm would come out twice as long.
    """
    tag = parallel_runs["tp-zero1"].copy(tmp_path)

    def older(info: dict[str, Any]) -> None:
        del info["affine_map"], info["autotp_unsupported_parameter_patterns"]
        info["tp_replicated_parameter_patterns"] = []
        info["universal_checkpoint_version"] = version

    edit_info(tag, older)
    with pytest.raises(reshard.UnsupportedError, match=f"version {version}.*of every parameter"):
        reshard.open(tag)


def test_rows_that_the_vocabulary_does_not_have(
    parallel_runs: ParallelRuns, tmp_path: Path
) -> None:
    tag = parallel_runs["tp-zero1"].copy(tmp_path)

    def change(info: dict[str, Any]) -> None:
        del info["affine_map"]
        info["original_vocab_size"] = 36

    edit_info(tag, change)
    with pytest.raises(reshard.FormatError, match="37 rows, and the vocabulary 36") as caught:
        reshard.open(tag)
    assert caught.value.tensor == "lm_head.weight"


def test_a_rank_that_holds_nothing_of_a_parameter(parallel_runs: ParallelRuns) -> None:
    """Two heads of keys over three ranks."""
    run = parallel_runs["tp-three-zero2"]
    file = next(run.root.rglob("mp_rank_02_model_states.pt"))
    module = torch.load(file, weights_only=False)["module"]
    assert module["model.layers.0.self_attn.k_proj.weight"].numel() == 0
    tensor = reshard.open(run.root).tensors["model.layers.0.self_attn.k_proj.weight"]
    assert tensor.shape == (8, 16)


@pytest.mark.parametrize("name", [r.name for r in TENSOR_PARALLEL if r.stage and r.steps])
def test_every_moment_is_the_live_optimizers(parallel_runs: ParallelRuns, name: str) -> None:
    parallel_runs[name].check_moments()


def test_the_optimizer_of_a_rank_that_holds_nothing_of_a_parameter(
    parallel_runs: ParallelRuns,
) -> None:
    """Its groups lack the parameters of which it has no element."""
    state = reshard.open(parallel_runs["tp-three-zero2"].root).catalog.training_state()
    assert state is not None
    assert [len(group.names) for group in state.groups] == [21]
    assert len(state.masters) == 21


@pytest.mark.parametrize("name", ["tensor-parallel-zero1", "tensor-parallel-zero3"])
def test_before_the_first_step_it_is_the_base(oracle: Oracle, name: str) -> None:
    folder = oracle.parallel(name)
    base = load_file(folder / "base" / "model.safetensors")
    tensors = reshard.open(folder / "checkpoint").tensors
    assert set(tensors) == set(base)
    for tensor in tensors.values():
        value = torch.from_numpy(tensor.numpy())
        assert same_bits(to_numpy(value.bfloat16()), to_numpy(base[tensor.name]))


@pytest.mark.parametrize("name", ["tp-zero1", "tp-tied-zero3"])
def test_the_converted_model_is_the_trained_one(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForCausalLM

    run = parallel_runs[name]
    reshard.convert(run.root, tmp_path / "out", base=run.base)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    truth = run.module()
    state = model.state_dict()
    assert state.keys() == truth.keys()
    for key, value in state.items():
        assert same_bits(to_numpy(value), truth[key]), key


@pytest.mark.parametrize("name", ["tp-zero1", "tp-zero3-w4"])
def test_without_the_metadata_it_is_refused(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str
) -> None:
    tag = parallel_runs[name].copy(tmp_path)

    def forget(content: dict[str, object]) -> None:
        del content[KEY]

    for path in model_files(tag):
        edit_saved(path, forget)
    with pytest.raises(reshard.UnsupportedError, match=f"tensor parallelism over 2 ranks.*{KEY}"):
        reshard.open(tag)
    check_against_truth(reshard.open(parallel_runs[name].root), parallel_runs, name)  # with it


@pytest.mark.parametrize(
    ("name", "pattern", "message"),
    [
        ("tp-zero1", "*mp_rank_01*", r"model parallel rank 1 of 2 \(mp_rank_01\)"),
        ("tp-zero1", "*mp_rank_00*", r"model parallel rank 0 of 2 \(mp_rank_00\)"),
        ("tp-zero1", "mp_rank_01*", "all model_states files"),
        ("tp-zero2-w4", "*zero_pp_rank_1_mp_rank_01*", "rank 1 of 2 is missing"),
        ("tp-zero3-w4", "zero_pp_rank_1_mp_rank_01*", "rank 1 of 2 is missing"),
    ],
)
def test_missing_files_are_named(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str, pattern: str, message: str
) -> None:
    tag = parallel_runs[name].copy(tmp_path)
    files = list(tag.glob(pattern))
    assert files
    for path in files:
        path.unlink()
    with pytest.raises(reshard.IncompleteError, match=message):
        reshard.open(tag)
    whole = parallel_runs[name].copy(tmp_path / "whole")
    for path in files:  # copied, as the hint asks
        shutil.copy(whole / path.name, path)
    check_against_truth(reshard.open(tag), parallel_runs, name)


def test_files_of_a_larger_run_are_left_over(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["tp-zero1"].copy(tmp_path)
    for path in tag.glob("*mp_rank_01*"):
        shutil.copy(path, path.with_name(path.name.replace("mp_rank_01", "mp_rank_02")))
    with pytest.raises(reshard.FormatError):
        reshard.open(tag)


@pytest.mark.parametrize("name", ["tp-zero0", "tp-zero1", "tp-zero3-w4"])
@pytest.mark.parametrize("exchanged", [True, False])
def test_ranks_exchanged_or_copied(
    parallel_runs: ParallelRuns, tmp_path: Path, name: str, exchanged: bool
) -> None:
    tag = parallel_runs[name].copy(tmp_path)
    for first in list(tag.glob("*mp_rank_00*")):
        second = first.with_name(first.name.replace("mp_rank_00", "mp_rank_01"))
        kept = second.read_bytes()
        shutil.copy(first, second)
        if exchanged:
            first.write_bytes(kept)
    with pytest.raises(reshard.FormatError, match=r"it was written as .*mp_rank_0"):
        reshard.open(tag)


def test_ranks_of_two_steps(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["tp-zero3-w4"].copy(tmp_path)
    for path in tag.glob("*mp_rank_01_model_states.pt"):
        edit_saved(path, lambda content: content.update(global_steps=7, skipped_steps=5))
    with pytest.raises(reshard.FormatError, match=r"global step is 7, .* is 2"):
        reshard.open(tag)


def test_what_all_ranks_hold_must_be_the_same(parallel_runs: ParallelRuns, tmp_path: Path) -> None:
    tag = parallel_runs["tp-zero0"].copy(tmp_path)

    def change(content: Any) -> None:
        content["module"]["model.norm.weight"][5] += 1

    edit_saved(tag / "mp_rank_01_model_states.pt", change)
    with pytest.raises(reshard.FormatError, match="must hold the same values") as caught:
        reshard.open(tag)
    assert caught.value.tensor == "model.norm.weight"


def test_what_only_one_rank_has_of_a_parameters_state(parallel_runs: ParallelRuns) -> None:
    """No moment is left out, and none is made of fewer parts than its parameter."""
    with Sources() as sources:
        location = place.locate(parallel_runs["tp-zero1"].root, sources, None)
        saved = [files.read(rank, sources) for rank in location.ranks]
        first, other = (state.of_rank(one, PlainData(sources)) for one in saved)
    moment = first.moments["exp_avg"]["model.norm.weight"]
    fewer = {
        kind: {name: entry for name, entry in table.items() if name != "model.norm.weight"}
        for kind, table in first.moments.items()
    }
    assert state._alike(first, other, saved[1])
    assert not state._alike(replace(first, moments=fewer), other, saved[1])
    assert not state._alike(replace(first, steps={}), other, saved[1])
    with pytest.raises(reshard.IncompleteError) as caught:
        state._part(fewer["exp_avg"], moment, saved[1])
    assert caught.value.tensor == "model.norm.weight"


def test_a_buffer_must_be_the_same_on_all_ranks(
    parallel_runs: ParallelRuns, tmp_path: Path
) -> None:
    tag = parallel_runs["tp-packed-zero1-w4"].copy(tmp_path)
    edit_saved(
        tag / "mp_rank_01_model_states.pt",
        lambda content: content["module"]["count"].add_(1),
    )
    with pytest.raises(reshard.FormatError, match="must hold the same values") as caught:
        reshard.open(tag)
    assert caught.value.tensor == "count"
