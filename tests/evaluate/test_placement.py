"""A model that accelerate spread over devices: GPUs as they would be, or the CPU and the disk."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reshard.evaluate import run as running
from reshard.evaluate.device import Placement, place
from reshard.evaluate.loading import _first_device
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt

# The second layer stays on the disk; accelerate fetches it for each step, as it moves the hidden
# states from one GPU to the next.
SPREAD: dict[str, dict[str, str]] = {
    "causal": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    },
    "classifier": {
        "model.embed_tokens": "cpu",
        "model.layers.0": "disk",
        "model.layers.1": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "score": "cpu",
    },
}


@pytest.fixture(params=SPREAD)
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model's name; it is loaded as its map says, whatever device is asked for."""
    name: str = request.param
    monkeypatch.setattr(running, "place", lambda *_: Placement(SPREAD[name], "cpu"))
    return name


def test_a_spread_model_answers_as_one_in_one_place(
    models: Models, tmp_path: Path, spread: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = attempt(models(spread), tmp_path, benchmark=spread == "causal", batch_sizes=(1, 2))
    assert there.status == "passed", (there.failures, there.findings)
    assert there.model is not None
    assert there.model.devices == ("cpu", "meta")
    monkeypatch.setattr(running, "place", place)
    here = attempt(models(spread), tmp_path)
    assert there.model.parameters == here.model.parameters if here.model else False
    assert [a.token_ids for a in there.answers] == [a.token_ids for a in here.answers]
    assert [s.scores for s in there.scores] == [s.scores for s in here.scores]
    assert there.answers or there.scores


def test_a_spread_model_is_compared(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "place", lambda *_: Placement(SPREAD["causal"], "cpu"))
    report = attempt(models("causal"), tmp_path, compare=models("other"))
    assert report.comparison is not None, report.failures
    assert report.comparison.verdict == "another model"
    assert report.comparison.logits is not None


class TestGpusThatAreNotThere:
    @pytest.fixture(autouse=True)
    def two(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two GPUs with 10 GB free on each."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 << 30, 16 << 30))

    def test_what_fits_stays_on_the_first(self) -> None:
        assert place("cuda", 8 << 30) == Placement({"": "cuda:0"}, "cuda:0")

    def test_what_does_not_is_spread_over_all(self) -> None:
        spread = place("cuda", 9 << 30)
        assert spread.device_map == "auto"
        assert spread.note == "The weights are spread over 2 GPUs."

    def test_auto_is_accelerates_choice(self) -> None:
        assert place("auto", 1).device_map == "auto"


@pytest.mark.parametrize(("device", "named"), [(1, "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0")])
def test_inputs_go_to_where_the_model_begins(device: int | str, named: str) -> None:
    model = SimpleNamespace(
        hf_device_map={"a": 0, "b": 1}, _hf_hook=SimpleNamespace(execution_device=device)
    )
    assert _first_device(model) == named
    assert _first_device(SimpleNamespace(hf_device_map={"": 0})) is None
