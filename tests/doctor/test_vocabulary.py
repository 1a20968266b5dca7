"""Faults of the head, the vocabulary and the dtype, each made for real, found and repaired."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reshard
from tests.doctor import models
from tests.doctor.conftest import Pairs, evidence, names, refused, repaired
from tests.folders import edit_config

TIED = {"llama_tied": "model.embed_tokens.weight", "qwen2_5_vl_tied": "model.embed_tokens.weight"}


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", TIED)
def test_a_head_stored_twice(pairs: Pairs, name: str, with_base: bool, tmp_path: Path) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    models.save(ill, {**tensors, "lm_head.weight": tensors[TIED[name]]})
    diagnosis = repaired(
        ill, pair.base if with_base else None, tmp_path / "out", "head-stored-twice"
    )
    assert f"same values as {TIED[name]}" in evidence(diagnosis, "head-stored-twice")
    assert not diagnosis.errors
    models.assert_same_weights(tmp_path / "out", pair.healthy)


def test_a_head_that_the_config_wrongly_unties(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    ill = pair.copy(tmp_path / "ill")
    edit_config(ill, tie_word_embeddings=False)
    with pytest.raises(AssertionError, match="missing_keys"):
        models.loaded(ill)
    refused(ill, None, tmp_path / "no", "head-missing")
    diagnosis = repaired(ill, pair.base, tmp_path / "out", "head-missing")
    assert "loaders use a random head" in evidence(diagnosis, "head-missing")
    models.assert_same_weights(tmp_path / "out", pair.healthy)


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "llava"])
def test_a_head_that_is_lost(pairs: Pairs, name: str, tmp_path: Path) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    kept = {key: value for key, value in tensors.items() if "lm_head" not in key}
    assert len(kept) == len(tensors) - 1
    models.save(ill, kept)
    diagnosis = refused(ill, pair.base, tmp_path / "out", "head-missing")
    assert "the base stores a head" in evidence(diagnosis, "head-missing")
    assert names(reshard.doctor(ill)) == ["head-missing"]


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_a_config_that_ties_a_head_of_its_own(
    pairs: Pairs, name: str, with_base: bool, tmp_path: Path
) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    edit_config(ill, tie_word_embeddings=True)
    base = pair.base if with_base else None
    diagnosis = repaired(ill, base, tmp_path / "out", "head-contradicts-config")
    assert "lm_head.weight differs from" in evidence(diagnosis, "head-contradicts-config")
    models.assert_same_weights(tmp_path / "out", pair.healthy)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_base_that_ties_by_its_values_alone(pairs: Pairs, tmp_path: Path) -> None:
    """A config that is silent on ties means what the base's values say, as for a conversion."""
    pair = pairs("llama_tied")
    tensors = models.load(pair.healthy)
    embedding = tensors["model.embed_tokens.weight"]

    def silent(folder: Path, head: torch.Tensor) -> Path:
        made = pair.copy(folder)
        models.save(made, {**tensors, "lm_head.weight": head})
        path = made / "config.json"
        config = json.loads(path.read_text())
        del config["tie_word_embeddings"]
        path.write_text(json.dumps(config))
        return made

    tied, apart = silent(tmp_path / "tied", embedding), silent(tmp_path / "apart", -embedding)
    diagnosis = repaired(apart, tied, tmp_path / "out", "head-contradicts-config")
    assert "does not state" in evidence(diagnosis, "head-contradicts-config")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # The base's own head differs: the silence says nothing.
    another = silent(tmp_path / "another", embedding * 2)
    assert "head-contradicts-config" not in names(reshard.doctor(another, base=apart))


