"""Small files that a run keeps beside its save: a schedule, counters, the user's state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reshard.containers.torch import read as read_torch
from reshard.containers.torch.plain import PlainData
from reshard.core.regex import regex
from reshard.core.state import Plain
from reshard.errors import FormatError, IncompleteError
from reshard.storage import strict_json
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file, listing

_SCHEDULERS = ("scheduler_state.pt", "scheduler.pt", "scheduler.bin")
_TRAINER = "trainer_state.json"
# accelerate 1.15 (utils/constants.py, checkpointing.py), transformers 5 (trainer.py).
_OWN_FILES = {
    "random numbers": regex(r"(random_states|rng_state)(_\d+)?\.(pkl|pth)"),
    "the loss scale": regex(r"scaler\.pt"),
    "the place in the data": regex(r"(sampler|dl_state_dict|dataloader)(_\d+)?\.(bin|pt)"),
}


def read_run_file(path: Path, sources: Sources) -> object:
    """What such a file of torch.save holds. Raises as `undamaged` does."""
    with undamaged(path):
        return read_torch(sources.open(path)).value


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Raise `FormatError`, whose hint says what to do, where a file of the run is damaged.

    Without it, the run would silently start its schedule, or its data, from the beginning.
    """
    try:
        yield
    except (FormatError, IncompleteError) as error:
        raise FormatError(
            f"it is damaged: {error.message}",
            path=path,
            hint="Copy the file again. If the run can start this part of its state anew, move "
            "the file away.",
        ) from None


def scheduler(folder: Path, plain: PlainData) -> dict[str, Plain] | None:
    """The state of the schedule that lies in a folder. Raises as `undamaged` does."""
    for name in _SCHEDULERS:
        if is_file(folder / name):
            found = plain.state_dict(read_run_file(child(folder, name), plain.sources), name)
            if found is not None:
                return found
    return None


def leave_files(folder: Path, plain: PlainData) -> None:
    """List the files of a run that are known, and that no other framework takes."""
    for path in listing(folder):
        what = next((what for what, name in _OWN_FILES.items() if name.fullmatch(path.name)), None)
        if what is not None and is_file(path):
            plain.leave(f"{path.name} ({what})")


def trainer_counters(folder: Path) -> dict[str, int]:
    """The HF Trainer's step, from trainer_state.json. Raises as `undamaged` does."""
    if not is_file(folder / _TRAINER):
        return {}
    path = child(folder, _TRAINER)
    with undamaged(path):
        step = strict_json.read_file(path).get("global_step")
    return {"global_steps": step} if type(step) is int else {}
