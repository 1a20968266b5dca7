"""The optimizer of a model that one file holds: its whole state dict, in a file beside the model.

    pytorch_model_fsdp.bin   optimizer.bin     accelerate, FULL_STATE_DICT: names
    pytorch_model_fsdp_1.bin optimizer_1.bin   its second model
    model.safetensors        optimizer.bin     accelerate: numbers; with FSDP names
    pytorch_model.bin        optimizer.pt      the HF Trainer: numbers

or, of scripts that save all in one file, `optimizer` (`optim`, ..) beside the model's part.

Numbers count the parameters in the order in which the optimizer got them. Where the model's order
is known (a torch.save file keeps it, and that of some families is known), shapes and order give the
names, or nothing does, see `reshard.naming.order`. Read off accelerate 1.15
(`save_fsdp_optimizer`, utils/fsdp_utils.py; checkpointing.py) and transformers 5.23 (trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.torch import TensorRef
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.named import entries_of
from reshard.containers.torch.optimizer import Key, OptimizerDict, parse
from reshard.containers.torch.plain import PlainData
from reshard.core.findings import state_named_by_order
from reshard.core.state import WEIGHTS_ALONE, Group, Plain, ReadState, TrainingState
from reshard.core.tensors import Entry, Record
from reshard.errors import UnsupportedError, listed
from reshard.formats import OPTIMIZER, OPTIMIZER_KEYS, run_files
from reshard.naming.order import groups_in_order
from reshard.naming.search import unwrap
from reshard.storage.local import Sources, child
from reshard.storage.paths import is_file

_SCHEDULER_PARTS = ("lr_scheduler", "scheduler")


def beside(
    folder: Path,
    number: int,
    entries: Mapping[str, Entry],
    order: Callable[[], Sequence[str] | None],
    sources: Sources,
) -> ReadState | None:
    """What reads the state in the file beside a model's; None where there is no such file.

    `number` is the model's among several. `order` gives the parameters' names in the model's order;
    None where it is not known.
    """
    names = ("optimizer.bin", "optimizer.pt") if number == 0 else (f"optimizer_{number}.bin",)
    name = next((name for name in names if is_file(folder / name)), None)
    if name is None:
        return None

    def read() -> TrainingState:
        plain = PlainData(sources)
        path = child(folder, name)
        content = read_torch(sources.open(path))
        state = _state(content.value, path, content.records, entries, order(), plain)
        run_files.leave_files(folder, plain)
        return replace(
            state,
            scheduler=run_files.scheduler(folder, plain),
            counters=run_files.trainer_counters(folder),
            left_out=tuple(plain.left_out),
            source=name,
        )

    return ReadState(read)


def inside(
    value: object,
    path: Path,
    entries: Mapping[str, Entry],
    order: Sequence[str],
    records: Sequence[Record],
    sources: Sources,
) -> ReadState | None:
    """What reads the state beside the model's part of a file, whose content is `value`; None where
    the file holds none."""
    if not isinstance(value, dict):
        return None
    held = [key for key in value if isinstance(key, str) and _is_optimizer(key, value[key])]
    if not held:
        return None
    schedule = next((value[key] for key in _SCHEDULER_PARTS if key in value), None)

    def read() -> TrainingState:
        if len(held) > 1:
            raise several(path, held)
        plain = PlainData(sources)
        state = _state(value[held[0]], path, records, entries, order, plain)
        scheduler: dict[str, Plain] | None = plain.state_dict(schedule, "lr_scheduler")
        return replace(state, scheduler=scheduler, left_out=tuple(plain.left_out), source=path.name)

    return ReadState(read)


def several(path: Path, names: Iterable[str]) -> UnsupportedError:
    """The error for states of which none is known to be the model's."""
    return UnsupportedError(
        f"it holds the states of several optimizers ({listed(names)}), and no file states which "
        "one belongs to this model.",
        path=path,
        hint=WEIGHTS_ALONE,
    )


