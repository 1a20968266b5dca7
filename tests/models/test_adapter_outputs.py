"""Adapters: what is left out, lookalike names, experts, and the folders that they become."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed import checkpoint as dcp

import reshard
from tests.models.test_adapter_traps import IDS, SIZES, Run, plain


def qwen2(**more: Any) -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SIZES, **more}))


def gpt2() -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


# --- what an adapter alone leaves out -----------------------------------------------------------


@pytest.mark.parametrize("what", ["q_proj.bias", "norm.weight", "mlp.up_proj.weight"])
def test_what_was_trained_beside_an_adapter_is_not_left_out_in_silence(
    what: str, tmp_path: Path
) -> None:
    run = Run(tmp_path, qwen2)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name.replace(".base_layer", "").endswith(f"model.{what}") or (
                what != "norm.weight" and f"layers.1.{'self_attn.' * ('bias' in what)}{what}"
                in name.replace(".base_layer", "")
            ):  # fmt: skip
                parameter.add_(0.5)
    run.save(run.model.state_dict(), tmp_path / "trained")
    options: dict[str, Any] = {"base": run.base, "lora": "adapter"}
    with pytest.raises(reshard.PlanError, match=f"1 tensors .*{what}") as caught:
        reshard.convert(tmp_path / "trained", tmp_path / "out", **options)
    hint = caught.value.hint or ""
    run.check(tmp_path / "trained", tmp_path / "merged")  # --lora merge
    pattern = hint.split("--allow '")[1].split("'")[0]
    report = reshard.convert(tmp_path / "trained", tmp_path / "out", allow=[pattern], **options)
    assert [f.code for f in report.findings if f.severity == "warning"] == ["adapters-alone"]


@pytest.mark.parametrize("make", [qwen2, gpt2])
@pytest.mark.parametrize("bias", ["all", "lora_only", "none"])
@pytest.mark.parametrize("source", ["full", "saved"])
def test_an_adapter_beside_the_merged_model_says_what_it_lacks(
    source: str, bias: str, make: Callable[..., Any], tmp_path: Path
) -> None:
    """PEFT's `bias` trains biases outside the adapter; a bias alone is not a saved module."""
    targets = ["c_attn"] if make is gpt2 else ["q_proj"]
    run = Run(tmp_path, make, bias=bias, target_modules=targets)
    both = {"lora": "both", "fill_from_base": True}
    report = run.check(getattr(run, source), tmp_path / "out", **both)
    alone = peft.PeftModel.from_pretrained(
        run.kind.from_pretrained(run.base), tmp_path / "out" / "adapter"
    ).eval()
    with torch.no_grad():
        equal = torch.allclose(alone(IDS).logits, run.logits(), rtol=1e-4, atol=1e-5)
    said = any(finding.code == "adapters-alone" for finding in report.findings)
    assert equal is (bias == "none")
    assert said is not equal


def test_nothing_is_said_where_nothing_is_lost(tmp_path: Path) -> None:
    run = Run(tmp_path)
    report = reshard.convert(run.full, tmp_path / "out", base=run.base, lora="adapter")
    assert not [f for f in report.findings if f.severity != "info"]
    halves = {name: value.bfloat16() if "lora_" not in name else value
              for name, value in run.model.state_dict().items()}  # fmt: skip
    run.save(halves, tmp_path / "halves")
    reshard.convert(tmp_path / "halves", tmp_path / "half", base=run.base, lora="adapter")


def test_a_base_that_has_adapters_of_its_own(tmp_path: Path) -> None:
    """Phi-4-multimodal's files: a LoRA for pictures and one for sounds, part of the model."""
    torch.manual_seed(0)
    names = ("base_layer.weight", "lora_A.vision.weight", "lora_B.vision.weight",
             "lora_A.speech.weight", "lora_B.speech.weight")  # fmt: skip
    state = {f"model.layers.0.qkv_proj.{name}": torch.randn(4, 4) for name in names}
    base = plain(tmp_path / "base", {**state, "model.norm.weight": torch.randn(4)})
    trained = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    torch.save({f"module.{n}": v for n, v in trained.items()}, tmp_path / "run.bin")
    report = reshard.convert(tmp_path / "run.bin", tmp_path / "out", base=base)
    assert report.merged == 0
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], trained[name]) for name in trained)


