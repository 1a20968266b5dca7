"""Runs that DeepSpeed does on a GPU alone, fp16 above all. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reshard
from tests.deepspeed.test_reading import check_against_truth, same_bits
from tests.oracle.cache import Oracle, make, to_numpy
from tests.oracle.recipes import ON_GPU

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
LLAMAS = [recipe.name for recipe in ON_GPU if recipe.model == "llama"]


@pytest.fixture(scope="module")
def gpu_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """What `ON_GPU` lists, made by the real DeepSpeed on the GPU; about a minute."""
    folder = tmp_path_factory.mktemp("gpu-oracle")
    make(folder, [recipe.name for recipe in ON_GPU], device="cuda")
    return Oracle(folder)


@pytest.mark.parametrize("name", [recipe.name for recipe in ON_GPU])
def test_every_tensor_is_the_live_engines(gpu_oracle: Oracle, name: str, tmp_path: Path) -> None:
    case = gpu_oracle[name]
    checkpoint = reshard.open(case.root)
    assert checkpoint.world_size == case.recipe.world
    check_against_truth(checkpoint, case.last)
    assert reshard.convert(case.root, tmp_path / "out").verified


@pytest.mark.parametrize("name", LLAMAS)
def test_a_float16_model_answers_as_it_was_trained(
    gpu_oracle: Oracle, name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    case = gpu_oracle[name]
    reshard.convert(case.root, tmp_path / "out", base=case.base)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", device_map="cuda")
    truth = case.last.module()
    state = {key: to_numpy(value.cpu()) for key, value in model.state_dict().items()}
    assert state.keys() == truth.keys()
    for key, value in state.items():
        assert str(value.dtype) == "float16", key
        assert same_bits(value, truth[key]), key
