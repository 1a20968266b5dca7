"""Rank files of every kind, read and compared bit for bit with what the running ranks held."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard import formats
from reshard.errors import PlanError, UnsupportedError
from tests import folders
from tests.fsdp.elements import elements
from tests.ranks.conftest import Ranks
from tests.ranks.save import BY_NAME
from tests.tensors import raw

_FLAT = {"local-w2", "local-bf16", "local-cloned", "flat-w2"}


def assert_true(path: Path, truth: dict[str, torch.Tensor]) -> None:
    """The checkpoint has exactly the truth's tensors, bit for bit."""
    checkpoint = reshard.open(path)
    assert set(checkpoint.tensors) == set(truth)
    for name, expected in truth.items():
        found = checkpoint.tensors[name]
        assert found.shape == tuple(expected.shape), name
        assert elements(found.entry) == raw(expected), name


@pytest.mark.parametrize("name", sorted(BY_NAME.keys() - _FLAT))
def test_bytes_are_those_of_the_live_ranks(ranks: Ranks, name: str) -> None:
    folder = ranks[name]
    path = folder / "model.pt" if name == "one-file" else folder
    assert_true(path, load_file(ranks.truth(name)))
    if name != "one-file":
        checkpoint = reshard.open(path)
        assert (checkpoint.format, checkpoint.world_size) == ("ranks", BY_NAME[name].case.world)


def test_every_way_to_name_it_leads_to_the_same(ranks: Ranks) -> None:
    truth = load_file(ranks.truth("hsdp"))
    run = ranks["hsdp"] / "run"
    actor = run / "global_step_3" / "actor"
    for path in (ranks["hsdp"], run, actor.parent, actor, actor / "model_world_size_4_rank_2.pt"):
        assert_true(path, truth)


