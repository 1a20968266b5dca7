"""Training state in DCP checkpoints: moments as tensors, steps and hyperparameters beside them.

    path in the state dict, below the optimizer's part            written by
    state, <name>, exp_avg       param_groups, <g>, lr            get_optimizer_state_dict
    state.<name>.exp_avg         param_groups.<name>.lr           the same with
                                             flatten_optimizer_state_dict, torchtitan

    <ckpt>/optim_states/                        LightRFT: the part is the whole save
    pytorch_model_fsdp_0/  optimizer_0/         accelerate, the HF Trainer: the part `optimizer`
    one save with the model                     beside the model's part: `optimizer`, `optim`

Steps are tensors without dimensions, one a parameter. Each hyperparameter is an object of its own;
`params` of a group are names. Flattened, each parameter has its own copy of them: parameters with
equal copies are one group. FSDP1's states have the same form (torch 2.13, state_dict.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

from msgspec import Struct, field

from reshard.containers.dcp.chunked import find_tensors, scalar
from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.objects import read_object
from reshard.containers.torch.optimizer import NOT_HYPER, eight_bit, parse_step
from reshard.containers.torch.plain import PlainData
from reshard.core.hyperparameters import joined
from reshard.core.state import Group, Plain, ReadState, Step, TrainingState, tensor_name
from reshard.core.tensors import Entry
from reshard.errors import FormatError, UnsupportedError
from reshard.formats import OPTIMIZER, OPTIMIZER_KEYS, optimizer_file
from reshard.formats.dcp import training_files
from reshard.formats.dcp.parts import Part
from reshard.formats.dcp.save import folder_metadata
from reshard.storage.local import Sources

StatePath = tuple[str, ...]
_STEP = "step"


def reader(
    folder: Path, metadata: Metadata, part: Part, entries: Mapping[str, Entry], sources: Sources
) -> ReadState | None:
    """What reads the state that belongs to a model's part; None where there is none."""
    roots = _roots(metadata, part.path)
    beside = [] if roots else training_files.optimizer_folders(folder)
    if not roots and not beside:
        number = training_files.number_of(folder)
        return optimizer_file.beside(
            training_files.above_of(folder), number, entries, lambda: None, sources
        )

    def read() -> TrainingState:
        plain = PlainData(sources)
        place, inside, found = folder, metadata, roots
        if len(beside) > 1:
            raise optimizer_file.several(folder, (path.name for path in beside))
        if beside:
            training_files.refuse_rank_files(beside[0])
            place, inside = beside[0], folder_metadata(beside[0], sources)
            found = _roots(inside, ()) or [()]
        if len(found) > 1:
            raise optimizer_file.several(place, (".".join(root) for root in found))
        state = _read(place, inside, found[0], plain)
        state = training_files.run_state(state, folder, metadata, plain)
        for prefix in ("", *_tails(".".join(part.path))):
            state = state.owned(entries, f"{prefix}.")
        return _inside(state, entries, metadata, part)

    return ReadState(read)


def _roots(metadata: Metadata, model: StatePath) -> list[StatePath]:
    """The parts that are an optimizer's: beside the model's part, or beside one above it."""
    found: dict[StatePath, None] = {}
    for path in metadata.paths.values():
        for depth in range(min(len(model) + 1, len(path) - 1)):
            if path[:depth] != model[:depth]:
                break
            step, rest = path[depth], path[depth + 1]
            known = rest in OPTIMIZER_KEYS or rest.startswith(("state.", "param_groups."))
            if OPTIMIZER.fullmatch(step) and known:
                found[path[: depth + 1]] = None
    return list(found)


class _Keys(Struct):
    """The keys of a state as they are sorted by what they hold."""

    moments: dict[str, tuple[str, str]] = field(default_factory=dict)
    steps: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)
    flattened: bool = False


def _sorted(metadata: Metadata, root: StatePath) -> _Keys:
    """The keys below a root; `settings` by group (its number, or a name where it is flattened).

    Without what is there under a second name of a parameter, as reshard writes it.
    """
    keys = _Keys()
    second = {metadata.paths[alias][-1] for alias in metadata.aliases}
    for key, path in metadata.paths.items():
        if path[: len(root)] != root:
            continue
        rest = path[len(root) :]
        if len(rest) == 1 and "." in rest[0]:
            keys.flattened = True
            what, _, tail = rest[0].partition(".")
            name, _, kind = tail.rpartition(".")
        elif len(rest) == 3:
            what, name, kind = rest
        else:
            what, name, kind = "", "", ""
        if name in second:
            continue
        if what == "state" and kind == _STEP:
            keys.steps[name] = key
        elif what == "state" and kind and key in metadata.tensors:
            keys.moments[key] = (kind, name)
        elif what == "param_groups" and kind:
            keys.settings.setdefault(name, {})[kind] = key
        else:
            keys.others.append(key)
    return keys


