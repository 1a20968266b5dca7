"""verl's optimizers: one file a rank, its moments sharded as the model's parameters are.

    model_world_size_2_rank_0.pt         {name: DTensor}
    optim_world_size_2_rank_0.pt         {"state": {0: {"exp_avg": DTensor, ..}, ..},
                                          "param_groups": [{"params": [0, 1], ..}]}
    extra_state_world_size_2_rank_0.pt   {"lr_scheduler": .., "rng": ..}

Parameters go by numbers. Whose a number is, the shapes and the order of the model's parameters say,
or nothing does (`reshard.naming.order`). FSDP1 keeps moments flattened, which have no shape.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.distributed import Decoder, Local, is_distributed
from reshard.containers.torch import Opaque, TensorRef
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.optimizer import Key, OptimizerDict, parse
from reshard.containers.torch.plain import PlainData
from reshard.core.findings import state_named_by_order
from reshard.core.state import WEIGHTS_ALONE, Group, Plain, ReadState, TrainingState, tensor_name
from reshard.core.tensors import Entry
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats.optimizer_file import names_in_order
from reshard.formats.rank_files import join
from reshard.formats.rank_files.files import Saved
from reshard.formats.rank_files.state import State
from reshard.formats.run_files import read_run_file
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file

_MODEL, _OPTIMIZER, _EXTRA = "model_world_size_", "optim_world_size_", "extra_state_world_size_"
_ONE_SAVE = "Copy the files of all ranks again, from one save."


def reader(saved: Saved, entries: Mapping[str, Entry], sources: Sources) -> ReadState | None:
    """What reads the state beside the ranks' model files; None where there is none."""
    files = {rank: _beside(path, _OPTIMIZER) for rank, path in saved.files.items()}
    there = {rank: path for rank, path in files.items() if path is not None and is_file(path)}
    if not there:
        return None

    def read() -> TrainingState:
        lost = sorted(files.keys() - there.keys())
        if lost:
            raise IncompleteError(
                f"the optimizer's file of rank {lost[0]} is missing, although other ranks have "
                "theirs.",
                path=saved.folder,
                hint=_ONE_SAVE,
            )
        plain = PlainData(sources)
        return _read(replace(saved, files=there), entries, plain)

    return ReadState(read)


def _beside(model: Path, prefix: str) -> Path | None:
    """The file of the same rank with another prefix; None where it is not named as verl names."""
    if not model.name.startswith(_MODEL):
        return None
    return model.with_name(prefix + model.name.removeprefix(_MODEL))


def _read(saved: Saved, entries: Mapping[str, Entry], plain: PlainData) -> TrainingState:
    found: list[OptimizerDict] = []
    states: list[State] = []
    for rank, path in sorted(saved.files.items()):
        content = read_torch(plain.sources.open(child(saved.folder, path.name)))
        one = parse(content.value, plain, path)
        found.append(one)
        tensors = _tensors(one, Decoder(str(path), rank, plain.sources), path, len(saved.files))
        records = tuple(sorted(content.records, key=lambda record: record.extent.offset))
        states.append(State(path, rank, tensors, records))
    first = found[0]
    _check_same(found, states)
    table = join.joined(states, saved, plain.sources)
    names = _names(first, table.entries, entries, states[0].path)
    moments: dict[str, dict[str, Entry]] = {}
    for key, name in names.items():
        for kind in first.states[key].moments if key in first.states else ():
            entry = table.entries[tensor_name(kind, str(key))]
            moments.setdefault(kind, {})[name] = entry.renamed(name)
    steps = {names[key]: state.step for key, state in first.states.items() if key in names}
    scheduler = _scheduler(saved, plain)
    return TrainingState(
        moments=moments,
        steps={name: step for name, step in steps.items() if step is not None},
        groups=tuple(
            Group(tuple(names[key] for key in group.params), group.hyperparameters)
            for group in first.groups
        ),
        scheduler=scheduler,
        left_out=tuple(plain.left_out),
        records=table.records,
        findings=(state_named_by_order(len(names)), *table.findings),
        source="files of each rank",
    )


def _tensors(
    one: OptimizerDict, decoder: Decoder, path: Path, world: int
) -> dict[str, TensorRef | Local]:
    """A rank's moments by kind and number."""
    tensors: dict[str, TensorRef | Local] = {}
    for key, state in one.states.items():
        for kind, value in state.moments.items():
            name = tensor_name(kind, str(key))
            if isinstance(value, Opaque) and is_distributed(value):
                tensors[name] = decoder.decode(name, value)
            elif isinstance(value, TensorRef) and world == 1:
                tensors[name] = value
            else:
                what = (
                    "flattened, as FSDP1 keeps it"
                    if isinstance(value, TensorRef)
                    else value.describe()
                )
                raise UnsupportedError(
                    f"the {kind} of parameter {key} is {what}, and no file "
                    "says how the ranks share it.",
                    path=path,
                    hint=WEIGHTS_ALONE,
                )
    return tensors


def _check_same(found: Sequence[OptimizerDict], states: Sequence[State]) -> None:
    """All ranks must have the same groups and steps."""
    first = found[0]
    for other, state in zip(found[1:], states[1:], strict=True):
        same = other.groups == first.groups and _steps(other) == _steps(first)
        if not same:
            raise FormatError(
                f"its optimizer's groups or steps are not those of {states[0].path.name}: files "
                "of different saves are mixed.",
                path=state.path,
                hint=_ONE_SAVE,
            )


def _steps(one: OptimizerDict) -> dict[Key, int | None]:
    return {key: None if s.step is None else s.step.count for key, s in one.states.items()}


def _names(
    first: OptimizerDict, moments: Mapping[str, Entry], entries: Mapping[str, Entry], path: Path
) -> dict[Key, str]:
    """The name of each number."""

    def shape(key: Key) -> Hashable:
        kinds = first.states[key].moments if key in first.states else {}
        found = [moments[tensor_name(kind, str(key))].spec.shape for kind in kinds]
        return found[0] if found else None

    model = [(name, entry.spec.shape) for name, entry in entries.items() if entry.kind != "buffer"]
    return names_in_order(first, shape, model, path)


def _scheduler(saved: Saved, plain: PlainData) -> dict[str, Plain] | None:
    """The schedule of the first rank's extra state; what else is in it does not travel."""
    name = saved.files[min(saved.files)].name.replace(_OPTIMIZER, _EXTRA, 1)
    if not is_file(saved.folder / name):
        return None
    value = read_run_file(child(saved.folder, name), plain.sources)
    held = value if isinstance(value, dict) else {}
    for key in held:
        if key != "lr_scheduler":
            plain.leave(f"{key} ({name})")
    return plain.state_dict(held.get("lr_scheduler"), "lr_scheduler") or None
