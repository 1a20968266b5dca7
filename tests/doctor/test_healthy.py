"""Healthy folders give no finding, whoever wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import reshard
from tests.doctor import models
from tests.doctor.conftest import Pairs, names, repaired
from tests.naming import tables, test_every_model
from tests.naming.make_layouts import build


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
    models.loaded(pair.healthy).save_pretrained(saved, max_shard_size=shards)
    assert len(list(saved.glob("*.safetensors"))) == 1 or shards == "20KB"
    # transformers 5.23 really turns this model's experts (huggingface/transformers#43201), and
    # writes `tie_word_embeddings: true` into text_config, which 4.57 and vLLM obey, beside a head.
    ill = ["transposed-experts", "head-contradicts-config"] if name == "qwen3_vl_moe" else []
    # It leaves rope_theta out, which of these is not what every reader takes anyway.
    ill += ["config-fields-missing"] if name.startswith("qwen") else []
    assert names(reshard.doctor(saved)) == ill
    assert names(reshard.doctor(saved, base=pair.base)) == ill


def test_what_reshard_converts(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    reshard.convert(pair.healthy, tmp_path / "out", base=pair.base)
    assert names(reshard.doctor(tmp_path / "out", base=pair.base)) == []


@pytest.mark.parametrize("name", tables.names(models.RELEASED))
def test_no_released_layout_is_taken_for_that_of_a_loaded_model(name: str, tmp_path: Path) -> None:
    models.write(tmp_path / "model", name, 0)
    # 4.57 writes no topk_method, which the release of DeepSeek-V3 has.
    lacking = ["config-fields-missing"] if name == "deepseek_v3" else []
    assert names(reshard.doctor(tmp_path / "model")) == lacking


def test_a_repair_of_nothing_writes_nothing(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    diagnosis = reshard.doctor(pair.healthy, base=pair.base, repair=tmp_path / "out")
    assert diagnosis.repaired is None
    assert list(tmp_path.iterdir()) == []


def wrapped(pair: models.Pair, path: Path, *heads: str) -> Path:
    """The model as LightRFT's critic or scalar reward model holds it, without its output head."""
    values = models.load(pair.healthy)
    state = {f"model.{name}": value for name, value in values.items() if "lm_head" not in name}
    width = values["model.embed_tokens.weight"].shape[1]
    shapes = {"0.weight": (width, width), "0.bias": (width,), "1.weight": (width,)}
    for head in heads:
        if head == "score":
            state["score.weight"] = torch.ones(1, width)
        else:
            state |= {f"{head}_head.{name}": torch.ones(shape) for name, shape in shapes.items()}
            state[f"{head}_head.3.weight"] = torch.ones(1, width)
    torch.save(state, path)
    return path


@pytest.mark.parametrize("head", ["score", "preference"])
def test_what_scores_needs_no_output_head(pairs: Pairs, head: str, tmp_path: Path) -> None:
    pair, out = pairs("llama"), tmp_path / "out"
    report = reshard.convert(wrapped(pair, tmp_path / "model.pt", head), out, base=pair.base)
    assert ("reward_head.safetensors" in report.files) == (head == "preference")
    assert names(reshard.doctor(out)) == []
    assert names(reshard.doctor(out, base=pair.base)) == []


def test_a_score_survives_a_repair(pairs: Pairs, tmp_path: Path) -> None:
    pair, ill = pairs("llama"), tmp_path / "ill"
    reshard.convert(wrapped(pair, tmp_path / "model.pt", "score"), ill, base=pair.base)
    (ill / "tokenizer.json").unlink()
    repaired(ill, pair.base, tmp_path / "out", "tokenizer-missing")
    assert models.load(tmp_path / "out").keys() == models.load(ill).keys()
    assert "score.weight" in models.load(ill)


def test_a_repair_does_not_lose_the_head_beside_a_model(pairs: Pairs, tmp_path: Path) -> None:
    pair, ill = pairs("llama"), tmp_path / "ill"
    reshard.convert(wrapped(pair, tmp_path / "model.pt", "preference"), ill, base=pair.base)
    (ill / "tokenizer.json").unlink()
    with pytest.raises(reshard.PlanError, match=r"reward_head\.safetensors lies beside the model"):
        reshard.doctor(ill, base=pair.base, repair=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_by_itself_is_not_ill(pairs: Pairs, tmp_path: Path) -> None:
    pair, out = pairs("llama"), tmp_path / "out"
    checkpoint = wrapped(pair, tmp_path / "model.pt", "preference")
    reshard.convert(checkpoint, out, base=pair.base, srm_format="lightrft")
    with pytest.raises(reshard.UnsupportedError, match="LightRFT's own state dict"):
        reshard.doctor(out)


# What a folder of weights alone lacks.
_COMPANIONS = {"tokenizer-missing", "processor-missing", "generation-config-missing",
               "config-fields-missing"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["T5ForConditionalGeneration", "BertForMaskedLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
     "GraniteMoeForCausalLM", "LlavaModel", "CLIPVisionModel",
     "Cohere2VisionForConditionalGeneration", "Qwen3MoeForSequenceClassification"],
)  # fmt: skip
def test_models_of_other_families(name: str, tmp_path: Path) -> None:
    (arguments,) = (row[1:] for row in test_every_model.MODELS if row[0] == name)
    build(name, *arguments).save_pretrained(tmp_path)
    assert {*names(reshard.doctor(tmp_path))} <= _COMPANIONS


def test_a_tower_by_the_names_of_its_release(tmp_path: Path) -> None:
    """`model.vision_tower.vision_model` is the hub's, though loaded models have `vision_tower`."""
    save_file({"model.vision_tower.vision_model.post_layernorm.weight": torch.ones(4)},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text('{"model_type": "cohere2_vision"}', encoding="utf-8")
    assert {*names(reshard.doctor(tmp_path))} <= _COMPANIONS


@pytest.mark.parametrize("kind", ["mllama_text_model", "llama"])
def test_rows_that_neither_head_nor_config_count(kind: str, tmp_path: Path) -> None:
    values = {"model.embed_tokens.weight": torch.ones(16, 4), "lm_head.weight": torch.zeros(8, 4)}
    save_file(values, tmp_path / "model.safetensors")
    config = {"model_type": kind, "vocab_size": 8, "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = {*names(reshard.doctor(tmp_path))} - _COMPANIONS
    assert found == (set() if kind.startswith("mllama") else {"vocabulary-size"})
