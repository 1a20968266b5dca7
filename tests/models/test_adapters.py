"""Checkpoints with LoRA layers, with the real PEFT as the oracle.

loaded   PEFT's model: base + B A s in every forward
merged   PEFT's merge_and_unload, what a merge must give
loaded   PEFT's from_pretrained, what an adapter folder must load into
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp

import reshard
from reshard.cli import app as cli
from reshard.cli.lightrft import ds2hf, fsdp2hf, hf2fsdp
from reshard.cli.try_ import try_model
from reshard.conversion.options import Lora
from tests.models import released
from tests.models.peft_runs import ALPHA, IDS, LINEAR, RANK, SETTINGS, Get, Run, peft
from tests.oracle.cache import Oracle


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    runs: dict[tuple[str, torch.dtype], Run] = {}

    def get(variant: str = "lora", dtype: torch.dtype = torch.float32) -> Run:
        key = (variant, dtype)
        if key not in runs:
            runs[key] = Run(SETTINGS[variant], tmp_path_factory.mktemp(variant), dtype)
        return runs[key]

    return get


@pytest.mark.parametrize("variant", SETTINGS)
def test_merged_weights_are_those_of_peft(made: Get, variant: str, tmp_path: Path) -> None:
    run = made(variant)
    report = reshard.convert(
        run.checkpoint, tmp_path / "out", base=run.base, adapter_config=run.config
    )
    merged = run.merged()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == merged.keys()
    for name, value in written.items():
        torch.testing.assert_close(value, merged[name], rtol=1e-6, atol=1e-6, msg=name)
    adapted = [name for name in run.model.state_dict() if ".lora_" in name and "_A" in name]
    assert report.merged == len(adapted)
    assert report.prefix == "base_model.model."
    assert report.changed == len(adapted) + 2 * (variant == "saved")
    loaded = released.load(tmp_path / "out", "LlamaForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, run.logits(), rtol=1e-4, atol=1e-4)


def test_adapters_are_merged_into_the_tensors_of_a_loaded_model(tmp_path: Path) -> None:
    """The updates of listed experts, merged where a loaded model stacks them."""
    base = released.write(tmp_path / "base", "qwen3_moe", released.values("qwen3_moe", seed=0))
    weights = load_file(base / "model.safetensors")
    names = [n for n in weights if ".experts." in n and n.endswith("up_proj.weight")]
    generator = torch.Generator().manual_seed(1)
    state = {name: value for name, value in weights.items() if name not in names}
    for name in names:
        rows, columns = weights[name].shape
        stem = name.removesuffix(".weight")
        state[f"{stem}.base_layer.weight"] = weights[name]
        state[f"{stem}.lora_A.default.weight"] = torch.rand(4, columns, generator=generator)
        state[f"{stem}.lora_B.default.weight"] = torch.rand(rows, 4, generator=generator)
        a, b = (state[f"{stem}.lora_{side}.default.weight"] for side in "AB")
        weights[name] = weights[name] + b @ a * 2
    torch.save({f"base_model.model.{name}": v for name, v in state.items()}, tmp_path / "model.pt")
    out = tmp_path / "dcp"
    reshard.convert(tmp_path / "model.pt", out, base=base, to="dcp", names="memory", lora_alpha=8)
    merged = released.write(tmp_path / "merged", "qwen3_moe", weights)
    truth = released.load(merged, released.class_of("qwen3_moe")).state_dict()
    opened = reshard.open(out).tensors
    assert set(opened) == set(truth)
    for key, value in truth.items():
        np.testing.assert_allclose(opened[key].numpy(), value.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", SETTINGS)
def test_peft_loads_the_adapter_folder(made: Get, variant: str, tmp_path: Path) -> None:
    run, out = made(variant), tmp_path / "out"
    report = reshard.convert(
        run.checkpoint, out, base=run.base, lora="adapter", adapter_config=run.config
    )
    files = {"adapter_config.json", "adapter_model.safetensors", "reshard.json"}
    assert {path.name for path in out.iterdir()} == files
    assert not report.missing
    loaded = peft.PeftModel.from_pretrained(run.fresh(), out).eval()
    state = run.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, state[name]), name
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, run.logits(), rtol=1e-5, atol=1e-5)
    reshard.verify(out)


def test_both_are_not_applied_twice(made: Get, tmp_path: Path) -> None:
    """With PEFT installed, transformers applies an adapter that lies in a model's own folder."""
    run, out = made(), tmp_path / "out"
    reshard.convert(run.checkpoint, out, base=run.base, lora="both", lora_alpha=ALPHA)
    reshard.convert(run.checkpoint, tmp_path / "merged", base=run.base, lora_alpha=ALPHA)
    assert not list(out.glob("adapter_*"))
    model = "model.safetensors"
    assert (out / model).read_bytes() == (tmp_path / "merged" / model).read_bytes()
    with torch.no_grad():
        alone = released.load(out, "LlamaForCausalLM")(IDS).logits
        torch.testing.assert_close(alone, run.logits(), rtol=1e-4, atol=1e-4)
        adapted = peft.PeftModel.from_pretrained(run.fresh(), out / "adapter").eval()
        torch.testing.assert_close(adapted(IDS).logits, run.logits(), rtol=1e-5, atol=1e-5)
    stated = json.loads((out / "reshard.json").read_text())
    assert stated["beside"].keys() == {"adapter/adapter_model.safetensors"}
    assert stated["names"]["lora"]["alpha"] == ALPHA
    reshard.verify(out)


