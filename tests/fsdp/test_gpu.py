"""FSDP on a GPU: DCP copies items from it while it writes. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import reshard
from tests.fsdp.conftest import Oracle, run_oracle
from tests.fsdp.oracle.cases import ON_GPU
from tests.fsdp.test_read import assert_true, read
from tests.fsdp.test_write import assert_loaded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def gpu_oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """What `ON_GPU` lists, made by a real torch process on the GPU."""
    folder = tmp_path_factory.mktemp("gpu-fsdp-oracle")
    run_oracle("launch", str(folder), *(case.name for case in ON_GPU), device="cuda")
    return Oracle(folder)


@pytest.mark.parametrize("name", [case.name for case in ON_GPU])
def test_bytes_are_those_of_the_live_rank(gpu_oracle: Oracle, name: str, tmp_path: Path) -> None:
    made = gpu_oracle[name]
    assert_true(read(made.checkpoint), made)
    assert reshard.convert(made.checkpoint, tmp_path / "out").verified


def test_a_model_on_the_gpu_loads_what_was_written(tmp_path: Path) -> None:
    assert_loaded(tmp_path, ("fsdp2-1",), device="cuda")
