"""Broken folders: what is wrong is said, the exit code is 1, and the report is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from reshard.evaluate.report import TryReport
from tests.evaluate import tiny
from tests.evaluate.conftest import Models
from tests.evaluate.trying import attempt, named
from tests.folders import edit_config, edit_weights


def written(tmp_path: Path, report: TryReport) -> dict[str, Any]:
    """The report as it lies on disk, which must be what was returned."""
    raw: dict[str, Any] = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert raw == report.to_json()
    return raw


def test_no_folder(tmp_path: Path) -> None:
    report = attempt(tmp_path / "nowhere", tmp_path)
    assert report.exit_code == 1
    assert written(tmp_path, report)["failures"][0]["error"] == "NotFoundError"


def test_a_training_checkpoint_is_told_from_a_model(tmp_path: Path) -> None:
    report = attempt(tmp_path, tmp_path)
    assert "reshard convert" in report.failures[0].message


def test_a_shard_is_missing(tmp_path: Path) -> None:
    folder = tiny.causal(tmp_path / "model")
    LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    whole = attempt(folder, tmp_path)
    assert whole.status == "passed", (whole.failures, whole.findings)
    shards[1].unlink()
    report = attempt(folder, tmp_path)
    failure = report.failures[0]
    assert report.exit_code == 1
    assert failure.error == "IncompleteError"
    assert f"1 of {len(shards)} weight files are missing: {shards[1].name}" in failure.message
    assert written(tmp_path, report)["model"] is None


@pytest.mark.parametrize("size", [4, 100, 20000])
def test_a_file_is_cut_short(copied: Models, tmp_path: Path, size: int) -> None:
    folder = copied("causal")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    report = attempt(folder, tmp_path)
    assert [failure.error for failure in report.failures] == ["IncompleteError"]
    assert "model.safetensors" in report.failures[0].message


def test_the_index_names_a_file_outside(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    report = attempt(folder, tmp_path)
    assert "not a plain file name" in report.failures[0].message


def test_the_config_is_another_models(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_config(folder, hidden_size=64, intermediate_size=96)
    report = attempt(folder, tmp_path)
    failure = report.failures[0]
    assert (report.exit_code, failure.stage, failure.error) == (1, "load the model", "NamesError")
    assert "lm_head.weight is [260, 32] in the files, [260, 64] by the config" in failure.message
    assert not report.answers


def test_the_config_is_another_family(copied: Models, models: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    other = (models("llava") / "config.json").read_text()
    edit_config(folder, **json.loads(other))
    edit_config(folder, text_config={**json.loads(other)["text_config"], "vocab_size": 260})
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert named(report, "weights-missing").severity == "error"


def test_the_config_has_fewer_layers(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_config(folder, num_hidden_layers=1)
    report = attempt(folder, tmp_path)
    finding = named(report, "weights-unexpected")
    assert finding.evidence["count"] == 9
    assert report.exit_code == 1


def test_a_weight_is_missing(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")

    def lose_one(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]

    edit_weights(folder, lose_one)
    report = attempt(folder, tmp_path)
    finding = named(report, "weights-missing")
    assert finding.evidence == {"count": 1, "tensors": ["model.layers.1.mlp.up_proj.weight"]}
    assert report.exit_code == 1
    assert len(report.answers) == 2


def test_the_tokenizer_is_missing(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert [failure.stage for failure in report.failures] == ["load the tokenizer"]
    # What could be done without it was done.
    assert report.model is not None
    raw = written(tmp_path, report)
    assert raw["model"]["parameters"] > 0
    assert raw["answers"] == []


def test_nan_weights(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")

    def break_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][3, 5:8] = torch.nan
        tensors["model.norm.weight"][0] = torch.inf

    edit_weights(folder, break_one)
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert named(report, "weights-not-finite").evidence == {
        "count": 2,
        "tensors": {
            "model.layers.0.mlp.down_proj.weight": {"nan": 3, "infinite": 0},
            "model.norm.weight": {"nan": 0, "infinite": 1},
        },
    }
    assert named(report, "logits-not-finite").severity == "error"
    written(tmp_path, report)


def test_nan_in_the_head_of_a_reward_model(copied: Models, tmp_path: Path) -> None:
    folder = copied("srm_al")
    path = folder / "reward_head.safetensors"
    tensors = load_file(path)
    tensors["preference_head.3.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert "preference_head.3.weight" in str(named(report, "weights-not-finite").evidence)
    assert written(tmp_path, report)["scores"][0]["scores"] == {"preference": None}


def test_a_broken_template_fails_each_prompt_and_says_so(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    report = attempt(folder, tmp_path)
    assert [failure.stage for failure in report.failures] == [
        "answer prompt 1 of 2",
        "answer prompt 2 of 2",
    ]
    assert all("no users here" in str(answer.error) for answer in report.answers)
    assert report.failures[0].traceback is not None
    assert attempt(folder, tmp_path, chat=False).status == "passed"


def test_the_class_is_unknown(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_config(folder, architectures=["LlamaOfTheFutureForCausalLM"])
    report = attempt(folder, tmp_path)
    assert "no class LlamaOfTheFutureForCausalLM" in report.failures[0].message


def test_a_bare_backbone_is_refused(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    edit_config(folder, architectures=["LlamaModel"])
    report = attempt(folder, tmp_path)
    assert "LlamaModel neither generates" in report.failures[0].message


REMOTE_CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
REMOTE_MODEL = """
from pathlib import Path
from transformers import LlamaForCausalLM
from .own_config import OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        Path({mark!r}).touch()
"""


def test_remote_code_runs_only_when_it_is_trusted(
    copied: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    folder, mark = copied("causal"), tmp_path / "the code ran"
    (folder / "own_config.py").write_text(REMOTE_CONFIG)
    (folder / "own_model.py").write_text(REMOTE_MODEL.format(mark=str(mark)))
    edit_config(
        folder,
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "own_config.OwnConfig",
            "AutoModelForCausalLM": "own_model.OwnForCausalLM",
        },
    )
    report = attempt(folder, tmp_path)
    assert report.exit_code == 1
    assert not mark.exists()
    assert any("--trust-remote-code" in failure.message for failure in report.failures)
    trusted = attempt(folder, tmp_path, trust_remote_code=True)
    assert trusted.status == "passed", (trusted.failures, trusted.findings)
    assert mark.exists()


def test_weights_that_are_not_safetensors_are_said_to_be(copied: Models, tmp_path: Path) -> None:
    folder = copied("causal")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    report = attempt(folder, tmp_path)
    assert report.status == "passed", (report.failures, report.findings)
    assert named(report, "weights-not-safetensors").severity == "warning"


def test_a_device_that_is_not_there(models: Models, tmp_path: Path) -> None:
    report = attempt(models("causal"), tmp_path, device="flux:7")
    assert report.exit_code == 1
    assert "'flux:7' cannot be used" in report.failures[0].message