def test_the_last_save_that_was_finished_is_taken(ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step, name in ((3, "hsdp"), (12, "tied")):
        shutil.copytree(ranks[name] / "run" / "global_step_3", run / f"global_step_{step}")
    newest = reshard.open(run)
    assert newest.world_size == 2
    assert "global_step_12 (the newest complete one of 2)." in newest.catalog.findings[0].message
    (run / "latest_checkpointed_iteration.txt").write_text("3")
    tracked = reshard.open(run)
    assert tracked.world_size == 4
    assert "named by latest_checkpointed_iteration.txt" in tracked.catalog.findings[0].message
    assert reshard.open(run, tag="global_step_12").world_size == 2
    (run / "latest_checkpointed_iteration.txt").write_text("15")
    assert "names 15, which was not found" in reshard.open(run).catalog.findings[0].message


def test_of_two_roles_one_is_named(ranks: Ranks, tmp_path: Path) -> None:
    step = tmp_path / "global_step_3"
    roles = (("actor", "hsdp"), ("critic", "tied"), ("reward_model", "one-rank"))
    for role, name in roles:
        shutil.copytree(ranks[name] / "run" / "global_step_3" / "actor", step / role)
    assert reshard.open(step, role="reward_model").world_size == 1
    with pytest.raises(reshard.NotFoundError, match="3 roles: actor, critic, rew") as caught:
        reshard.open(step)
    assert "--role" in str(caught.value)
    assert reshard.open(step, role="critic").world_size == 2
    assert reshard.open(tmp_path, role="actor").world_size == 4
    assert reshard.inspect(step, role="critic").checkpoint.world_size == 2
    assert reshard.open(step / "actor", role="actor").world_size == 4
    report = reshard.convert(step, tmp_path / "out", role="critic")
    assert report.verified
    assert reshard.verify(tmp_path / "out", step, role="critic").num_tensors == report.num_tensors
    for path, role in ((step, "reward"), (step / "actor", "critic"), (tmp_path / "out", "actor")):
        with pytest.raises(reshard.NotFoundError, match=f"no role '{role}'"):
            reshard.open(path, role=role)


def test_full_weights_beside_are_mentioned(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("tied", tmp_path)
    (actor / "huggingface").mkdir()
    (actor / "huggingface" / "config.json").write_text("{}")
    assert not reshard.open(actor).catalog.findings
    save_file({"w": torch.ones(2)}, actor / "huggingface" / "model.safetensors")
    (found,) = reshard.open(actor).catalog.findings
    assert found.code == "export-beside"
    assert reshard.open(actor / "huggingface").format == "huggingface"


def test_replicas_stand_in_for_each_other(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("hsdp", tmp_path)
    for rank in (1, 2):
        (actor / f"model_world_size_4_rank_{rank}.pt").unlink()
    assert_true(actor, load_file(ranks.truth("hsdp")))
    (found,) = reshard.open(actor).catalog.findings
    assert (found.code, found.severity) == ("replicas-missing", "info")
    assert "model_world_size_4_rank_1.pt, model_world_size_4_rank_2.pt" in found.message


def test_without_fsdp_config_the_names_say_how_many_ranks(ranks: Ranks, tmp_path: Path) -> None:
    actor = ranks.copy("st-w3", tmp_path)
    (actor / "fsdp_config.json").unlink()
    assert_true(actor, load_file(ranks.truth("st-w3")))


@pytest.mark.parametrize("name", ["local-w2", "local-bf16"])
def test_slices_are_joined_and_get_the_shapes_of_the_base(
    ranks: Ranks, tmp_path: Path, name: str
) -> None:
    truth = load_file(ranks.truth(name))
    checkpoint = reshard.open(ranks[name])
    assert {n: t.shape for n, t in checkpoint.tensors.items()} == {
        n: (t.numel(),) for n, t in truth.items()
    }
    base = base_of(truth, tmp_path / "base")
    report = reshard.convert(ranks[name], tmp_path / "out", base=base, dtype="keep")
    assert report.verified
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in truth.items()}
    assert reshard.verify(tmp_path / "out", ranks[name]).num_tensors == len(truth)
    assert reshard.diff(ranks[name], tmp_path / "out").same
    assert reshard.inspect(ranks[name], base=base).fitting.fits  # type: ignore[union-attr]
    backbone = reshard.open(ranks[name], prefix="model")
    assert "embed_tokens.weight" in backbone.catalog.unshaped


def test_flat_parameters_are_cut_in_the_order_of_their_family(ranks: Ranks, tmp_path: Path) -> None:
    truth = load_file(ranks.truth("flat-w2"))
    assert {n.rpartition(".")[2] for n in reshard.open(ranks["flat-w2"]).tensors} == {"_flat_param"}
    base = base_of(truth, tmp_path / "base")
    report = reshard.convert(ranks["flat-w2"], tmp_path / "out", base=base, dtype="keep")
    assert "flat-parameters-cut" in {finding.code for finding in report.findings}
    stated = json.loads((tmp_path / "out" / "reshard.json").read_text())["names"]["rules"]
    assert any("in the order of qwen2's modules" in rule for rule in stated)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: raw(t) for n, t in found.items()} == {n: raw(t) for n, t in truth.items()}
    assert reshard.verify(tmp_path / "out", ranks["flat-w2"]).num_tensors == len(truth)


def test_flattened_tensors_need_a_base_that_fits(ranks: Ranks, tmp_path: Path) -> None:
    truth = load_file(ranks.truth("local-w2"))
    for name in ("local-w2", "flat-w2"):
        with pytest.raises(PlanError, match=r"no file states their shapes.*--base"):
            reshard.convert(ranks[name], tmp_path / "out")
    other = base_of(truth, tmp_path / "gpt", model_type="gpt_neo")
    with pytest.raises(UnsupportedError, match="not for 'gpt_neo'"):
        reshard.convert(ranks["flat-w2"], tmp_path / "out", base=other)
    truth["model.norm.weight"] = torch.ones(13)
    wrong = base_of(truth, tmp_path / "wrong")
    with pytest.raises(reshard.NamesError, match=r"for 1 of them .*: model\.norm\.weight"):
        reshard.convert(ranks["local-w2"], tmp_path / "out", base=wrong)
    truth["model.norm.weight"] = torch.ones(20)
    wrong = base_of(truth, tmp_path / "larger")
    with pytest.raises(reshard.NamesError, match="the base's tensors in that module have"):
        reshard.convert(ranks["flat-w2"], tmp_path / "out", base=wrong)
    truth["model.extra.weight"] = torch.ones(2)
    wrong = base_of(truth, tmp_path / "unknown")
    with pytest.raises(UnsupportedError, match="its place among the flat parameters is not known"):
        reshard.convert(ranks["flat-w2"], tmp_path / "out", base=wrong)
    # The hints: the base that fits, or SHARDED_STATE_DICT, which states the shapes.
    right = base_of(load_file(ranks.truth("local-w2")), tmp_path / "right")
    for name in ("local-w2", "flat-w2"):
        assert reshard.convert(ranks[name], tmp_path / f"out-{name}", base=right).verified
    assert reshard.convert(ranks["st-w3"], tmp_path / "sharded").verified


def test_inspect_and_diff(ranks: Ranks) -> None:
    shown = reshard.inspect(ranks["st-w3"]).to_json()
    assert shown["format"] == "ranks"
    assert shown["framework"] == "verl"
    assert shown["files"] == [f"model_world_size_3_rank_{rank}.pt" for rank in range(3)]
    assert reshard.inspect(ranks["odd-w4"]).to_json()["framework"] == "accelerate"
    # The same model, laid over four ranks and over three, by DTensor and by ShardedTensor.
    assert reshard.diff(ranks["hsdp"], ranks["st-w3"]).same
    assert not reshard.diff(ranks["hsdp"], ranks["tied"]).same
    assert reshard.diff(ranks["hsdp"], ranks.truth("hsdp")).same


def test_a_part_of_a_tensor_alone_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    part = tmp_path / "part.pt"
    shutil.copyfile(ranks["fsdp2-w3"] / "rank1.pt", part)
    with pytest.raises(UnsupportedError, match="one rank's part of it, of 3 ranks") as caught:
        reshard.open(part)
    assert "_rank0.pt" in str(caught.value)
    # The hint, followed.
    whole = tmp_path / "whole"
    whole.mkdir()
    for rank in range(3):
        shutil.copyfile(ranks["fsdp2-w3"] / f"rank{rank}.pt", whole / f"part_rank{rank}.pt")
    assert_true(whole, load_file(ranks.truth("fsdp2-w3")))


def test_one_file_of_a_rank_is_a_state_dict(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "model_rank0.pt")
    assert not formats.claims(tmp_path)
    assert reshard.open(tmp_path / "model_rank0.pt").format == "torch"


def test_what_else_trainers_save_a_file_a_rank_of_is_no_model(tmp_path: Path) -> None:
    for stem in ("optim", "optimizer_0", "extra_state", "rng_state", "random_states", "dataloader"):
        for rank in range(2):
            torch.save({"w": torch.ones(2)}, tmp_path / f"{stem}_rank_{rank}.pt")
    assert not formats.claims(tmp_path)


def base_of(truth: dict[str, torch.Tensor], folder: Path, model_type: str = "qwen2") -> Path:
    """A base model of these names and shapes, with other values."""
    config = {"model_type": model_type, "tie_word_embeddings": False, "num_hidden_layers": 2}
    return folders.zeros(folder, truth, config)


def test_plain_tensors_that_all_ranks_hold(tmp_path: Path) -> None:
    state = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3)}
    for rank in range(2):
        torch.save({"model": state, "step": 5}, tmp_path / f"ckpt_rank{rank}.pt")
    checkpoint = reshard.open(tmp_path)
    assert np.array_equal(checkpoint.tensors["w"].numpy(), state["w"].numpy())
    torch.save({"model": {**state, "b": torch.zeros(3)}}, tmp_path / "ckpt_rank1.pt")
    with pytest.raises(reshard.FormatError, match=r"must equal the copy in ckpt_rank0\.pt"):
        reshard.open(tmp_path)