def test_a_tied_base_whose_run_untied_the_head(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama_tied")
    ill = pair.copy(tmp_path / "ill")
    tensors = models.load(ill)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    models.save(ill, tensors)
    repaired(ill, pair.base, tmp_path / "out", "head-contradicts-config")
    state = models.loaded(tmp_path / "out").state_dict()
    assert torch.equal(state["lm_head.weight"], tensors["lm_head.weight"])


def resize(tensors: models.Tensors, rows: int, *parts: str) -> models.Tensors:
    """The tensors whose name holds one of `parts` with another number of rows."""
    return {
        name: torch.cat([value, value])[:rows] if any(part in name for part in parts) else value
        for name, value in tensors.items()
    }


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "llava", "qwen2_5_vl"])
def test_a_vocabulary_that_the_config_does_not_know(
    pairs: Pairs, name: str, with_base: bool, tmp_path: Path
) -> None:
    pair = pairs(name)
    ill = pair.copy(tmp_path / "ill")
    tensors = resize(models.load(ill), 100, "embed_tokens", "lm_head")
    models.save(ill, tensors)
    base = pair.base if with_base else None
    diagnosis = repaired(ill, base, tmp_path / "out", "vocabulary-size")
    told = evidence(diagnosis, "vocabulary-size")
    assert "100 rows" in told
    assert "vocab_size is 96" in told
    model = models.loaded(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == 100
    assert models.load(tmp_path / "out").keys() == tensors.keys()


def test_a_head_of_another_size_than_the_embedding(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, resize(models.load(ill), 100, "lm_head"))
    for base in (None, pair.base):
        diagnosis = refused(ill, base, tmp_path / "out", "vocabulary-size")
        assert "has 96 rows, lm_head.weight has 100" in evidence(diagnosis, "vocabulary-size")


@pytest.mark.parametrize("kind", ["bpe", "unigram", "added"])
def test_a_tokenizer_with_more_tokens_than_rows(pairs: Pairs, kind: str, tmp_path: Path) -> None:
    ill = pairs("llama").copy(tmp_path / "ill")
    path = ill / "tokenizer.json"
    content = json.loads(path.read_text())
    if kind == "bpe":
        content["model"]["vocab"]["extra"] = 96
    elif kind == "unigram":
        content["model"]["vocab"] = [[f"token {number}", 0.0] for number in range(97)]
    else:
        content["added_tokens"].append({"id": 96, "content": "extra"})
    path.write_text(json.dumps(content))
    diagnosis = reshard.doctor(ill, base=pairs("llama").base)
    assert names(diagnosis) == ["tokenizer-too-large"]
    told = evidence(diagnosis, "tokenizer-too-large")
    assert told == "tokenizer.json has ids up to 96, but model.embed_tokens.weight has only 96 rows"
    assert not diagnosis.errors


def test_a_tokenizer_that_is_as_large_in_the_base(pairs: Pairs, tmp_path: Path) -> None:
    """As released with gemma-3-1b-it, whose tokenizer has one token more than the embedding."""
    pair = pairs("llama")
    for place in (pair.base, pair.healthy):
        folder = tmp_path / place.name
        models.Pair("", place, place).copy(folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        content["model"]["vocab"]["extra"] = 96
        (folder / "tokenizer.json").write_text(json.dumps(content))
    assert names(reshard.doctor(tmp_path / "healthy", base=tmp_path / "base")) == []


def test_weights_wider_than_the_config_says(pairs: Pairs, tmp_path: Path) -> None:
    """As `from_pretrained` of transformers 4 without a dtype writes them."""
    pair = pairs("llama")
    ill = pair.copy(tmp_path / "ill")
    models.save(ill, {name: value.float() for name, value in models.load(ill).items()})
    diagnosis = repaired(ill, pair.base, tmp_path / "rounded", "dtype-contradicts-config")
    told = evidence(diagnosis, "dtype-contradicts-config")
    assert told == "config.json says bfloat16, but 100% of the weights are float32"
    assert not diagnosis.errors
    models.assert_same_weights(tmp_path / "rounded", pair.healthy)
    repaired(ill, None, tmp_path / "kept", "dtype-contradicts-config")
    assert models.loaded(tmp_path / "kept").dtype == torch.float32
    models.assert_same_model(tmp_path / "kept", pair.healthy)


def test_a_config_of_another_dtype_than_weights_and_base(pairs: Pairs, tmp_path: Path) -> None:
    pair = pairs("qwen2_5_vl")
    ill = pair.copy(tmp_path / "ill")
    edit_config(ill, dtype=None, torch_dtype="float16")
    repaired(ill, pair.base, tmp_path / "out", "dtype-contradicts-config")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    models.assert_same_weights(tmp_path / "out", pair.healthy)


def test_a_few_wider_tensors_are_sound_and_codes_are_not_where_none_are(
    pairs: Pairs, tmp_path: Path
) -> None:
    pair = pairs("mixtral")
    folder = pair.copy(tmp_path / "model")
    tensors = models.load(folder)
    wide = {name: value.float() for name, value in tensors.items() if ".gate." in name}
    assert wide
    models.save(folder, {**tensors, **wide})
    assert names(reshard.doctor(folder)) == []
    edit_config(folder, dtype="float16", quantization_config={"quant_method": "fp8"})
    assert names(reshard.doctor(folder)) == ["quantisation-contradicts-config"]
