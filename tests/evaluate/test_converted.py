"""Folders that the other commands wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.distributed.checkpoint import save as save_dcp
from transformers import (
    AutoModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioForConditionalGeneration,
)

import reshard
from reshard.naming.rewards import ModelType, Pooling
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt, names
from tests.oracle.cache import Oracle


def test_a_converted_state_dict_is_the_model_that_was_saved(models: Models, tmp_path: Path) -> None:
    trained, base = models("causal"), models("other")
    model = LlamaForCausalLM.from_pretrained(trained)
    (tmp_path / "run").mkdir()
    torch.save(model.state_dict(), tmp_path / "run" / "pytorch_model.bin")
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run", out, base=base)
    report = attempt(out, tmp_path, compare=trained)
    assert report.status == "passed", (report.failures, report.findings)
    assert report.comparison is not None
    assert report.comparison.verdict == "identical"
    assert names(report) == set()
    against_base = attempt(out, tmp_path, compare=base)
    assert against_base.comparison is not None
    assert against_base.comparison.verdict == "another model"


def test_a_converted_dcp_checkpoint_is_the_model_that_was_saved(
    models: Models, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(models("causal"))
    save_dcp(model.state_dict(), checkpoint_id=tmp_path / "run", no_dist=True)
    out = tmp_path / "out"
    reshard.convert(tmp_path / "run", out, base=models("other"))
    found = attempt(out, tmp_path, compare=models("causal")).comparison
    assert found is not None
    assert found.verdict == "identical", found.reason


@pytest.mark.parametrize(
    ("name", "kind", "pooling"), [("srm_vl", "srm_vl", "attn"), ("srm_al", "srm_al", "last")]
)
def test_a_converted_reward_model_gives_the_scores_of_training(
    models: Models, tmp_path: Path, name: str, kind: ModelType, pooling: Pooling
) -> None:
    """LightRFT saves one state dict: the running backbone under `model.`, the heads beside it."""
    trained = models(name)
    backbone = (
        AutoModel if name == "srm_vl" else Qwen2AudioForConditionalGeneration
    ).from_pretrained(trained)
    state = {f"model.{key}": value for key, value in backbone.state_dict().items()}
    state |= load_file(trained / "reward_head.safetensors")
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")
    maker = tiny.qwen_vl if name == "srm_vl" else tiny.qwen_audio
    out = tmp_path / "out"
    heads = ["preference", "alignment"] if name == "srm_vl" else ["preference"]
    reshard.convert(
        tmp_path / "run",
        out,
        base=maker(tmp_path / "base", seed=5),
        model_type=kind,
        pooling_method=pooling,
        heads_types=heads,
    )
    expected = attempt(trained, tmp_path)
    report = attempt(out, tmp_path, compare=trained)
    assert report.status == "passed", (report.failures, report.findings)
    assert [s.scores for s in report.scores] == [s.scores for s in expected.scores]
    assert report.comparison is not None
    assert report.comparison.verdict == "identical", report.comparison.reason


def test_a_converted_generative_reward_model_speaks(models: Models, tmp_path: Path) -> None:
    trained = models("qwen_vl")
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(trained)
    (tmp_path / "run").mkdir()
    state = {f"model.{key}": value for key, value in loaded.state_dict().items()}
    torch.save(state, tmp_path / "run" / "pytorch_model.bin")
    out = tmp_path / "out"
    base = tiny.qwen_vl(tmp_path / "base", seed=5)
    reshard.convert(tmp_path / "run", out, base=base, model_type="grm")
    picture = tiny.image(tmp_path / "picture.png")
    report = attempt(out, tmp_path, compare=trained, images=(picture,))
    assert report.status == "passed", (report.failures, report.findings)
    assert report.comparison is not None
    assert report.comparison.verdict == "identical", report.comparison.reason


def few_words(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of `size` tokens, for models whose vocabulary is too small for bytes."""
    words = {"<end>": 0, "<unknown>": 1, **{f"w{i}": i for i in range(2, size)}}
    core = Tokenizer(WordLevel(words, unk_token="<unknown>"))
    core.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<end>", unk_token="<unknown>"
    )


@pytest.mark.parametrize("name", ["llama-zero2", "llama-tied-zero3"])
def test_a_converted_deepspeed_run_speaks(oracle: Oracle, name: str, tmp_path: Path) -> None:
    case = oracle[name]
    base = Path(shutil.copytree(case.base, tmp_path / "base"))
    few_words(json.loads((base / "config.json").read_text())["vocab_size"]).save_pretrained(base)
    out = tmp_path / "out"
    reshard.convert(case.root, out, base=base)
    report = attempt(out, tmp_path, compare=base, prompts=("w2 w3 w5 w7",))
    assert not report.failures
    assert report.model is not None
    assert report.comparison is not None
    assert report.comparison.verdict == "another model"
    assert "weights-missing" not in names(report)
    assert "head-contradicts-config" not in names(report)
