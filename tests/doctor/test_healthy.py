"""Healthy folders give no finding, whoever wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

import reshard
from tests.doctor import models
from tests.doctor.conftest import Pairs, names
from tests.naming import tables


@pytest.mark.parametrize("name", models.NAMES)
def test_released_folders(pairs: Pairs, name: str) -> None:
    pair = pairs(name)
    assert names(reshard.doctor(pair.base)) == []
    assert names(reshard.doctor(pair.healthy)) == []
    diagnosis = reshard.doctor(pair.healthy, base=pair.base)
    assert names(diagnosis) == []
    assert diagnosis.num_tensors == len(models.load(pair.healthy))
    assert not diagnosis.errors


@pytest.mark.parametrize("name", models.NAMES)
@pytest.mark.parametrize("shards", ["50GB", "20KB"])
def test_what_the_installed_transformers_loads_and_saves(
    pairs: Pairs, name: str, shards: str, tmp_path: Path
) -> None:
    pair = pairs(name)
    saved = pair.copy(tmp_path / "saved")
    for old in saved.glob("*.safetensors*"):
        old.unlink()
    models.live(pair.healthy).save_pretrained(saved, max_shard_size=shards)
    assert len(list(saved.glob("*.safetensors"))) == 1 or shards == "20KB"
    # transformers 5.23 really turns this model's experts (huggingface/transformers#43201), and
    # writes `tie_word_embeddings: true` into text_config, which 4.57 and vLLM obey, beside a head.
    ill = ["transposed-experts", "head-contradicts-config"] if name == "qwen3_vl_moe" else []
    assert names(reshard.doctor(saved)) == ill
    assert names(reshard.doctor(saved, base=pair.base)) == ill


def test_what_reshard_converts(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    reshard.convert(pair.healthy, tmp_path / "out", base=pair.base)
    assert names(reshard.doctor(tmp_path / "out", base=pair.base)) == []


@pytest.mark.parametrize("name", tables.names(models.RELEASED))
def test_no_released_layout_is_taken_for_that_of_a_live_module(name: str, tmp_path: Path) -> None:
    models.write(tmp_path / "model", name, 0)
    assert names(reshard.doctor(tmp_path / "model")) == []


def test_a_repair_of_nothing_writes_nothing(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    diagnosis = reshard.doctor(pair.healthy, base=pair.base, repair=tmp_path / "out")
    assert diagnosis.repaired is None
    assert list(tmp_path.iterdir()) == []
