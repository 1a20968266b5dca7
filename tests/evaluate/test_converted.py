"""Folders that the other commands wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import reshard
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
    assert "tied-not-tied" not in names(report)
