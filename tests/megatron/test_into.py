"""Hugging Face models into Megatron-Core's format: loaded by it, and back again."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.formats.megatron import layout
from tests import child
from tests.megatron import mcore
from tests.megatron.golden import digested
from tests.megatron.models import FAMILIES, model

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of `mcore`: written by reshard, loaded and run by megatron-core."""
    folder = tmp_path_factory.mktemp("mcore")
    for case in mcore.CASES:
        place = folder / case.name
        made = model(case.family, place / "model", tie_word_embeddings=case.tied, more=case.more)
        reshard.convert(made, place / "checkpoint", to="megatron")
    child.run("tests.megatron.mcore", str(folder))
    return folder


@needs_megatron
@pytest.mark.parametrize("name", [case.name for case in mcore.CASES])
def test_megatron_core_says_what_transformers_says(name: str, loaded: Path) -> None:
    made = transformers.AutoModelForCausalLM.from_pretrained(
        loaded / name / "model", attn_implementation="eager"
    )
    with torch.no_grad():
        expected = made(mcore.TOKENS).logits
    logits = torch.load(loaded / name / "logits.pt")
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(family: str, tied: bool, tmp_path: Path) -> None:
    made = model(family, tmp_path / "model", tie_word_embeddings=tied)
    reshard.convert(made, tmp_path / "there", to="megatron")
    assert reshard.verify(tmp_path / "there", made).num_tensors
    other = model(family, tmp_path / "base", seed=1, tie_word_embeddings=tied)
    reshard.convert(tmp_path / "there", tmp_path / "back", base=other)
    assert digested(tmp_path / "back") == digested(made)
    assert reshard.verify(tmp_path / "back", tmp_path / "there").num_tensors


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_large_tensors_are_cut_by_layers_and_experts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_SMALL", 0)
    made = model(family, tmp_path / "model")
    reshard.convert(made, tmp_path / "there", to="megatron", max_shard_size=6000)
    entries = reshard.open(tmp_path / "there").catalog.entries
    assert len(list((tmp_path / "there").glob("*.distcp"))) > 10
    for entry in entries.values():
        if "linear_fc2" in entry.spec.name and family != "deepseek_v3":
            assert {f.box.sizes[0] for f in entry.fragments} == {1}
            assert len(entry.fragments) >= entry.spec.shape[0]
    reshard.convert(tmp_path / "there", tmp_path / "back", base=made, allow_unchanged=True)
    assert digested(tmp_path / "back") == digested(made)


def test_layers_of_multi_token_prediction(tmp_path: Path) -> None:
    made = model("deepseek_v3", tmp_path / "model", more=1)
    report = reshard.convert(made, tmp_path / "there", to="megatron")
    assert "copies-shared" in [found.code for found in report.findings]
    names = reshard.open(tmp_path / "there").tensors
    assert "mtp.layers.0.transformer_layer.mlp.router.weight" in names
    assert reshard.verify(tmp_path / "there", made).num_tensors
    reshard.convert(tmp_path / "there", tmp_path / "back", base=made, allow_unchanged=True)
    assert digested(tmp_path / "back") == digested(made)


def test_copies_that_are_none_are_refused(tmp_path: Path) -> None:
    made = model("deepseek_v3", tmp_path / "model", more=1)
    _change(made, lambda state: state["model.layers.2.embed_tokens.weight"].add_(1))
    with pytest.raises(reshard.PlanError, match=r"differs from 'model\.embed_tokens"):
        reshard.convert(made, tmp_path / "there", to="megatron")


def test_a_training_checkpoint_becomes_one_by_its_base(tmp_path: Path) -> None:
    base = model("qwen3", tmp_path / "base")
    trained = load_file(model("qwen3", tmp_path / "trained", seed=1) / "model.safetensors")
    dcp.save(dict(trained), checkpoint_id=tmp_path / "run", no_dist=True)
    reshard.convert(tmp_path / "run", tmp_path / "there", to="megatron", base=base)
    assert reshard.verify(tmp_path / "there", tmp_path / "run", base=base).num_tensors
    reshard.convert(tmp_path / "there", tmp_path / "back", base=base)
    assert digested(tmp_path / "back") == digested(tmp_path / "trained")
    with pytest.raises(reshard.PlanError, match="needs the model's config") as caught:
        reshard.convert(tmp_path / "run", tmp_path / "again", to="megatron")
    assert caught.value.hint == "Pass --base."


def test_padding_is_a_matter_of_those_who_load(tmp_path: Path) -> None:
    made = model("llama", tmp_path / "model")
    reshard.convert(made, tmp_path / "there", to="megatron")
    rows = reshard.open(tmp_path / "there").tensors["embedding.word_embeddings.weight"].shape[0]
    assert rows == 61


def test_what_is_compared_by_the_hubs_names(tmp_path: Path) -> None:
    made = model("qwen2", tmp_path / "model")
    reshard.convert(made, tmp_path / "there", to="megatron")
    assert reshard.diff(made, tmp_path / "there").same
    name = "model.layers.1.self_attn.v_proj.bias"
    _change(made, lambda state: state[name].add_(1))
    with pytest.raises(reshard.VerificationError, match="linear_qkv"):
        reshard.verify(tmp_path / "there", made)


