"""What frameworks put beside a model's DCP checkpoint: its optimizer, schedule and counters.

    LightRFT     global_stepN/optim_states/, scheduler_state.pt, client_state.pt
    accelerate   checkpoint-N/optimizer_0/, scheduler.pt (the HF Trainer), scheduler.bin;
                 the model in pytorch_model_fsdp_0/
    torchtitan   in the save itself: lr_scheduler.last_epoch, train_state.step

The HF Trainer keeps the step of the run in trainer_state.json.
"""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from reshard.containers.dcp.chunked import find_tensors, scalar
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.objects import read_object
from reshard.containers.torch.plain import PlainData, number
from reshard.core.regex import regex
from reshard.core.state import Plain, TrainingState
from reshard.errors import UnsupportedError
from reshard.formats import OPTIMIZER, run_files
from reshard.formats.dcp.lightrft import CLIENT_STATE
from reshard.formats.dcp.save import ACCELERATE_MODEL, METADATA, is_of_a_save
from reshard.storage.local import child
from reshard.storage.paths import exists, is_file, is_folder, listing

_RANK = regex(r"_?rank_?\d+(\.pt)?")
_SCHEDULER_PART = regex(r"(lr_)?schedulers?(_\d+)?")


def optimizer_folders(folder: Path) -> list[Path]:
    """The folders of optimizers' saves, finished or not: those below the model's folder, or the
    one beside it with its number."""
    below = [path for path in listing(folder) if _is_optimizer(path)]
    model = ACCELERATE_MODEL.fullmatch(folder.name)
    if below or model is None:
        return below
    beside = folder.parent / f"optimizer_{model[1]}"
    return [beside] if _is_optimizer(beside) else []


def number_of(folder: Path) -> int:
    """Which of accelerate's models a folder is that of; others are the first."""
    model = ACCELERATE_MODEL.fullmatch(folder.name)
    return int(model[1]) if model else 0


def above_of(folder: Path) -> Path:
    """The folder in which the files of a run lie beside its model's."""
    return folder.parent if ACCELERATE_MODEL.fullmatch(folder.name) else folder


def _is_optimizer(path: Path) -> bool:
    """An empty folder is that of a save which was begun; one of other files is somebody's notes."""
    if not OPTIMIZER.fullmatch(path.name) or not is_folder(path):
        return False
    names = [inside.name for inside in listing(path)]
    return not names or any(is_of_a_save(name) or _RANK.fullmatch(name) for name in names)


def refuse_rank_files(folder: Path) -> None:
    """Raise `UnsupportedError` where each rank saved its own optimizer, as LightRFT does with
    `--use_mp_opt`."""
    ranks = [path for path in listing(folder) if _RANK.fullmatch(path.name)]
    if ranks and not exists(folder / METADATA):
        raise UnsupportedError(
            f"each rank saved its own optimizer state ({ranks[0].name}), with numbers instead of "
            "names: no file states which parameters the state belongs to.",
            path=folder,
            hint="Convert the weights alone, without --optimizer; or save once without "
            "--use_mp_opt.",
        )


def run_state(
    state: TrainingState, folder: Path, metadata: Metadata, plain: PlainData
) -> TrainingState:
    """The state with the schedule, counters and the user's state that lie beside it."""
    above = above_of(folder)
    scheduler = run_files.scheduler(above, plain) or _scheduler_part(folder, metadata, plain)
    client: dict[str, Plain] = {}
    if is_file(above / CLIENT_STATE):
        client = plain.mapping(
            run_files.read_run_file(child(above, CLIENT_STATE), plain.sources), "client_state"
        )
    run_files.leave_files(above, plain)
    counters = _titan_counters(folder, metadata, plain) | run_files.trainer_counters(above)
    return replace(
        state,
        scheduler=scheduler,
        client_state=client,
        counters=counters,
        left_out=(*state.left_out, *plain.left_out),
    )


def _scheduler_part(folder: Path, metadata: Metadata, plain: PlainData) -> dict[str, Plain] | None:
    """A scheduler in the save itself; only settings at its top are taken."""
    found: dict[str, Plain] = {}
    known: dict[bytes, Plain] = {}
    for key, copies in metadata.objects.items():
        path = metadata.paths[key]
        if len(path) == 2 and _SCHEDULER_PART.fullmatch(path[0]) and copies:
            found[path[1]] = read_object(key, copies[0], folder, plain, known)
    return found or None


def _titan_counters(folder: Path, metadata: Metadata, plain: PlainData) -> dict[str, int]:
    """`train_state.step` and its like, which torchtitan saves as tensors without dimensions."""
    keys = {
        key: key
        for key, tensor in metadata.tensors.items()
        if metadata.paths[key][:1] == ("train_state",)
        and len(metadata.paths[key]) == 2
        and tensor.shape == ()
    }
    entries = find_tensors(keys, {}, metadata, folder, plain.sources)[0] if keys else {}
    counters = {}
    for key, entry in entries.items():
        value = number(scalar(entry), plain.sources)
        if isinstance(value, int):
            counters[metadata.paths[key][1]] = value
    return counters
