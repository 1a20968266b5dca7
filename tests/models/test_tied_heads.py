"""Vocabularies of another size, and heads that are tied to the embedding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import reshard
from tests.models import released
from tests.models.test_never_silent import Case

# --- vocabulary --------------------------------------------------------------------------------


def resized(name: str, rows: int) -> dict[str, torch.Tensor]:
    """A training run's state whose vocabulary has `rows` rows."""
    state = released.in_memory("4.57", name, released.values(name, seed=1))
    vocabulary = [key for key in state if key.endswith(("embed_tokens.weight", "lm_head.weight"))]
    return state | {key: torch.randn(rows, 32) for key in vocabulary}


@pytest.mark.parametrize("rows", [90, 104])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "llava", "mixtral"])
def test_another_vocabulary_size_is_patched(name: str, rows: int, tmp_path: Path) -> None:
    case = Case(tmp_path, name, resized(name, rows))
    case.convert()
    loaded = released.load(case.out, released.class_of(name))
    assert loaded.config.get_text_config().vocab_size == rows
    assert loaded.get_input_embeddings().weight.shape == (rows, 32)
    base = released.config(name)
    inner = "text_config" if "vocab_size" in base.get("text_config", {}) else None
    changed = {key for key, value in case.config().items() if value != base[key]}
    assert changed <= {"vocab_size", inner}
    assert list(case.config()) == list(base)


def test_head_and_embedding_of_different_sizes_do_not_fit(tmp_path: Path) -> None:
    state = {**released.values("llama", seed=1), "lm_head.weight": torch.randn(100, 32)}
    case = Case(tmp_path, "llama", state)
    with pytest.raises(reshard.NamesError, match=r"lm_head\.weight: \(100, 32\) .*\(96, 32\)"):
        case.convert()


# --- tied heads --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "qwen2_5_vl_tied", "gemma3"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "copied"])
def test_a_tied_head_is_stored_once(name: str, shared: bool, tmp_path: Path) -> None:
    """Whether the save kept one tensor under two names or two copies of it."""
    state = released.in_memory("4.57", name, released.values(name, seed=1))
    embedding = next(key for key in state if key.endswith("embed_tokens.weight"))
    head = next(key for key in state if key.endswith("lm_head.weight"))
    if not shared:
        state = {**state, head: state[embedding].clone()}
    case = Case(tmp_path, name, state)
    report = case.convert()
    assert not any("lm_head" in key for key in case.written())
    assert len(report.tied) == 1
    assert case.config() == released.config(name)
    released.load(case.out, released.class_of(name))


@pytest.mark.parametrize("name", ["llama_tied", "qwen2_5_vl_tied", "gemma3"])
def test_a_head_that_was_untied_is_written(name: str, tmp_path: Path) -> None:
    state = released.in_memory("4.57", name, released.values(name, seed=1))
    head = next(key for key in state if key.endswith("lm_head.weight"))
    state = {**state, head: torch.randn(96, 32)}
    case = Case(tmp_path, name, state)
    report = case.convert()
    assert any("differs from the embedding" in warning for warning in report.warnings)
    loaded = released.load(case.out, released.class_of(name))
    assert torch.equal(loaded.get_output_embeddings().weight, state[head])
    assert torch.equal(
        loaded.get_input_embeddings().weight,
        next(value for key, value in state.items() if key.endswith("embed_tokens.weight")),
    )
    assert case.config()["tie_word_embeddings"] is False
    assert case.config().get("text_config", {}).get("tie_word_embeddings", False) is False


def test_a_base_that_says_tied_and_stores_a_head_of_its_own(tmp_path: Path) -> None:
    """InternVL's default: building the model and loading wrote the head over the embedding."""
    case = Case(tmp_path, "internvl")
    config = released.config("internvl")
    del config["tie_word_embeddings"]
    config["text_config"].pop("tie_word_embeddings", None)
    (case.base / "config.json").write_text(json.dumps(config))
    case.convert()
    written = case.written()
    for key, value in case.state.items():
        assert torch.equal(written[key], value), key


def test_a_missing_head_of_an_untied_base_is_an_error(tmp_path: Path) -> None:
    state = released.values("llama", seed=1)
    del state["lm_head.weight"]
    case = Case(tmp_path, "llama", state)
    with pytest.raises(reshard.NamesError, match=r"lm_head\.weight") as caught:
        case.convert()
    assert caught.value.missing == ("lm_head.weight",)