def test_two_steps_of_a_run_are_compared_by_the_hubs_names(tmp_path: Path) -> None:
    base = model("qwen3_moe", tmp_path / "base")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    reshard.convert(base, tmp_path / "run" / "iter_0000100", to="megatron")
    _change(base, lambda state: state[name].add_(1))
    reshard.convert(base, tmp_path / "run" / "iter_0000200", to="megatron")
    steps = [tmp_path / "run" / f"iter_0000{number}00" for number in (1, 2)]
    found = reshard.diff(*steps, base=base)
    assert [each.name for each in found.tensors if each.kind != "equal"] == [name]
    assert len(found.tensors) == len(load_file(base / "model.safetensors"))


def test_another_family_is_refused(tmp_path: Path) -> None:
    made = model("llama", tmp_path / "model")
    config = json.loads((made / "config.json").read_text(encoding="utf-8"))
    (made / "config.json").write_text(json.dumps({**config, "model_type": "phi3"}), "utf-8")
    with pytest.raises(reshard.UnsupportedError, match="not of 'phi3'") as caught:
        reshard.convert(made, tmp_path / "there", to="megatron")
    assert caught.value.hint == "Import it with Megatron-Bridge."


def test_a_model_that_lacks_tensors(tmp_path: Path) -> None:
    """A whole layer, a norm, a projection, an expert; each is completed from the base."""
    base = model("qwen3_moe", tmp_path / "base")
    for lost, message in (
        ("model.layers.1.", "layer 1 lacks"),
        ("model.layers.0.input_layernorm.", "layer 0 lacks"),
        ("model.layers.0.self_attn.k_proj.", "linear_qkv"),
        ("model.layers.1.mlp.experts.3.", "3 experts, and the config says 4"),
        ("model.layers.1.mlp.experts.2.up_proj.", "not those of one model"),
    ):
        made = model("qwen3_moe", tmp_path / lost / "model", seed=1)
        whole = load_file(made / "model.safetensors")
        _change(made, lambda state, lost=lost: _drop(state, lost))  # type: ignore[misc]
        with pytest.raises(reshard.ReshardError, match=message):
            reshard.convert(made, tmp_path / lost / "there", to="megatron")
        filled = tmp_path / lost / "filled"
        reshard.convert(made, filled, to="megatron", base=base, fill_from_base=True)
        reshard.convert(filled, tmp_path / lost / "back", base=base)
        state = load_file(tmp_path / lost / "back" / "model.safetensors")
        started = load_file(base / "model.safetensors")
        for name, tensor in state.items():
            assert torch.equal(tensor, (started if name.startswith(lost) else whole)[name])


def test_tensors_without_a_place(tmp_path: Path) -> None:
    """Another layout of the same model becomes the released one by the base."""
    base = model("qwen3_moe", tmp_path / "base")
    loaded = tmp_path / "loaded"
    reshard.convert(base, loaded, names="memory", transformers_version="5.0")
    with pytest.raises(reshard.NamesError, match="have no place in Megatron-Core's") as caught:
        reshard.convert(loaded, tmp_path / "there", to="megatron")
    assert "Pass --base" in str(caught.value.hint)
    reshard.convert(loaded, tmp_path / "there", to="megatron", base=base)
    assert reshard.diff(base, tmp_path / "there").same


def test_shapes_that_are_not_the_configs(tmp_path: Path) -> None:
    """A config that another model's took the place of, and then its own."""
    made = model("llama", tmp_path / "model")
    right = json.loads((made / "config.json").read_text(encoding="utf-8"))
    for stated, message in (
        ({**right, "num_key_value_heads": 1}, "key heads"),
        ({**right, "num_attention_heads": 2, "num_key_value_heads": 3}, "key heads"),
        ({**right, "num_attention_heads": 6, "num_key_value_heads": 1}, "the config's model has"),
    ):
        (made / "config.json").write_text(json.dumps(stated), encoding="utf-8")
        with pytest.raises(reshard.NamesError, match=message):
            reshard.convert(made, tmp_path / "there", to="megatron")
    (made / "config.json").write_text(json.dumps(right), encoding="utf-8")
    reshard.convert(made, tmp_path / "there", to="megatron")
    assert reshard.diff(made, tmp_path / "there").same


def test_names_are_the_trainers(tmp_path: Path) -> None:
    made = model("llama", tmp_path / "model")
    with pytest.raises(reshard.OptionError, match="names of that trainer"):
        reshard.convert(made, tmp_path / "there", to="megatron", names="disk")
    reshard.convert(made, tmp_path / "there", to="megatron")
    assert reshard.diff(made, tmp_path / "there").same


def _change(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _drop(state: dict[str, torch.Tensor], start: str) -> None:
    for name in [name for name in state if name.startswith(start)]:
        del state[name]