def ulps(one: torch.Tensor, other: torch.Tensor) -> int:
    """How many representable bfloat16 values two tensors are apart at most."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.view(torch.int16).to(torch.int32)
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((ordered(one) - ordered(other)).abs().max())


@pytest.mark.parametrize("variant", ["lora", "dora", "embedding"])
def test_bfloat16_is_rounded_once(made: Get, variant: str, tmp_path: Path) -> None:
    """The sum is rounded, not its parts: a merge in float32 by PEFT, rounded, is the truth."""
    run = made(variant, torch.bfloat16)
    reshard.convert(run.checkpoint, tmp_path / "out", base=run.base, adapter_config=run.config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    wide = peft.get_peft_model(run.fresh().float(), run.model.peft_config["default"])
    wide.load_state_dict(run.model.state_dict())
    narrow = run.merged()
    for name, value in wide.merge_and_unload().state_dict().items():
        assert written[name].dtype == torch.bfloat16
        assert ulps(written[name], value.bfloat16()) <= 1, name
        # In bfloat16 PEFT rounds the product before it adds it: steps of 1/128 of either.
        torch.testing.assert_close(written[name], narrow[name], rtol=1 / 64, atol=1 / 64)


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("lora", ["merge", "adapter", "both"])
def test_a_deepspeed_run(oracle: Oracle, stage: int, lora: Lora, tmp_path: Path) -> None:
    case, out = oracle[f"lora-zero{stage}"], tmp_path / "out"
    reshard.convert(case.root, out, base=case.base, lora=lora, lora_alpha=6)
    masters = {name: torch.from_numpy(array) for name, array in case.last.masters().items()}
    assert masters
    if lora != "merge":
        found = load_file(
            (out / "adapter" if lora == "both" else out) / "adapter_model.safetensors"
        )
        assert {k.replace(".weight", ".default.weight"): v.tolist() for k, v in found.items()} == {
            k: v.tolist() for k, v in masters.items()
        }
    if lora != "adapter":
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
        loaded = peft.get_peft_model(base, config)
        missing, unexpected = loaded.load_state_dict(masters, strict=False)
        assert not unexpected
        assert not any("lora_" in name for name in missing)
        written = load_file(out / "model.safetensors")
        for name, value in loaded.merge_and_unload().state_dict().items():
            assert ulps(written[name], value.bfloat16()) <= 1, name
        released.load(out, "LlamaForCausalLM", torch.bfloat16)


def test_alpha_is_asked_for_and_never_guessed(made: Get, tmp_path: Path) -> None:
    run = made()
    with pytest.raises(reshard.PlanError, match=r"6 modules \(rank 4\).*--lora-alpha"):
        reshard.convert(run.checkpoint, tmp_path / "out", base=run.base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["run", "run/lora_adapter", "."])
@pytest.mark.parametrize("source", ["torch", "dcp"])
def test_alpha_is_found_beside(made: Get, place: str, source: str, tmp_path: Path) -> None:
    run = made()
    reshard.convert(run.checkpoint, tmp_path / "said", base=run.base, lora_alpha=ALPHA)
    checkpoint = tmp_path / "run"
    if source == "torch":
        checkpoint = Path(shutil.copytree(run.checkpoint.parent, checkpoint)) / "model.pt"
    else:
        dcp.save(run.model.state_dict(), checkpoint_id=checkpoint, no_dist=True)
    (tmp_path / place).mkdir(exist_ok=True)
    shutil.copy(run.config / "adapter_config.json", tmp_path / place)
    report = reshard.convert(checkpoint, tmp_path / "out", base=run.base)
    said, found = (tmp_path / name / "model.safetensors" for name in ("said", "out"))
    assert said.read_bytes() == found.read_bytes()
    assert any("alpha 8 was taken from" in warning for warning in report.warnings)
    assert str(tmp_path) not in (tmp_path / "out" / "reshard.json").read_text()


def test_a_config_of_another_run_is_refused(made: Get, tmp_path: Path) -> None:
    run = made()
    folder = Path(shutil.copytree(run.checkpoint.parent, tmp_path / "run"))
    settings = json.loads((run.config / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "r": 16}))
    with pytest.raises(
        reshard.PlanError, match=r"states rank 16, .* rank 4: it belongs to another run"
    ):
        reshard.convert(folder / "model.pt", tmp_path / "out", base=run.base)
    reshard.convert(folder / "model.pt", tmp_path / "out", base=run.base, lora_alpha=ALPHA)
    with pytest.raises(reshard.NotFoundError, match="no such file"):
        reshard.convert(
            folder / "model.pt", tmp_path / "no", base=run.base, adapter_config=tmp_path / "none"
        )


@pytest.mark.parametrize("lora", ["adapter", "both"])
def test_no_adapters_where_they_are_asked_for(made: Get, lora: Lora, tmp_path: Path) -> None:
    run = made()
    torch.save(run.fresh().state_dict(), tmp_path / "plain.pt")
    with pytest.raises(reshard.PlanError, match="holds none"):
        reshard.convert(tmp_path / "plain.pt", tmp_path / "out", base=run.base, lora=lora)


def test_one_of_two_adapters(made: Get, tmp_path: Path) -> None:
    run = made()
    state = dict(run.model.state_dict())
    state.update(
        (name.replace(".default.", ".other."), value * 2)
        for name, value in run.model.state_dict().items()
        if ".lora_" in name
    )
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(reshard.PlanError, match="2 adapters: default, other"):
        reshard.convert(tmp_path / "two.pt", tmp_path / "out", base=run.base, lora_alpha=ALPHA)
    options: dict[str, Any] = {"base": run.base, "lora_alpha": ALPHA}
    reshard.convert(tmp_path / "two.pt", tmp_path / "out", adapter="default", **options)
    reshard.convert(run.checkpoint, tmp_path / "one", **options)
    model = "model.safetensors"
    assert (tmp_path / "out" / model).read_bytes() == (tmp_path / "one" / model).read_bytes()


@pytest.mark.parametrize("variant", ["lora", "dora", "embedding"])
def test_adapters_that_were_saved_alone(made: Get, variant: str, tmp_path: Path) -> None:
    """Frozen weights left out of the save, or PEFT's own save_pretrained: the base has the rest."""
    run = made(variant)
    trained = {name: v for name, v in run.model.state_dict().items() if ".lora_" in name}
    torch.save(trained, tmp_path / "trained.pt")
    run.model.save_pretrained(tmp_path / "peft")
    run.model.save_pretrained(tmp_path / "older", safe_serialization=False)
    assert (tmp_path / "older" / "adapter_model.bin").is_file()
    options: dict[str, Any] = {"base": run.base, "adapter_config": run.config}
    reshard.convert(run.checkpoint, tmp_path / "whole", **options)
    for source in ("trained.pt", "peft", "older"):
        with pytest.raises(reshard.NamesError, match="--fill-from-base") as caught:
            reshard.convert(tmp_path / source, tmp_path / "out", **options)
        words = r"holds LoRA adapters on \d+ modules, but not the weights that they update\. The"
        assert re.search(words, str(caught.value)) or variant == "embedding"
        out = tmp_path / f"{source}-out"
        report = reshard.convert(tmp_path / source, out, fill_from_base=True, **options)
        assert report.filled
        model = "model.safetensors"
        assert (out / model).read_bytes() == (tmp_path / "whole" / model).read_bytes()
    out = tmp_path / "adapter"
    reshard.convert(tmp_path / "trained.pt", out, lora="adapter", **options)
    loaded = peft.PeftModel.from_pretrained(run.fresh(), out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, run.logits(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_trained_apart_from_what_they_were_tied_to(
    saved: list[str], kept: bool, tmp_path: Path
) -> None:
    """Of a tied pair PEFT trains a copy of one, or of both, or keeps the tie; the folder that it
    saves holds the copies alone."""
    values = released.values("llama_tied", seed=0)
    base = released.write(tmp_path / "base", "llama_tied", values)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, modules_to_save=saved,
        ensure_weight_tying=kept,
    )  # fmt: skip
    model = peft.get_peft_model(released.load(base, "LlamaForCausalLM"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(tmp_path / "peft")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    trained = {name: v for name, v in model.state_dict().items()
               if ".lora_" in name or ".modules_to_save." in name}  # fmt: skip
    torch.save(trained, tmp_path / "trained.pt")
    merged = model.merge_and_unload()
    for source in ("peft", "model.pt", "trained.pt"):
        out = tmp_path / f"{source}-out"
        reshard.convert(
            tmp_path / source, out, base=base, lora_alpha=ALPHA, fill_from_base=source != "model.pt"
        )
        loaded = released.load(out, "LlamaForCausalLM")
        assert loaded.config.tie_word_embeddings == merged.config.tie_word_embeddings
        for name, value in merged.state_dict().items():
            found = loaded.state_dict()[name]
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6, msg=name)
        reshard.verify(out, tmp_path / source, base=base)


def test_an_adapter_folder_is_called_one_where_a_model_is_asked_for(
    made: Get, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, adapter, out = made(), tmp_path / "peft", tmp_path / "out"
    run.model.save_pretrained(adapter)
    with pytest.raises(reshard.NotFoundError, match="Name the model that it was trained on"):
        reshard.convert(run.checkpoint, out, base=adapter)
    folders = ["--checkpoint_dir", adapter, "--hf_base", run.base, "--output_dir", out]
    for command, flags in (
        (ds2hf.command, folders),
        (fsdp2hf.command, folders),
        (hf2fsdp.command, ["--hf_checkpoint", adapter, "--output", out]),
        (try_model, [adapter, "--device", "cpu", "--output_file", tmp_path / "report.json"]),
    ):
        assert cli.run(command, list(map(str, flags))) == 1
        shown = capsys.readouterr()
        assert re.search("adapter of PEFT|PEFT adapter", shown.out + shown.err)
        assert "an exported model" not in shown.out + shown.err
        assert "reshard convert SRC DST --base BASE --fill-from-base" in shown.out + shown.err
    assert not out.exists()


def test_adapters_without_a_base_are_said_to_be_of_no_use(made: Get, tmp_path: Path) -> None:
    checkpoint = made().checkpoint
    report = reshard.convert(checkpoint, tmp_path / "hf")
    assert any("it holds LoRA adapters" in warning for warning in report.warnings)
    assert not reshard.convert(checkpoint, tmp_path / "dcp", to="dcp").warnings


def test_a_layout_and_adapters_together(tmp_path: Path) -> None:
    """Mixtral of transformers 5: experts are stacked in memory, the adapters are on attention."""
    base = released.write(tmp_path / "base", "mixtral", released.values("mixtral", seed=0))
    model = released.loaded(base, "MixtralForCausalLM")
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) / 4)
    torch.save(adapted.state_dict(), tmp_path / "model.pt")
    report = reshard.convert(tmp_path / "model.pt", tmp_path / "out", base=base, lora_alpha=4)
    assert report.merged == 4
    merged = adapted.merge_and_unload()
    loaded = released.load(tmp_path / "out", "MixtralForCausalLM")
    for name, value in merged.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_critics_head_stays_beside_its_adapter(made: Get, tmp_path: Path) -> None:
    run = made()
    state = {n.replace("base_model.model.model.", "model."): v
             for n, v in run.model.state_dict().items() if "lm_head" not in n}  # fmt: skip
    state["score.weight"] = torch.randn(1, 32)
    torch.save(state, tmp_path / "critic.pt")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "critic.pt", out, base=run.base, lora="adapter", lora_alpha=ALPHA)
    head = load_file(out / "value_head.safetensors")
    assert torch.equal(head["score.weight"], state["score.weight"])
    names = load_file(out / "adapter_model.safetensors").keys()
    assert all(np.char.startswith(sorted(names), "base_model.model."))