def _is_optimizer(key: str, value: object) -> bool:
    named = OPTIMIZER.fullmatch(key) is not None
    return named and isinstance(value, dict) and value.keys() >= OPTIMIZER_KEYS


def _state(
    value: object,
    path: Path,
    records: Sequence[Record],
    entries: Mapping[str, Entry],
    order: Sequence[str] | None,
    plain: PlainData,
) -> TrainingState:
    optimizer = parse(value, plain, path)

    def model() -> list[tuple[str, Hashable]]:
        if order is None:
            raise UnsupportedError(
                "the optimizer numbers its parameters in the model's order, which the model's "
                "files do not keep, so reshard cannot tell which parameters the state belongs to.",
                path=path,
                hint=WEIGHTS_ALONE,
            )
        return [(name, entries[name].spec.shape) for name in order]

    names, by_order = names_of(optimizer, lambda key: shape_of(optimizer, key), model, path)
    moments: dict[str, dict[str, Entry]] = {}
    for key, state in optimizer.states.items():
        for kind, tensor in state.moments.items() if key in names else ():
            if not isinstance(tensor, TensorRef):
                raise UnsupportedError(
                    f"its {kind} is {tensor.describe()}, of which the file holds one rank's part.",
                    path=path,
                    tensor=names[key],
                    hint=WEIGHTS_ALONE,
                )
            name = names[key]
            moments.setdefault(kind, {})[name] = entries_of({name: tensor})[name]
    return TrainingState(
        moments=moments,
        steps={
            names[key]: state.step
            for key, state in optimizer.states.items()
            if key in names and state.step is not None
        },
        groups=tuple(
            Group(tuple(names[key] for key in group.params), group.hyperparameters)
            for group in optimizer.groups
        ),
        records=tuple(records),
        findings=(state_named_by_order(len(names)),) if by_order else (),
    ).owned(entries)


def names_of(
    optimizer: OptimizerDict,
    shape: Callable[[Key], Hashable],
    model: Callable[[], Sequence[tuple[str, Hashable]]],
    path: Path,
) -> tuple[dict[Key, str], bool]:
    """The name of each key, and whether the order of the model's parameters told it.

    A key may be the name. The name of a number is the one that its group states, as that of an
    optimizer that was given names, without what wrappers insert; else that of the parameter of
    `model` (names and shapes, in its order) at its place. `shape` is that of a number's parameter;
    None where it is not known.

    Raises `UnsupportedError` where none or several ways fit.
    """
    keys = [key for group in optimizer.groups for key in group.params]
    if not any(isinstance(key, int) for key in keys):
        return {key: str(key) for key in (*keys, *optimizer.states)}, False
    if all(len(group.param_names) == len(group.params) for group in optimizer.groups):
        stated = [unwrap(name) for group in optimizer.groups for name in group.param_names]
        return dict(zip(keys, stated, strict=True)), False
    named = names_in_order(optimizer, shape, model())
    if named is None:
        raise UnsupportedError(
            "the optimizer numbers its parameters, and their order and shapes match the model's "
            "parameters in no way or in several ways, so reshard cannot tell which parameters "
            "the state belongs to.",
            path=path,
            hint=WEIGHTS_ALONE,
        )
    return named, True


def names_in_order(
    optimizer: OptimizerDict,
    shape: Callable[[Key], Hashable],
    model: Sequence[tuple[str, Hashable]],
) -> dict[Key, str] | None:
    """The parameter of `model` at each number's place; None where none or several ways fit."""
    named = groups_in_order([[shape(key) for key in g.params] for g in optimizer.groups], model)
    if named is None:
        return None
    keys = [key for group in optimizer.groups for key in group.params]
    return dict(zip(keys, (name for group in named for name in group), strict=True))


def shape_of(optimizer: OptimizerDict, key: Key) -> Hashable:
    """The shape of a parameter, which its moments have."""
    state = optimizer.states.get(key)
    tensors = [] if state is None else list(state.moments.values())
    return next((t.shape for t in tensors if isinstance(t, TensorRef)), None)
