"""Head, embedding and `vocab_size`: nothing trained is paired with a stale partner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from tests.quantised import makers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
State = dict[str, torch.Tensor]


class Case:
    """A base of which head and embedding are stored, and a run from it with every tensor changed.

    tie: what the config says, None where it says nothing. equal: the base's two are the same.
    quantised: its other weights are fp8.
    """

    def __init__(self, folder: Path, tie: bool | None, *, equal: bool, quantised: bool) -> None:
        self.base, self.out, self.folder = folder / "base", folder / "out", folder
        model = makers.llama()
        if quantised:
            makers.blocks(self.base, model)
        else:
            model.save_pretrained(self.base)
        stored = load_file(self.base / "model.safetensors")
        if equal:
            stored[HEAD] = stored[EMBEDDING].clone()
        save_file(stored, self.base / "model.safetensors", {"format": "pt"})
        path = self.base / "config.json"
        config = json.loads(path.read_text())
        del config["tie_word_embeddings"]
        path.write_text(
            json.dumps(config if tie is None else {**config, "tie_word_embeddings": tie})
        )
        self.released = stored
        torch.manual_seed(1)
        self.state: State = {
            name: (value.float() + torch.randn(value.shape)).bfloat16()
            for name, value in model.state_dict().items()
        }

    def convert(self, state: Mapping[str, torch.Tensor], **options: Any) -> reshard.Report:
        torch.save(dict(state), self.folder / "run.pt")
        return reshard.convert(self.folder / "run.pt", self.out, base=self.base, **options)

    def written(self) -> State:
        found: State = load_file(self.out / "model.safetensors")
        return found

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "config.json").read_text())
        return found

    def check(self) -> None:
        """The finished folder has none of doctor's errors of these partners."""
        found = {finding.code for finding in reshard.doctor(self.out, base=self.base).findings}
        assert not found & {"head-missing", "head-contradicts-config", "vocabulary-size",
                            "quantisation-contradicts-config", "scales-left-over"}  # fmt: skip
        assert "quantization_config" not in self.config()


quantised = pytest.mark.parametrize("quantised", [False, True], ids=["plain", "fp8"])


@quantised
def test_a_silent_base_is_tied_where_its_values_are(quantised: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, None, equal=True, quantised=quantised)
    state = {name: value for name, value in case.state.items() if name != HEAD}
    case.convert(state)
    written = case.written()
    assert torch.equal(written[EMBEDDING], state[EMBEDDING])
    assert torch.equal(written[HEAD], state[EMBEDDING])
    case.check()


@quantised
@pytest.mark.parametrize("apart", [False, True])
def test_both_of_a_silent_base_are_held(quantised: bool, apart: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, None, equal=True, quantised=quantised)
    head = case.state[HEAD] if apart else case.state[EMBEDDING].clone()
    case.convert({**case.state, HEAD: head})
    assert torch.equal(case.written()[HEAD], head)
    assert torch.equal(case.written()[EMBEDDING], case.state[EMBEDDING])
    assert case.config().get("tie_word_embeddings") is (False if apart else None)
    case.check()


@quantised
@pytest.mark.parametrize("tie", [None, False])
def test_a_head_is_not_filled_beside_a_trained_embedding(
    tie: bool | None, quantised: bool, tmp_path: Path
) -> None:
    case = Case(tmp_path, tie, equal=False, quantised=quantised)
    state = {name: value for name, value in case.state.items() if name != HEAD}
    with pytest.raises(reshard.NamesError, match="--fill-from-base"):
        case.convert(state)
    with pytest.raises(reshard.PlanError, match=f"--allow {HEAD} together with --fill-from-base"):
        case.convert(state, fill_from_base=True)
    assert not case.out.exists()
    # The hint, followed: the choice names it.
    report = case.convert(state, fill_from_base=True, allow=[HEAD])
    assert report.filled == (HEAD,)
    assert torch.equal(case.written()[HEAD], case.released[HEAD])
    case.check()


@quantised
def test_a_head_is_filled_beside_the_bases_own_embedding(quantised: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, False, equal=False, quantised=quantised)
    state = {name: value for name, value in case.state.items() if name != HEAD}
    # As DeepSpeed's masters hold it: wider, and the base's once rounded.
    state[EMBEDDING] = case.released[EMBEDDING].float()
    report = case.convert(state, fill_from_base=True)
    assert report.filled == (HEAD,)
    case.check()


@quantised
def test_another_vocabulary_is_whole_or_refused(quantised: bool, tmp_path: Path) -> None:
    case = Case(tmp_path, False, equal=False, quantised=quantised)
    resized = {name: torch.randn(72, 64).bfloat16() for name in (EMBEDDING, HEAD)}
    case.convert({**case.state, **resized})
    assert case.config()["vocab_size"] == 72
    assert {case.written()[name].shape[0] for name in resized} == {72}
    case.check()
    state = {name: v for name, v in {**case.state, **resized}.items() if name != HEAD}
    case.out = tmp_path / "second"
    with pytest.raises(reshard.NamesError, match="72 rows, but 64 in the base"):
        case.convert(state, fill_from_base=True, allow=[HEAD])
    assert not case.out.exists()


@quantised
@pytest.mark.parametrize("tie", [True, None])
def test_a_tied_vocabulary_is_resized_with_its_head(
    tie: bool | None, quantised: bool, tmp_path: Path
) -> None:
    case = Case(tmp_path, tie, equal=True, quantised=quantised)
    state = {name: value for name, value in case.state.items() if name != HEAD}
    state[EMBEDDING] = torch.randn(72, 64).bfloat16()
    case.convert(state)
    assert {case.written()[name].shape[0] for name in (EMBEDDING, HEAD)} == {72}
    assert torch.equal(case.written()[HEAD], state[EMBEDDING])
    assert case.config()["vocab_size"] == 72
    case.check()


@quantised
def test_an_adapter_of_a_resized_vocabulary_lacks_its_head(quantised: bool, tmp_path: Path) -> None:
    """LoRA on the embedding: PEFT saves the resized embedding with the adapter, and no head."""
    case = Case(tmp_path, False, equal=False, quantised=quantised)
    folder = tmp_path / "adapter"
    folder.mkdir()
    module = "base_model.model.model.embed_tokens"
    query = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {
        f"{query}.lora_A.weight": torch.randn(4, 64),
        f"{query}.lora_B.weight": torch.randn(64, 4),
        f"{module}.base_layer.weight": torch.randn(72, 64).bfloat16(),
        f"{module}.lora_embedding_A": torch.randn(4, 72),
        f"{module}.lora_embedding_B": torch.randn(64, 4),
    }
    save_file(state, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["embed_tokens", "q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises((reshard.PlanError, reshard.NamesError), match="72 rows"):
        reshard.convert(folder, case.out, base=case.base, fill_from_base=True)
    assert not case.out.exists()