@pytest.mark.parametrize("lora", [False, True])
def test_a_module_that_is_called_as_a_method_is(lora: bool, tmp_path: Path) -> None:
    """SAM's and LISA's `prompt_encoder`, trained in full or with LoRA beside it."""
    torch.manual_seed(0)
    state = {"prompt_encoder.point_embed.weight": torch.randn(4, 4),
             "visual_model.prompt_encoder.mask.weight": torch.randn(4, 4),
             "q_proj.weight": torch.randn(4, 4)}  # fmt: skip
    base = plain(tmp_path / "base", state)
    trained = {name: value + 1 for name, value in state.items()}
    if lora:
        trained["q_proj.base_layer.weight"] = trained.pop("q_proj.weight")
        trained = {f"base_model.model.{name}": value for name, value in trained.items()}
        for side in "AB":
            name = f"base_model.model.q_proj.lora_{side}.default.weight"
            trained[name] = torch.eye(4)
    torch.save(trained, tmp_path / "run.bin")
    report = reshard.convert(
        tmp_path / "run.bin", tmp_path / "out", base=base, lora_alpha=4 if lora else None
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert report.merged == lora
    torch.testing.assert_close(written["q_proj.weight"], state["q_proj.weight"] + 1
                               + lora * torch.eye(4))  # fmt: skip


# --- experts, which one side lists and the other stacks -----------------------------------------


@pytest.mark.parametrize("source", ["full", "saved"])
def test_adapters_on_listed_experts_of_a_base_that_stacks_them(source: str, tmp_path: Path) -> None:
    """transformers 4.x trained them as linear layers; the base is a save that has them stacked."""
    torch.manual_seed(0)
    listed = {f"model.layers.0.mlp.experts.{e}.{n}_proj.weight": torch.randn(*shape)
              for e in range(2) for n, shape in (("gate", (6, 4)), ("up", (6, 4)), ("down", (4, 6)))
              }  # fmt: skip
    names = {
        n: "model.layers.0.mlp.experts.{}." + f"{n}_proj.weight" for n in ("gate", "up", "down")
    }
    other = {"model.embed_tokens.weight": torch.randn(8, 4), "model.norm.weight": torch.randn(4),
             "model.layers.0.mlp.gate.weight": torch.randn(2, 4)}  # fmt: skip

    def stack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        each = {n: torch.stack([state[names[n].format(e)] for e in range(2)]) for n in names}
        return {
            **other,
            "model.layers.0.mlp.experts.gate_up_proj": torch.cat([each["gate"], each["up"]], 1),
            "model.layers.0.mlp.experts.down_proj": each["down"],
        }

    base = plain(tmp_path / "base", stack(listed), model_type="qwen3_moe")
    run, merged = {f"base_model.model.{n}": v for n, v in other.items()}, dict(listed)
    for name, value in listed.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = torch.randn(2, value.shape[1]), torch.randn(value.shape[0], 2)
        run |= {f"{module}.lora_A.default.weight": a, f"{module}.lora_B.default.weight": b}
        if source == "full":
            run[f"{module}.base_layer.weight"] = value
        merged[name] = value + b @ a * 2
    torch.save(run, tmp_path / "run.bin")
    options: dict[str, Any] = {"base": base, "lora_alpha": 4, "fill_from_base": True}
    if source == "saved":
        with pytest.raises(reshard.UnsupportedError, match="stacks or transposes this weight"):
            reshard.convert(tmp_path / "run.bin", tmp_path / "out", **options)
        return
    for name, without in (("out", False), ("without", True)):
        options["exclude_frozen"] = without
        reshard.convert(tmp_path / "run.bin", tmp_path / name, **options)
        written = load_file(tmp_path / name / "model.safetensors")
        for key, value in stack(merged).items():
            torch.testing.assert_close(written[key], value, rtol=1e-5, atol=1e-5)


# --- more than one file, other modules ----------------------------------------------------------


def test_what_ms_swift_saves_beside_its_adapter(tmp_path: Path) -> None:
    """`vit.safetensors`: modules trained in full, by the model's names without PEFT's prefix."""
    run = Run(tmp_path)
    with torch.no_grad():
        run.model.base_model.model.model.norm.weight.add_(1)
    norm = run.model.base_model.model.model.norm.weight.detach().clone()
    save_file({"model.norm.weight": norm}, run.saved / "vit.safetensors")
    run.check(run.saved, tmp_path / "out", fill_from_base=True)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("source", ["full", "saved"])
def test_gpt2_alone(source: str, dora: bool, tmp_path: Path) -> None:
    targets = ["c_attn", "attn.c_proj", "wte"]
    run = Run(tmp_path, gpt2, target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    run.check(getattr(run, source), tmp_path / "out", fill_from_base=True)


def test_a_square_conv1d_without_a_config(tmp_path: Path) -> None:
    """Of a square matrix no shape says that it is turned; the model's type does."""
    run = Run(tmp_path, gpt2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    (run.full / "adapter_config.json").unlink()
    run.check(run.full, tmp_path / "out", lora_alpha=10)


def test_patterns_of_the_plain_kind(tmp_path: Path) -> None:
    run = Run(
        tmp_path,
        alpha_pattern={r"^model\.layers\.0\..*q_proj$": 3, "(v|k)_proj": 7},
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
    )
    for source in (run.full, run.saved):
        run.check(source, tmp_path / "out" / source.name, fill_from_base=True)


# --- parts that were not saved ------------------------------------------------------------------


def test_a_part_of_exact_zeros_is_a_finding(tmp_path: Path) -> None:
    run = Run(tmp_path)
    state = load_file(run.saved / "adapter_model.safetensors")
    options: dict[str, Any] = {"base": run.base, "fill_from_base": True}

    def codes(name: str) -> set[str]:
        save_file(state, run.saved / "adapter_model.safetensors")
        report = reshard.convert(run.saved, tmp_path / name, allow_unchanged=True, **options)
        return {finding.code for finding in report.findings}

    assert codes("whole").isdisjoint({"adapter-partly-zero", "adapter-zero"})
    for name, value in state.items():
        if "lora_B" in name:
            value[len(value) // 2 :] = 0
    assert "adapter-partly-zero" in codes("half")
    for name, value in state.items():
        if "lora_B" in name:
            value.zero_()
    assert "adapter-zero" in codes("none")


# --- the folder ---------------------------------------------------------------------------------


def test_the_folder_loads_by_its_own_word(tmp_path: Path) -> None:
    """PEFT's Auto class finds base and class in the config alone."""
    run, out = Run(tmp_path), tmp_path / "out"
    report = reshard.convert(run.full, out, base=run.base, lora="adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, run.logits())
    assert {finding.code for finding in report.findings} == {
        "alpha-from-file",
        "adapter-base-folder",
    }
    assert str(tmp_path) not in (out / "reshard.json").read_text()


@pytest.mark.parametrize("source", ["dcp", "torch"])
def test_adapters_alone_become_a_folder_for_peft(source: str, tmp_path: Path) -> None:
    """accelerate's FSDP saves with `adapter_only`: PEFT's names, without the adapter's, in DCP."""
    run, place = Run(tmp_path, modules_to_save=["lm_head"]), tmp_path / "run" / "checkpoint"
    state = peft.get_peft_model_state_dict(run.model)
    place.parent.mkdir()
    if source == "dcp":
        dcp.save({"model": state}, checkpoint_id=place, no_dist=True)
    else:
        torch.save(state, place.with_suffix(".bin"))
        place = place.with_suffix(".bin")
    config = (run.saved / "adapter_config.json").read_bytes()
    (place.parent / "adapter_config.json").write_bytes(config)
    reshard.convert(place, tmp_path / "out", base=run.base, lora="adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, run.logits())
    run.check(place, tmp_path / "merged", fill_from_base=True)
    for adapter in (run.saved, run.saved / "adapter_model.safetensors"):
        with pytest.raises(reshard.PlanError, match="already an adapter folder"):
            reshard.convert(adapter, tmp_path / "no", base=run.base, lora="adapter")


@pytest.mark.parametrize(
    ("stated", "in_config", "folder", "expected"),
    [
        ("org/run", "org/base", "base", "org/run"),
        ("/home/someone/base", "org/base", "base", "org/base"),
        (None, None, "models--org--cached/snapshots/abc", "org/cached"),
        ("/home/someone/base", "/home/else", "base", None),
    ],
)
def test_the_name_of_the_base(
    stated: str | None, in_config: str | None, folder: str, expected: str | None, tmp_path: Path
) -> None:
    run = Run(tmp_path / "made")
    base = tmp_path / folder
    base.parent.mkdir(parents=True, exist_ok=True)
    run.base.rename(base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "_name_or_path": in_config}))
    run.edit(run.full, base_model_name_or_path=stated)
    reshard.convert(run.full, tmp_path / "out", base=base, lora="adapter")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == (expected or str(base))
    assert written["task_type"] == "CAUSAL_LM"


def test_a_model_of_no_task_names_its_class(tmp_path: Path) -> None:
    """A vision-language model: AutoPeftModel makes the class that the config names."""
    from reshard.naming.lora.config import AdapterConfig
    from reshard.naming.lora.folder import named

    kinds = {
        "LlamaForCausalLM": "CAUSAL_LM",
        "GPT2LMHeadModel": "CAUSAL_LM",
        "Qwen2ForSequenceClassification": "SEQ_CLS",
        "BertForTokenClassification": "TOKEN_CLS",
        "Qwen2_5_VLForConditionalGeneration": None,
    }
    for name, task in kinds.items():
        found = named(AdapterConfig(1), Path("/base"), {"architectures": [name]})
        assert found.task_type == task
        assert (found.auto_mapping is None) == (task is not None)
        assert hasattr(transformers, name)
    seq2seq = {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}
    assert named(AdapterConfig(1), Path("/base"), seq2seq).task_type == "SEQ_2_SEQ_LM"


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"use_dora": True}, "adapter-not-served"),
        ({"modules_to_save": ["lm_head"]}, "adapter-not-served"),
        ({"r": 17}, "adapter-rank-for-vllm"),
        ({"alpha_pattern": {"q_proj": 3}}, "adapter-scales-differ"),
        ({"use_rslora": True}, "adapter-scales-differ"),
        ({}, ""),
    ],
)
def test_what_engines_make_of_a_folder(settings: dict[str, Any], code: str, tmp_path: Path) -> None:
    run, out = Run(tmp_path, **settings), tmp_path / "out"
    report = reshard.convert(run.full, out, base=run.base, lora="adapter")
    codes = {f.code for f in report.findings if f.severity == "warning"}
    assert codes == ({code} if code else set())
    fixes = [f.fix for f in report.findings if f.code == "adapter-rank-for-vllm"]
    assert fixes == (["Start vLLM with --max-lora-rank 32."] if "r" in settings else [])
    # What llama.cpp's converter takes: pairs of A and B, nothing else, and alpha as a number.
    names = set(load_file(out / "adapter_model.safetensors"))
    pairs = {n for n in names if n.endswith((".lora_A.weight", ".lora_B.weight"))}
    assert (names == pairs) == (code != "adapter-not-served")
    assert {n.replace("lora_A", "lora_B") for n in pairs if "lora_A" in n} <= names
    assert isinstance(json.loads((out / "adapter_config.json").read_text())["lora_alpha"], int)
