"""Hugging Face models in torchtitan's names: what its converters make, loaded by torch's DCP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.naming.test_titan import base_of, made

State = dict[str, torch.Tensor]
_FAMILIES = ["llama", "qwen3", "qwen3_moe", "deepseek_v3"]


def _model(hub: State, folder: Path, model_type: str, **more: object) -> Path:
    """A model with these weights."""
    base_of(hub, folder, model_type, **more)
    held = {name: tensor.contiguous() for name, tensor in hub.items()}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def loaded(folder: Path, like: State) -> State:
    """What a run with these names loads."""
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state


@pytest.mark.heavy
@pytest.mark.parametrize("model_type", _FAMILIES)
def test_runs_of_both_versions_find_their_names(model_type: str, tmp_path: Path) -> None:
    hub, _ = made(model_type, 0)
    model = _model(hub, tmp_path / "model", model_type)
    out = tmp_path / "out"
    report = reshard.convert(model, out, to="dcp", names="torchtitan")
    assert any("torchtitan's" in rule for rule in report.rules)
    for era in (0, 1):
        expected = {n: t for n, t in made(model_type, era)[1].items() if "tokens_per" not in n}
        found = loaded(out, expected)
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert reshard.verify(out, model).num_tensors
    base = base_of(hub, tmp_path / "base", model_type)
    reshard.convert(out, tmp_path / "back", base=base)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == hub.keys()
    assert [name for name in hub if not torch.equal(back[name], hub[name])] == []
    assert reshard.diff(out, tmp_path / "back").same


def test_a_tied_head_is_a_name_of_the_embedding(tmp_path: Path) -> None:
    hub, theirs = made("qwen3", 0)
    del hub["lm_head.weight"]
    model = _model(hub, tmp_path / "model", "qwen3", tie_word_embeddings=True)
    reshard.convert(model, tmp_path / "out", to="dcp", names="torchtitan")
    found = loaded(tmp_path / "out", theirs)
    assert torch.equal(found["lm_head.weight"], theirs["tok_embeddings.weight"])
    base = base_of(hub, tmp_path / "base", "qwen3", tie_word_embeddings=True)
    reshard.convert(tmp_path / "out", tmp_path / "back", base=base)
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == hub.keys()


@pytest.mark.parametrize("era", [0, 1])
def test_gpt_oss(era: int, tmp_path: Path) -> None:
    """Experts' rows and columns are exchanged: its own layer multiplies by the transpose."""
    hub, theirs = made("llama", era)
    torch.manual_seed(1)
    for name in [name for name in hub if ".mlp." in name]:
        del hub[name]
    for name in [name for name in theirs if "feed_forward" in name]:
        del theirs[name]
    inner = ("moe.routed_experts.inner_experts.{}_{}", "moe.experts.{}")[era]
    for layer in range(2):
        start, there = f"model.layers.{layer}.", f"layers.{layer}."
        for side in "qkv":
            name = f"attention.{('qkv_linear.', '')[era]}w{side}"
            # Not turned: its rotary embedding pairs rows as the hub's does.
            theirs[f"{there}{name}.weight"] = hub[f"{start}self_attn.{side}_proj.weight"]
            bias = hub[f"{start}self_attn.{side}_proj.bias"] = torch.randn(8)
            theirs[f"{there}{name}.bias"] = bias
        for name, other, shape in (
            ("self_attn.o_proj.bias", "attention.wo.bias", (24,)),
            ("self_attn.sinks", "attention.sinks", (4,)),
            ("mlp.router.weight", "moe.router.gate.weight", (3, 24)),
            ("mlp.router.bias", "moe.router.gate.bias", (3,)),
            ("mlp.experts.gate_up_proj_bias", inner.format("mlp1_bias", "EG"), (3, 20)),
            ("mlp.experts.down_proj_bias", inner.format("mlp2_bias", "ED"), (3, 24)),
        ):
            hub[start + name] = theirs[there + other] = torch.randn(shape)
        for name, other, axes in (("gate_up_proj", "mlp1", "EGD"), ("down_proj", "mlp2", "EDF")):
            sizes = (3, 24, 20) if other == "mlp1" else (3, 10, 24)
            weight = hub[f"{start}mlp.experts.{name}"] = torch.randn(sizes)
            theirs[there + inner.format(f"{other}_weight", axes)] = weight.transpose(1, 2)
    model = _model(hub, tmp_path / "model", "gpt_oss")
    reshard.convert(model, tmp_path / "out", to="dcp", names="torchtitan")
    found = loaded(tmp_path / "out", theirs)
    assert [name for name in theirs if not torch.equal(found[name], theirs[name])] == []
    dcp.save(dict(theirs), checkpoint_id=tmp_path / "run", no_dist=True)
    base = base_of(hub, tmp_path / "base", "gpt_oss")
    for source in ("out", "run"):
        reshard.convert(tmp_path / source, tmp_path / f"{source}-back", base=base)
        back = load_file(tmp_path / f"{source}-back" / "model.safetensors")
        assert [name for name in hub if not torch.equal(back[name], hub[name])] == []


