"""Scalar reward exports: scores against an independent model, and folders that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from reshard.errors import FormatError, IncompleteError, NamesError
from reshard.evaluate.reward import load_reward, pool_attention, pool_last
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt


def _head(tensors: dict[str, torch.Tensor], name: str) -> Any:
    """The head as LightRFT builds it: a Sequential whose indices are the names' numbers."""
    width = tiny.HIDDEN
    head = nn.Sequential(
        nn.Linear(width, width),
        nn.RMSNorm(width),
        nn.SiLU(),
        nn.Linear(width, 1, bias=False),
        nn.Sigmoid(),
    )
    prefix = f"{name}_head."
    head.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if prefix in k})
    return head


def _attention(tensors: dict[str, torch.Tensor], name: str, states: torch.Tensor) -> torch.Tensor:
    """Attention pooling by PyTorch's own attention: 4 heads, one query."""

    def split(value: torch.Tensor) -> torch.Tensor:
        return value.reshape(1, -1, 4, tiny.HIDDEN // 4).transpose(1, 2)

    query, key, value = (
        tensors[f"{name}_attnpool.{part}"] for part in ("query", "k.weight", "v.weight")
    )
    pooled = nn.functional.scaled_dot_product_attention(
        split(query[None]), split(states @ key.T), split(states @ value.T)
    )
    return pooled.transpose(1, 2).reshape(1, -1)


def test_vision_scores_are_those_of_the_trained_model(models: Models, tmp_path: Path) -> None:
    folder = models("srm_vl")
    report = attempt(folder, tmp_path)
    assert report.status == "passed", (report.failures, report.findings)
    assert report.model is not None
    assert report.model.architecture == "Qwen2_5_VLModel"
    backbone = transformers.AutoModel.from_pretrained(folder)
    tensors = load_file(folder / "reward_head.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for scored in report.scores:
        ids = tokenizer(scored.rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
        positions = torch.arange(ids.shape[1])[None]
        with torch.no_grad():
            output = backbone(ids, position_ids=positions, output_hidden_states=True)
            # Two layers: -1 is hidden_states[1], the input of the last layer.
            states = output.hidden_states[1]
            expected = {
                name: float(_head(tensors, name)(_attention(tensors, name, states[0])))
                for name in ("preference", "alignment")
            }
        assert scored.scores == pytest.approx(expected, abs=1e-5)


def test_audio_scores_use_the_last_token(models: Models, tmp_path: Path) -> None:
    folder = models("srm_al")
    sound = tiny.tone(tmp_path / "tone.wav")
    report = attempt(folder, tmp_path, audio=(sound,))
    assert report.status == "passed", (report.failures, report.findings)
    silent = attempt(folder, tmp_path)
    backbone = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    tensors = load_file(folder / "reward_head.safetensors")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for scored, heard in zip(silent.scores, report.scores, strict=True):
        ids = tokenizer(scored.rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            states = backbone(ids, output_hidden_states=True).hidden_states[1]
            expected = float(_head(tensors, "preference")(states[:, -1]))
        assert scored.scores == {"preference": pytest.approx(expected, abs=1e-5)}
        assert heard.scores != scored.scores


def test_padding_does_not_change_a_score() -> None:
    torch.manual_seed(0)
    states = torch.randn(1, 5, 32)
    query, key, value = torch.randn(32), torch.randn(32, 32), torch.randn(32, 32)
    padded = torch.cat([torch.randn(1, 3, 32), states], dim=1)
    mask, longer = torch.ones(1, 5), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    one = pool_attention(states, mask, query, key, value, 4)
    other = pool_attention(padded, longer, query, key, value, 4)
    torch.testing.assert_close(one, other)
    assert torch.equal(pool_last(padded, longer), states[:, -1])
    right = torch.cat([states, torch.randn(1, 2, 32)], dim=1)
    assert torch.equal(pool_last(right, torch.tensor([[1, 1, 1, 1, 1, 0, 0]])), states[:, -1])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("pooling_method", "mean", "pooling_method"),
        ("head_types", [], "head_types"),
        ("probing_layer", 9, "probing_layer"),
        ("probing_layer", True, "probing_layer"),
        ("hidden_size", 64, "backbone's is 32"),
        ("num_heads", 5, "multiple"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    copied: Models, tmp_path: Path, field: str, value: object, words: str
) -> None:
    folder = copied("srm_al")
    path = folder / "reward_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert report.failures[0].error == FormatError.__name__
    assert words in report.failures[0].message


def test_heads_that_are_not_the_configs_are_listed(copied: Models) -> None:
    folder = copied("srm_al")
    path = folder / "reward_head.safetensors"
    tensors = load_file(path)
    backbone = transformers.Qwen2AudioForConditionalGeneration.from_pretrained(folder)
    lost = tensors.pop("preference_head.0.bias")
    save_file(tensors, path)
    with pytest.raises(NamesError, match=r"preference_head\.0\.bias \[32\]") as caught:
        load_reward(folder, backbone)
    assert caught.value.missing == ("preference_head.0.bias",)
    # A scale is used in training only: its presence is no contradiction.
    scale = torch.ones(1)
    save_file({**tensors, "preference_head.0.bias": lost, "preference_logit_scale": scale}, path)
    assert "preference_logit_scale" not in load_reward(folder, backbone).tensors
    path.unlink()
    with pytest.raises(IncompleteError, match="lacks its heads"):
        load_reward(folder, backbone)
