"""A real model that knows something: SmolLM2-135M-Instruct.

The folder is the one that RESHARD_SMOLLM2 names; else it is made once by `demo/make_smollm2.py`
(100 MB of download, half a minute) and kept in pytest's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reshard.evaluate.report import TryReport
from reshard.evaluate.texts import shipped_text
from tests.evaluate.trying import attempt, names
from tests.oracle.cache import kept

pytestmark = pytest.mark.slow
MAKER = Path(__file__).parents[2] / "demo" / "make_smollm2.py"
QUESTIONS = ("What is the capital of France?", "What is two plus two?")


@pytest.fixture(scope="module")
def smollm2(pytestconfig: pytest.Config) -> Path:
    named = os.environ.get("RESHARD_SMOLLM2")
    if named:
        return Path(named)
    assert pytestconfig.cache is not None
    return kept(pytestconfig.cache.mkdir("smollm2"), "model", make)


def make(folder: Path) -> None:
    if not MAKER.exists():
        pytest.skip(f"set RESHARD_SMOLLM2: there is no {MAKER.name} here")
    folder.rmdir()  # the maker renames the complete model to this name
    subprocess.run([sys.executable, str(MAKER), str(folder)], check=True)


@pytest.fixture(scope="module")
def asked(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> TryReport:
    return attempt(
        smollm2,
        tmp_path_factory.mktemp("asked"),
        prompts=QUESTIONS,
        max_new_tokens=32,
        compare=smollm2,
    )


def test_the_answers_make_sense(asked: TryReport) -> None:
    assert asked.status == "passed", (asked.failures, asked.findings)
    assert names(asked) == set()
    capital, sum_of_two = asked.answers
    assert "Paris" in str(capital.text)
    assert "4" in str(sum_of_two.text) or "four" in str(sum_of_two.text).lower()
    assert capital.ended == "stop"


def test_it_is_itself(asked: TryReport) -> None:
    found = asked.comparison
    assert found is not None
    assert found.verdict == "identical"
    # A model of language: far below the 49,152 of a model that knows nothing.
    assert found.perplexity is not None
    assert 5 < found.perplexity < 100


def test_the_same_weights_in_float32_are_the_same_model(smollm2: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(smollm2, tmp_path / "float32"))
    path = other / "model.safetensors"
    save_file({n: t.float() for n, t in load_file(path).items()}, path, {"format": "pt"})
    config = other / "config.json"
    config.write_text(config.read_text().replace('"bfloat16"', '"float32"'))
    text = tmp_path / "text.txt"
    text.write_text("A river begins as almost nothing. Rain falls on a hill.")
    report = attempt(smollm2, tmp_path, compare=other, text=text, prompts=QUESTIONS[:1])
    assert report.comparison is not None
    assert report.comparison.verdict == "same model, other rounding", report.comparison.reason


def test_a_scrambled_layer_is_seen(smollm2: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(smollm2, tmp_path / "scrambled"))
    path = other / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if "layers.3." in name and tensor.ndim == 2:
            torch.manual_seed(0)
            tensors[name] = tensor[torch.randperm(len(tensor))]
    save_file(tensors, path, {"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(shipped_text()[:1500], encoding="utf-8")
    report = attempt(other, tmp_path, compare=smollm2, text=text, prompts=QUESTIONS[:1])
    found = report.comparison
    assert found is not None
    assert found.verdict == "another model"
    assert found.perplexity is not None
    assert found.other_perplexity is not None
    assert found.perplexity > found.other_perplexity