def test_layers_of_multi_token_prediction_are_a_finding(tmp_path: Path) -> None:
    hub, _ = made("qwen3_moe", 0)
    more = {"model.layers.2.eh_proj.weight": torch.ones(2, 4)}
    config = {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    model = _model({**hub, **more}, tmp_path / "model", "qwen3_moe", **config)
    report = reshard.convert(model, tmp_path / "out", to="dcp", names="torchtitan")
    found = next(each for each in report.findings if each.code == "layers-left-out")
    assert "model.layers.2.eh_proj.weight" in found.message
    assert not [name for name in reshard.open(tmp_path / "out").tensors if "eh_proj" in name]


def test_what_is_refused(tmp_path: Path) -> None:
    hub, _ = made("qwen3_moe", 0)
    for number, (model_type, change, error) in enumerate(
        (
            ("gemma2", {}, "names for llama"),
            ("qwen3_moe", {"model.odd": torch.ones(1)}, "no place in torchtitan's model"),
            ("qwen3_moe", {"model.layers.0.mlp.experts.1.up_proj.weight": None}, "expert 1 is"),
        )
    ):
        changed = {n: t for n, t in {**hub, **change}.items() if t is not None}
        model = _model(changed, tmp_path / f"model{number}", model_type)
        with pytest.raises(reshard.ReshardError, match=error):
            reshard.convert(model, tmp_path / "out", to="dcp", names="torchtitan")
    # Another layout becomes the released one by the base, and a missing expert comes from it.
    whole = _model(hub, tmp_path / "whole", "qwen3_moe")
    reshard.convert(
        tmp_path / "model2", tmp_path / "out", to="dcp", names="torchtitan", base=whole,
        fill_from_base=True, allow_unchanged=True,
    )  # fmt: skip
    assert reshard.diff(whole, tmp_path / "out").same
    odd = tmp_path / "model1"
    with pytest.raises(reshard.NamesError, match=r"model\.odd"):
        reshard.convert(odd, tmp_path / "again", to="dcp", names="torchtitan", base=whole)
    with pytest.raises(reshard.OptionError, match="not --to hf") as caught:
        reshard.convert(whole, tmp_path / "again", names="torchtitan")
    assert str(caught.value.hint).startswith("Pass --to dcp")
    reshard.convert(whole, tmp_path / "again", to="dcp", names="torchtitan")
    assert reshard.diff(whole, tmp_path / "again").same


@pytest.mark.heavy
@pytest.mark.parametrize("era", [0, 1])
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_moments_follow_their_weights(model_type: str, era: int, tmp_path: Path) -> None:
    """Queries and keys are turned and experts are cut in the moments as in the weights."""
    hub, theirs = made(model_type, era)
    base = base_of(hub, tmp_path / "base", model_type)
    trained = {name: tensor for name, tensor in theirs.items() if "tokens_per" not in name}
    state = {
        name: {"exp_avg": tensor * 2, "exp_avg_sq": tensor**2, "step": torch.tensor(3.0)}
        for name, tensor in trained.items()
    }
    group = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0,
             "params": list(trained)}  # fmt: skip
    optimizer = {"state": state, "param_groups": [group]}
    dcp.save(
        {"model": theirs, "optimizer": optimizer}, checkpoint_id=tmp_path / "run", no_dist=True
    )
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run", out, base=base, to="dcp", optimizer=True, names="disk")
    found = reshard.open(out).optimizer
    assert found is not None
    assert found.moments["exp_avg"].keys() == hub.keys()
    for name, tensor in hub.items():
        assert torch.equal(torch.from_numpy(found.moments["exp_avg"][name].numpy()), tensor * 2)
        assert torch.equal(torch.from_numpy(found.moments["exp_avg_sq"][name].numpy()), tensor**2)
