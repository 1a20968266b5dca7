"""LightRFT's reward models and critics, from what the real DeepSpeed and DCP saved to their scores.

The scores before are those of the running wrapper (`tests/naming/lightrft_models.py`), the scores
after those of `reshard try`'s own code on the exported folder: they share nothing but the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import reshard
from reshard.cli import app as cli
from reshard.cli import commands
from reshard.conversion.options import SrmFormat
from tests import child
from tests.models import released
from tests.models.trained_rewards import (
    EXACT,
    IDS,
    SRM_FLAGS,
    Get,
    Trained,
    check_compared,
    check_lightrft,
    check_scores,
    invoke,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run's checkpoint, written by two ranks of the real DeepSpeed."""
    folder = tmp_path_factory.mktemp("reward-runs")
    child.run("tests.models.reward_runs", str(folder))
    return folder


@pytest.fixture(scope="module")
def trained(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trained]:
    made: dict[str, Trained] = {}

    def get(name: str) -> Trained:
        if name not in made:
            made[name] = Trained(name, saved, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.mark.parametrize("name", SRM_FLAGS)
def test_a_scalar_reward_model_of_deepspeed(trained: Get, name: str, tmp_path: Path) -> None:
    run, out = trained(name), tmp_path / "out"
    run.ds2hf(out, *SRM_FLAGS[name])
    check_scores(run, out)
    check_lightrft(run, out)
    stated = json.loads((out / "reshard.json").read_text())
    assert stated["beside"].keys() == {"reward_head.safetensors", "pytorch_model.bin"}
    assert json.loads((out / "config.json").read_text()) == released.config(run.run.base)
    # The base's head was not trained, so a backbone without one gets none.
    assert stated["names"]["missing"] == (["lm_head.weight"] if name == "srm-vl" else [])
    heads = load_file(out / "reward_head.safetensors")
    assert ("preference_logit_scale" in heads) == (name == "srm-vl")
    # That of audio has the whole model's head.
    assert stated.get("generates", True) == (name == "srm-al")
    reshard.verify(out)


@pytest.mark.parametrize("name", SRM_FLAGS)
def test_a_scalar_reward_model_of_fsdp(trained: Get, name: str, tmp_path: Path) -> None:
    run, out = trained(name), tmp_path / "out"
    source = run.dcp(tmp_path / "dcp")
    flags = ["--model-type", name.replace("-", "_"), "--pooling-method",
             "attn" if name == "srm-vl" else "last"]  # fmt: skip
    invoke(commands.convert, [source, out, "--base", run.base, *flags])
    check_scores(run, out)
    check_lightrft(run, out)


@pytest.mark.parametrize("kind", ["lightrft", "split", "both"])
def test_what_each_srm_format_holds(trained: Get, kind: SrmFormat, tmp_path: Path) -> None:
    run, out = trained("srm-vl"), tmp_path / "out"
    report = reshard.convert(run.checkpoint, out, base=run.base, srm_format=kind)
    files = {path.name for path in out.iterdir()}
    model, heads, state = "model.safetensors", "reward_head.safetensors", "pytorch_model.bin"
    expected = {"lightrft": {state}, "split": {model, heads}, "both": {model, heads, state}}[kind]
    index = {f"{model}.index.json"} if heads in expected else set()
    assert files == expected | {"config.json", "reshard.json", "reward_config.json"} | index
    assert set(report.files) == expected
    reshard.verify(out)
    check_compared(run, out)
    if kind == "lightrft":
        state_dict = torch.load(out / state, weights_only=True)
        assert state_dict.keys() == run.model.state_dict().keys()


def test_a_backbone_is_not_for_generation(trained: Get, tmp_path: Path) -> None:
    """An engine would make up the head that such a folder lacks."""
    run = trained("srm-vl")
    base = shutil.copytree(run.base, tmp_path / "base")
    stated = json.loads((base / "config.json").read_text())
    named = {**stated, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    (base / "config.json").write_text(json.dumps(named))
    out = tmp_path / "out"
    report = reshard.convert(run.checkpoint, out, base=base)
    assert [f.subject for f in report.findings if f.code == "no-output-head"] == ["lm_head.weight"]
    config = json.loads((out / "config.json").read_text())
    assert config == {**stated, "architectures": ["Qwen2_5_VLModel"]}
    assert json.loads((out / "reshard.json").read_text())["generates"] is False
    check_scores(run, out)
    check_lightrft(run, out)
    reshard.verify(out, run.checkpoint, base=base)
    assert not reshard.doctor(out, base=base).errors
    # Alone, it lacks what the test's base has not.
    missing = {"tokenizer-missing", "processor-missing"}
    assert {found.code for found in reshard.doctor(out).errors} == missing
    # With the head of the base, it is of the base's class again.
    report = reshard.convert(run.checkpoint, tmp_path / "whole", base=base, fill_from_base=True)
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == named
    assert "generates" not in json.loads((tmp_path / "whole" / "reshard.json").read_text())
    assert "no-output-head" not in {found.code for found in report.findings}


def test_a_class_that_claims_a_head_is_named(trained: Get, tmp_path: Path) -> None:
    run = trained("srm-vl")
    base = shutil.copytree(run.base, tmp_path / "base")
    stated = json.loads((base / "config.json").read_text())
    stated.update(architectures=["MyModel"], auto_map={"AutoModel": "my.MyModel"})
    (base / "config.json").write_text(json.dumps(stated))
    report = reshard.convert(run.checkpoint, tmp_path / "out", base=base)
    (found,) = (found for found in report.findings if found.code == "head-claimed")
    assert "MyModel" in found.message
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == stated


def test_an_engine_reads_the_model_and_not_the_heads(trained: Get, tmp_path: Path) -> None:
    """vLLM and sglang load every `*.safetensors` that no index leaves out."""
    for name in SRM_FLAGS:
        run, out = trained(name), tmp_path / name
        reshard.convert(run.checkpoint, out, base=run.base)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        with safe_open(out / "model.safetensors", "pt") as file:
            assert index["weight_map"] == dict.fromkeys(file.keys(), "model.safetensors")
        stored = load_file(out / "model.safetensors").values()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in stored)
        assert index["metadata"]["total_parameters"] == sum(value.numel() for value in stored)
        stated = json.loads((out / "reshard.json").read_text())
        assert "model.safetensors.index.json" in stated["files"]


def test_everything_is_found_without_a_flag(trained: Get, tmp_path: Path) -> None:
    for name, flags in SRM_FLAGS.items():
        run = trained(name)
        run.ds2hf(tmp_path / f"{name}-flags", *flags)
        reshard.convert(run.checkpoint, tmp_path / name, base=run.base)
        for file in ("reward_config.json", "reward_head.safetensors", "model.safetensors",
                     "pytorch_model.bin"):  # fmt: skip
            with_flags = (tmp_path / f"{name}-flags" / file).read_bytes()
            assert (tmp_path / name / file).read_bytes() == with_flags, file


def test_the_order_of_heads_and_the_probing_layer_are_recorded(
    trained: Get, tmp_path: Path
) -> None:
    run, out = trained("srm-vl"), tmp_path / "out"
    reshard.convert(
        run.checkpoint, out, base=run.base, heads_types=("alignment", "preference"), probing_layer=1
    )
    config = json.loads((out / "reward_config.json").read_text())
    assert config["head_types"] == ["alignment", "preference"]
    assert config["probing_layer"] == 1
    assert config["scale_for_train"]
    # Of two layers, -1 and 1 are the same states: what the second one takes in.
    check_scores(run, out)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("srm-vl", ["--scale_for_train"], "--model-type srm_vl"),
        ("srm-vl", ["--model_type", "srm_al"], "--model-type srm_vl"),
        ("srm-vl", ["--model_type", "srm_vl"], "Pass --scale_for_train"),
        ("srm-vl", ["--model_type", "srm_vl", "--scale_for_train"],
         "--heads_types preference alignment"),
        ("srm-al", ["--model_type", "srm_al"], "--pooling_method last"),
        ("srm-al", ["--model_type", "srm_al", "--pooling_method", "last", "--scale_for_train"],
         "Leave out --scale_for_train"),
        ("srm-al", ["--model_type", "grm"], "--model-type srm_al"),
        ("grm", ["--model_type", "srm_vl"], "--model-type vision2seq or grm"),
        ("critic", [], "--model-type critic"),
    ],
)  # fmt: skip
def test_a_flag_that_disagrees_is_named(
    trained: Get, name: str, flags: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(reshard.NamesError, match=words):
        trained(name).ds2hf(tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("srm-vl", {"pooling_method": "last"}, "--pooling_method attn"),
        ("srm-vl", {"heads_types": ["preference"]}, "--heads_types preference alignment"),
        ("srm-al", {"scale_for_train": True}, "Leave out --scale_for_train"),
        ("grm", {"pooling_method": "attn"}, "holds no reward heads"),
        ("srm-vl", {"probing_layer": 3}, "2 layers, probing layer 3"),
    ],
)
def test_a_flag_that_disagrees_is_named_without_a_model_type_too(
    trained: Get, name: str, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    run = trained(name)
    with pytest.raises(reshard.NamesError, match=words):
        reshard.convert(run.checkpoint, tmp_path / "out", base=run.base, **options)


def test_the_scripts_error_is_one_paragraph(trained: Get, tmp_path: Path) -> None:
    run = trained("srm-al")
    script = child.ROOT / "lightrft/utils/ckpt_scripts/ds2hf.py"
    done = subprocess.run(
        [sys.executable, str(script), "--checkpoint_dir", str(run.checkpoint), "--output_dir",
         str(tmp_path / "out"), "--hf_base", str(run.base), "--model_type", "srm_al"],
        env=os.environ | {"PYTHONPATH": str(child.ROOT / "src")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Pass --pooling_method last." in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("source", ["deepspeed", "dcp"])
def test_a_generative_reward_model(trained: Get, source: str, tmp_path: Path) -> None:
    run, out = trained("grm"), tmp_path / "out"
    if source == "deepspeed":
        run.ds2hf(out, "--model_type", "grm")
    else:
        flags = ["--base", run.base, "--model-type", "grm"]
        invoke(commands.convert, [run.dcp(tmp_path / "dcp"), out, *flags])
    loaded = released.load(out, run.backbone_class)
    released.assert_same(loaded, run.model.model, run.run.base)


@pytest.mark.parametrize("source", ["deepspeed", "dcp"])
def test_a_critic_is_a_classifier(trained: Get, source: str, tmp_path: Path) -> None:
    run, out = trained("critic"), tmp_path / "out"
    if source == "deepspeed":
        run.ds2hf(out, "--model_type", "critic")
    else:
        invoke(commands.convert, [run.dcp(tmp_path / "dcp"), out, "--base", run.base])
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    loaded = released.load(out, "AutoModelForSequenceClassification")
    assert type(loaded).__name__ == "LlamaForSequenceClassification"
    assert loaded.config.num_labels == 1
    with torch.no_grad():
        values = loaded(IDS).logits
    torch.testing.assert_close(values, run.scores()[:, -1], **EXACT)
    check_compared(run, out)


def test_a_vision_language_critic_keeps_its_class(trained: Get, tmp_path: Path) -> None:
    run, out = trained("critic-vl"), tmp_path / "out"
    with pytest.raises(reshard.NamesError, match=r"value_head\.weight"):
        reshard.convert(run.checkpoint, out, base=run.base)
    reshard.convert(run.checkpoint, out, base=run.base, value_head="value_head")
    loaded = released.load(out, run.backbone_class)
    released.assert_same(loaded, run.model.model, run.run.base)
    with safe_open(out / "value_head.safetensors", "pt") as file:
        assert list(file.keys()) == ["value_head.weight"]
        assert torch.equal(file.get_tensor("value_head.weight"), run.model.value_head.weight)
    reshard.verify(out)
    check_compared(run, out)


def test_the_bases_head_on_a_backbone_without_one(trained: Get, tmp_path: Path) -> None:
    run, out = trained("srm-vl"), tmp_path / "out"
    report = reshard.convert(run.checkpoint, out, base=run.base, fill_from_base=True)
    assert report.filled == ("lm_head.weight",)
    assert not report.missing
    written = load_file(out / "model.safetensors")
    base = load_file(run.base / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], base["lm_head.weight"])
    released.load(out, "Qwen2_5_VLForConditionalGeneration")
    check_lightrft(run, out)


def test_the_bases_own_state_dict_does_not_come_along(trained: Get, tmp_path: Path) -> None:
    """A base's pytorch_model.bin, copied last, once overwrote the reward model's."""
    run = trained("srm-al")
    base = released.write(tmp_path / "base", run.run.base, released.values(run.run.base, seed=0))
    torch.save({"w": torch.zeros(2)}, base / "pytorch_model.bin")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("x")
    reshard.convert(run.checkpoint, tmp_path / "out", base=base)
    state = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert state.keys() == run.model.state_dict().keys()
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_inspect_shows_what_a_reward_model_becomes(trained: Get) -> None:
    run = trained("srm-vl")
    shown = json.loads(
        invoke(cli.reshard, ["inspect", run.checkpoint, "--base", run.base, "--json"])
    )
    assert shown["base"]["fits"]
    assert shown["base"]["beside"] == ["reward_head.safetensors", "pytorch_model.bin"]
    assert shown["base"]["missing"] == ["lm_head.weight"]


@pytest.mark.parametrize("name", ["srm-vl", "critic-vl"])
def test_heads_beside_a_model_have_no_place_in_dcp(trained: Get, name: str, tmp_path: Path) -> None:
    run = trained(name)
    with pytest.raises(reshard.PlanError, match="Leave out --base: every tensor then keeps"):
        reshard.convert(
            run.checkpoint, tmp_path / "out", base=run.base, to="dcp", value_head=run.run.critic
        )
    reshard.convert(run.checkpoint, tmp_path / "out", to="dcp")
    assert set(reshard.open(tmp_path / "out").tensors) == set(run.model.state_dict())


def test_a_classifier_into_training(trained: Get, tmp_path: Path) -> None:
    """Of a base with a tied head, which a classifier does not have."""
    run, out = trained("critic"), tmp_path / "out"
    base = released.write(tmp_path / "base", "llama_tied", released.values("llama_tied", seed=0))
    reshard.convert(run.checkpoint, tmp_path / "hf", base=base)
    truth = released.load(tmp_path / "hf", "AutoModelForSequenceClassification").state_dict()
    reshard.convert(run.checkpoint, out, base=base, to="dcp", names="memory")
    assert set(reshard.open(out).tensors) == set(truth)
