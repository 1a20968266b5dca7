<<<<<<< HEAD
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
=======
"""Small files that a run keeps beside its save: a schedule, counters, the user's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reshard.containers.torch import read as read_torch
from reshard.errors import FormatError, IncompleteError
from reshard.storage.local import Sources


def read_run_file(path: Path, sources: Sources) -> object:
    """What such a file of torch.save holds. Raises as `undamaged` does."""
    with undamaged(path):
        return read_torch(sources.open(path)).value


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raise `FormatError`, whose hint says what to do, where a file of the run is damaged.

    To go on without it would begin the schedule, or the data, anew and in silence.
    """
    try:
        yield
    except (FormatError, IncompleteError) as error:
        raise FormatError(
            f"it is damaged: {error.message}",
            path=path,
            hint="Copy the file again. If the run may begin this part of its state anew, move the "
            "file away.",
        ) from None
>>>>>>> main
