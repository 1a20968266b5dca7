"""What is not read is refused by name, and what the hint offers leads on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

import reshard
from tests.megatron.golden import base, copied, saved, weights

_NAME = "bridge_llama_tp2_bf16"


def test_a_save_that_did_not_finish(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    kept = weights(run) / "metadata.json"
    shutil.copy(kept, tmp_path)
    kept.unlink()
    with pytest.raises(reshard.IncompleteError, match="did not finish"):
        reshard.open(run)
    shutil.copy(tmp_path / "metadata.json", kept)  # the hint: copied again
    assert len(reshard.open(run).tensors) > 8


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor"])
def test_another_backend(backend: str, tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    stated = {"sharded_backend": backend, "sharded_backend_version": 1}
    (weights(run) / "metadata.json").write_text(json.dumps(stated), encoding="utf-8")
    with pytest.raises(reshard.UnsupportedError, match=backend):
        reshard.open(run)


def test_megatron_fsdp_is_named_with_a_base(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    state = {
        name: torch.from_numpy(tensor.numpy().astype("float32"))
        for name, tensor in reshard.open(run).tensors.items()
    }
    dcp.save({"model": {"module": state}}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    model = base(_NAME, tmp_path / "base")
    with pytest.raises(reshard.UnsupportedError, match="fsdp_dtensor"):
        reshard.convert(tmp_path / "dcp", tmp_path / "out", base=model)
    assert not (tmp_path / "out").exists()


def test_one_file_a_rank(tmp_path: Path) -> None:
    for rank in ("mp_rank_00", "mp_rank_01"):
        folder = tmp_path / "run" / "iter_0000010" / rank
        folder.mkdir(parents=True)
        torch.save({"model": {"w": torch.ones(2)}}, folder / "model_optim_rng.pt")
    steps = (tmp_path / "run", tmp_path / "run" / "iter_0000010", folder / "model_optim_rng.pt")
    for path in steps:
        with pytest.raises(reshard.UnsupportedError, match="ckpt-format torch"):
            reshard.open(path)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.lora_A.weight", torch.ones(2, 2), "LoRA"),
        ("decoder.layers.0.mlp.linear_fc1.adapter.linear_in.weight", torch.ones(2, 2), "LoRA"),
        ("decoder.layers.0.mlp.linear_fc1.to_wrap.weight", torch.ones(2, 2), "LoRA"),
        ("decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax", torch.ones(1), "ModelOpt"),
        ("decoder.layers.0.mlp.linear_fc1.weight", torch.ones(2, 2).byte(), "FP8"),
        (
            "decoder.layers.0.mlp.linear_fc1.weight",
            torch.ones(2, 2).to(torch.float8_e4m3fn),
            "FP8",
        ),
        ("decoder.layers.0.mixer.in_proj.weight", torch.ones(2, 2), "state-space"),
    ],
)
def test_kinds_of_models(name: str, tensor: torch.Tensor, words: str, tmp_path: Path) -> None:
    with pytest.raises(reshard.UnsupportedError, match=words):
        reshard.open(saved(tmp_path / "iter_0000001", {name: tensor}))


def test_a_model_that_modelopt_has_changed(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    (weights(run) / "modelopt_state").mkdir()
    with pytest.raises(reshard.UnsupportedError, match="ModelOpt"):
        reshard.open(run)


def test_an_optimizer_alone_and_where_the_model_is(tmp_path: Path) -> None:
    state = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(2)}
    actor = tmp_path / "global_step_5" / "actor"
    saved(actor / "optimizer" / "dist_ckpt", state)
    steps = (actor / "optimizer" / "dist_ckpt", actor, tmp_path / "global_step_5")
    for path in steps:
        with pytest.raises(reshard.NotFoundError, match="no model"):
            reshard.open(path)
    (actor / "model" / "huggingface").mkdir(parents=True)
    (actor / "model" / "huggingface" / "model.safetensors").touch()
    for path in steps:
        with pytest.raises(reshard.NotFoundError, match=r"lies in .*huggingface"):
            reshard.open(path)


def test_roles_are_asked_for(tmp_path: Path) -> None:
    for role in ("actor", "critic"):
        state = {"decoder.final_layernorm.weight": torch.ones(2)}
        saved(tmp_path / "global_step_5" / role / "dist_ckpt", state)
    with pytest.raises(reshard.NotFoundError, match="--role"):
        reshard.open(tmp_path / "global_step_5")
    with pytest.raises(reshard.NotFoundError, match="'ref'"):
        reshard.open(tmp_path / "global_step_5", role="ref")
    found = reshard.open(tmp_path / "global_step_5", role="critic")
    assert "critic" in found.catalog.origin.root.parts


def test_settings_of_another_model(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    config = weights(run) / "run_config.yaml"
    text = config.read_text(encoding="utf-8").replace("num_query_groups: 2", "num_query_groups: 4")
    config.write_text(text, encoding="utf-8")
    model = base(_NAME, tmp_path / "base")
    with pytest.raises(reshard.NamesError, match="num_query_groups 4"):
        reshard.convert(run, tmp_path / "out", base=model)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_norms_of_another_kind(kind: str, tmp_path: Path) -> None:
    """Stored less one where the hub's are whole, or whole where the hub's are less one."""
    run = copied(_NAME, tmp_path / "run")
    config = weights(run) / "run_config.yaml"
    text = config.read_text(encoding="utf-8")
    centred = str(kind == "llama").lower()
    changed = f"{text}\n  layernorm_zero_centered_gamma: {centred}\n"
    config.write_text(changed, encoding="utf-8")
    model = base(_NAME, tmp_path / "base", model_type=kind)
    with pytest.raises(reshard.UnsupportedError, match="layernorm_zero_centered_gamma"):
        reshard.convert(run, tmp_path / "out", base=model)
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_read_are_a_finding(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    (weights(run) / "common.pt").write_bytes(b"damaged")
    assert "settings-unread" in [found.code for found in reshard.open(run).catalog.findings]


def test_a_base_of_a_family_that_is_not_known(tmp_path: Path) -> None:
    run = copied(_NAME, tmp_path / "run")
    model = base(_NAME, tmp_path / "base", model_type="gpt_oss")
    with pytest.raises(reshard.UnsupportedError, match="gpt_oss"):
        reshard.convert(run, tmp_path / "out", base=model)
    assert "gpt_oss" in reshard.inspect(run, base=model).fitting.message  # type: ignore[union-attr]


def test_hints_that_name_a_folder(tmp_path: Path) -> None:
    """The state of an optimizer beside the model; two models in one folder; an unfinished save."""
    model = {"decoder.final_layernorm.weight": torch.ones(2)}
    state = {"optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.ones(2)}
    actor = tmp_path / "global_step_5" / "actor"
    alone = saved(actor / "optimizer" / "dist_ckpt", state)
    there = saved(actor / "model" / "dist_ckpt", model)
    with pytest.raises(reshard.NotFoundError, match="no model") as caught:
        reshard.open(alone)
    assert caught.value.hint == f"The model lies in {there}: name that folder."
    assert list(reshard.open(there).tensors) == list(model)
    other = saved(actor / "dist_ckpt", model)
    with pytest.raises(reshard.NotFoundError, match=r"dist_ckpt and model/dist_ckpt") as caught:
        reshard.open(actor)
    assert caught.value.hint == "Name the one to read."
    assert list(reshard.open(other).tensors) == list(model)
    (other / "metadata.json").unlink()
    with pytest.raises(reshard.IncompleteError, match="did not finish") as unfinished:
        reshard.open(other)
    assert str(unfinished.value.hint).startswith("Use an earlier checkpoint")
    assert list(reshard.open(there).tensors) == list(model)
