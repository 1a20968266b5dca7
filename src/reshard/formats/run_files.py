"""What frameworks put beside a model's files, whatever the format: a schedule, a step count."""

from __future__ import annotations

from pathlib import Path

from reshard.containers.torch import read as read_torch
from reshard.containers.torch.plain import PlainData
from reshard.core.state import Plain
from reshard.errors import ReshardError
from reshard.storage import strict_json
from reshard.storage.local import child
from reshard.storage.paths import is_file

_SCHEDULERS = ("scheduler_state.pt", "scheduler.pt", "scheduler.bin")
_TRAINER = "trainer_state.json"


def scheduler(folder: Path, plain: PlainData) -> dict[str, Plain] | None:
    """The state of the schedule that lies in a folder; what cannot be read is listed."""
    for name in _SCHEDULERS:
        if is_file(folder / name):
            try:
                value = read_torch(plain.sources.open(child(folder, name))).value
            except ReshardError:
                plain.leave(f"{name} (cannot be read)")
                return None
            found = plain.state_dict(value, name)
            if found is not None:
                return found
    return None


def trainer_counters(folder: Path) -> dict[str, int]:
    """The HF Trainer's step, from trainer_state.json."""
    if not is_file(folder / _TRAINER):
        return {}
    try:
        step = strict_json.read_file(child(folder, _TRAINER)).get("global_step")
    except ReshardError:
        return {}
    return {"global_steps": step} if type(step) is int else {}