def _read(folder: Path, metadata: Metadata, root: StatePath, plain: PlainData) -> TrainingState:
    keys = _sorted(metadata, root)
    if not keys.settings and not keys.moments:
        raise FormatError("it holds no state of an optimizer.", path=folder)
    steps, moments = keys.steps, keys.moments
    tensors = {key: tensor_name(kind, name) for key, (kind, name) in moments.items()}
    tensors |= {
        key: tensor_name(_STEP, name) for name, key in steps.items() if key in metadata.tensors
    }
    entries, records = find_tensors(tensors, {}, metadata, folder, plain.sources)
    tables: dict[str, dict[str, Entry]] = {}
    for kind, name in moments.values():
        entry = entries[tensor_name(kind, name)].renamed(name)
        if not entry.spec.dtype.floating:
            raise eight_bit(folder, kind)
        tables.setdefault(kind, {})[name] = entry
    objects = _Objects(folder, metadata, plain)
    counted = {
        name: step
        for name, key in steps.items()
        if (step := _step(entries.get(tensor_name(_STEP, name)), key, objects)) is not None
    }
    groups = _flattened(keys, objects) if keys.flattened else _groups(keys, objects)
    return TrainingState(
        moments=tables,
        steps=counted,
        groups=groups,
        left_out=tuple(keys.others),
        records=tuple(records),
        source="a DCP checkpoint",
    )


class _Objects:
    """The objects of a save; equal bytes, as flattened hyperparameters have, are parsed once."""

    def __init__(self, folder: Path, metadata: Metadata, plain: PlainData) -> None:
        self.folder, self._metadata, self.plain = folder, metadata, plain
        self._known: dict[bytes, Plain] = {}

    def value(self, key: str) -> Plain:
        """The plain data of an object."""
        copies = self._metadata.objects.get(key)
        if not copies:
            raise FormatError(
                "the metadata does not say where it lies.", path=self.folder, tensor=key
            )
        return read_object(key, copies[0], self.folder, self.plain, self._known)


def _step(entry: Entry | None, key: str, objects: _Objects) -> Step | None:
    """A parameter's step count: a tensor, or an object where it was Python's integer."""
    if entry is None:
        return parse_step(objects.value(key), objects.plain, objects.folder)
    return parse_step(scalar(entry), objects.plain, objects.folder)


def _groups(found: _Keys, objects: _Objects) -> tuple[Group, ...]:
    groups = []
    for number in sorted(found.settings, key=_number):
        keys = found.settings[number]
        settings = _settings(keys, objects)
        names = objects.value(keys["params"]) if "params" in keys else None
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise UnsupportedError(
                f"the parameters of its group {number} have numbers instead of names: no file "
                "states which parameters the state belongs to.",
                path=objects.folder,
                hint="Save it with get_optimizer_state_dict, or convert the weights alone.",
            )
        groups.append(Group(tuple(names), settings))
    return tuple(groups)


def _settings(keys: Mapping[str, str], objects: _Objects) -> dict[str, Plain]:
    """The hyperparameters of a group; its own step is that of FusedAdam."""
    return {kind: objects.value(key) for kind, key in keys.items() if kind not in NOT_HYPER}


def _number(text: str) -> tuple[int, str]:
    return (int(text) if text.isdecimal() and len(text) < 9 else 1 << 30, text)


def _flattened(found: _Keys, objects: _Objects) -> tuple[Group, ...]:
    """The parameters with the same hyperparameters are one group."""
    groups = (Group((name,), _settings(keys, objects)) for name, keys in found.settings.items())
    return joined(groups)


def _tails(dotted: str) -> Iterator[str]:
    """A dotted name, and what is left of it without its first steps.

    >>> list(_tails("model.actor"))
    ['model.actor', 'actor']
    """
    while dotted:
        yield dotted
        dotted = dotted.partition(".")[2]


def _inside(
    state: TrainingState, entries: Mapping[str, Entry], metadata: Metadata, part: Part
) -> TrainingState:
    """The state without what it holds of other parts of the checkpoint, as where one optimizer
    updates an actor and a critic."""
    others = [
        ".".join(path)
        for key, path in metadata.paths.items()
        if key in metadata.tensors and key not in part.names
    ]
    # The optimizer's names begin at the model's part, or at one above the part that is read.
    depth = max(1, len(list(_tails(".".join(part.path)))))
    outside = {tail for name in others for tail in islice(_tails(name), depth)}
    foreign = {name for name in state.names if name not in entries}
    if not foreign or not foreign <= outside or len(foreign) == len(state.names):
        return state
    return state.only({name: name for name in state.names if name not in foreign})
