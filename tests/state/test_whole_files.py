"""Optimizers in one torch.save file, beside the model or with it: the HF Trainer's, a script's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import reshard
from reshard.errors import FormatError, UnsupportedError
from tests.state import model as models
from tests.state.cases import opened
from tests.state.jobs import Job
from tests.state.test_writing import loaded
from tests.tensors import raw

Live = dict[str, dict[str, torch.Tensor]]
JOB = Job("fsdp2", 1, "", (1, 3))


def live_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Live:
    """What the live optimizer holds, by the live names."""
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def check(folder: Path, live: Live, source: str) -> None:
    """Every moment and step read is the live optimizer's."""
    with opened(folder) as found:
        state = found.state
        assert state.source == source
        for kind in ("exp_avg", "exp_avg_sq"):
            assert state.moments[kind].keys() == live.keys()
            for name, entry in state.moments[kind].items():
                assert found.stored(entry).data == raw(live[name][kind]), name
        assert {n: s.count for n, s in state.steps.items()} == {
            n: int(s["step"]) for n, s in live.items()
        }


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Live]:
    """A run of the real HF Trainer on one process: its last checkpoint, and the live state."""
    from transformers import Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer")
    model = models.build("qwen2")
    rows = [{"input_ids": row, "labels": row} for row in models.batch(1, 0, 1)]
    arguments = TrainingArguments(
        str(folder), max_steps=3, save_steps=3, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, weight_decay=0.1, learning_rate=1e-2, optim="adamw_torch",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    optimizer: Any = trainer.optimizer
    return folder / "checkpoint-3", live_state(model, getattr(optimizer, "optimizer", optimizer))


def test_the_hf_trainers_numbers_are_named_by_the_models_order(
    trainers: tuple[Path, Live], tmp_path: Path
) -> None:
    folder, live = trainers
    check(folder, live, "optimizer.pt")
    with opened(folder) as found:
        state = found.state
        assert state.counters == {"global_steps": 3}
        assert state.scheduler is not None
        assert state.scheduler["last_epoch"] == 3
        assert [f.code for f in state.findings] == ["state-named-by-order"]
        assert [g.hyperparameters["weight_decay"] for g in state.groups] == [0.1, 0.0]
        assert all(len(live[n]["exp_avg"].shape) == 1 for n in state.groups[1].names)
    assert reshard.convert(folder, tmp_path / "out", to="deepspeed").verified
    report = reshard.convert(folder, tmp_path / "dcp", to="dcp", optimizer=True)
    assert report.verified
    written = loaded(tmp_path / "dcp" / "optim_states")
    for name, state in written["state"].items():
        assert torch.equal(state["exp_avg"], live[name]["exp_avg"])
    assert reshard.verify(tmp_path / "dcp", against=folder).num_tensors >= 2 * len(live)


def test_numbers_in_an_order_that_nothing_tells(
    trainers: tuple[Path, Live], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trainers[0], tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    order = pytest.raises(UnsupportedError, match="numbers its parameters in the model's order")
    with order as caught, opened(folder):
        pass
    assert caught.value.hint == "Convert the weights alone, without --optimizer."
    assert reshard.convert(folder, tmp_path / "out", to="dcp").verified
    # The same in the order of the model's own file is named.
    torch.save(load_ordered(trainers[0]), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check(folder, trainers[1], "optimizer.pt")


def load_ordered(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in the order of the live module."""
    weights = load_file(folder / "model.safetensors")
    return {name: weights[name] for name, _ in models.build("qwen2").named_parameters()}


def trained() -> tuple[Any, torch.optim.Optimizer, Any]:
    model = models.build("llama")
    optimizer = models.optimizer(model, JOB)
    schedule = models.schedule(optimizer)
    for step in (1, 2):
        ids = models.batch(step, 0, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


def test_a_script_that_saves_all_in_one_file(tmp_path: Path) -> None:
    model, optimizer, schedule = trained()
    path = tmp_path / "last.pt"
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 1,
    }
    torch.save(content, path)
    live = live_state(model, optimizer)
    check(path, live, "last.pt")
    with opened(path) as found:
        assert found.state.scheduler is not None
        assert found.state.scheduler["last_epoch"] == 2
        assert found.state.moments["exp_avg"].keys() == live.keys()
    report = reshard.convert(path, tmp_path / "out", to="deepspeed")
    assert report.state is not None
    torch.save({**content, "optimizer_d": content["optimizer"]}, path)
    with pytest.raises(UnsupportedError, match="several optimizers"), opened(path):
        pass
    assert reshard.convert(path, tmp_path / "weights", to="dcp").verified


def test_names_of_another_model_are_refused(tmp_path: Path) -> None:
    """As FULL_STATE_DICT has names, what it names must be there."""
    model, optimizer, _ = trained()
    run = tmp_path / "run"
    run.mkdir()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    state = optimizer.state_dict()
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    order = {id(p): n for n, p in model.named_parameters()}
    own = [order[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(own) == sorted(names)
    by_number = dict(zip(numbers, own, strict=True))

    def save(prefix: str) -> None:
        renamed = {n: f"{prefix}{name}" for n, name in by_number.items()}
        torch.save(
            {
                "state": {renamed[n]: value for n, value in state["state"].items()},
                "param_groups": [
                    {**group, "params": [renamed[n] for n in group["params"]]}
                    for group in state["param_groups"]
                ],
            },
            run / "optimizer.bin",
        )

    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_file(weights, run / "model.safetensors", {"format": "pt"})
    save("")
    check(run, live_state(model, optimizer), "optimizer.bin")
    save("critic.")
    with pytest.raises(FormatError, match="that the model does not have"), opened(run):
        pass
    assert reshard.convert(run, tmp_path / "out", to="dcp").verified
