"""Runs with pipeline parallelism: the module layer by layer, the optimizer stage by stage.

    layer_00-model_states.pt                   the state dict of the pipeline's layer 0, ...
    layer_02-model_00-model_states.pt          the same, of a topology with an axis `model`
    mp_rank_00_model_states.pt                 stage 0: no module; shapes, counters
    [bf16_]zero_pp_rank_<D>_mp_rank_00_optim_states.pt   the masters of stage 0
    mp_rank_01_..., ..._mp_rank_01_...         stage 1

    tensor                                     in a stage's files          here
    a parameter of layer 2                     2.self_attn.q_proj.weight   the same
    of a layer that others share               tied_modules.embed.weight   0.weight, with the other
                                                                           as its second name

A layer is whatever the user put there: functions have no file. Layers that share a module by a key
(`TiedLayerSpec`) go by that key in every stage that has it; only the first has a file. No file says
which key that is: the masters, rounded, are the file's weights. Read off DeepSpeed 0.19.8
(runtime/pipe/module.py, engine.py, topology.py) and files that it wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from reshard.containers.torch import TensorRef
from reshard.containers.torch import read as read_torch
from reshard.containers.torch.plain import PlainData
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.state import Group, ReadState, TrainingState
from reshard.core.tensors import Entry
from reshard.errors import FormatError, IncompleteError, UnsupportedError, listed
from reshard.formats.deepspeed import files, proof, stages012, state, tensor_parallel, universal
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.parse import LayerFile, Shapes, parse_layer
from reshard.formats.deepspeed.place import Location
from reshard.formats.deepspeed.run_state import model_file, run_state
from reshard.storage.local import Sources

_NUMBERED = regex(r"(\d+)\.(.+)")
_TIED = regex(r"tied_modules\.([^.]+)\.(.+)")
_ONE_SAVE = "Copy all files of one save."
_LISTED = 4


def read(location: Location, sources: Sources) -> Catalog:
    """The tensors of all stages of a save that has files of layers."""
    return _catalog(location, _saved(location, sources), sources)


def of_universal(location: Location, saved: Sequence[Saved], sources: Sources) -> Catalog:
    """The tensors of a universal checkpoint of such a run, whose model files hold no module: the
    masters of `zero/`, of the parameters that all stages list."""
    tensor_parallel.check_ranks(location, saved)
    tensor_parallel.check_one_save(saved, sources)
    stages = saved[0].model[0].pipeline_stages
    if stages > 1 and stages != len(saved):
        raise UnsupportedError(
            f"it is a universal checkpoint of {stages} pipeline stages of {len(saved) // stages} "
            "tensor parallel ranks each, which is not supported.",
            path=location.folder,
        )
    model = replace(saved[0].model[0], groups=tuple(_groups(saved)))
    whole = replace(saved[0], model=(model,))
    made = universal.catalog(location, whole, sources)
    details = {**made.origin.details, "pipeline_stages": len(saved)}
    entries = {entry.spec.name: entry for entry in sorted(made.entries.values(), key=_layer)}
    made = replace(made, entries=entries, origin=replace(made.origin, details=details))
    return replace(made, optimizer=state.reader([location], [whole], made, sources))


def _saved(location: Location, sources: Sources) -> list[Saved]:
    """The files of every stage, with the layers that each holds. Checked against each other.

    Raises `IncompleteError`, `FormatError`, `UnsupportedError`.
    """
    ranks = location.ranks
    saved = [files.parsed(rank, sources) for rank in ranks]
    if not all(one.model[0].staged for one in saved):
        raise FormatError(
            "it holds files of pipeline layers, but also model files with a whole module: files "
            "of different saves are mixed.",
            path=location.folder,
            hint="Remove the files of the older save.",
        )
    layers = {
        number: parse_layer(path, number, read_torch(sources.open(path)))
        for number, path in sorted(location.layers.items())
    }
    saved = _with_layers(saved, layers, location)
    saved = [files.checked(rank, one) for rank, one in zip(ranks, saved, strict=True)]
    tensor_parallel.check_ranks(location, saved)
    tensor_parallel.check_one_save(saved, sources)
    saved = [_with_tied(one, saved, sources) for one in saved]
    # Global rank 0 alone states which of its parameters are shared.
    model = [replace(one.model[0], shared=None) for one in saved[1:]]
    rest = zip(saved[1:], model, strict=True)
    return [saved[0], *(replace(one, model=(m, *one.model[1:])) for one, m in rest)]


def _catalog(location: Location, saved: Sequence[Saved], sources: Sources) -> Catalog:
    """The tensors of all stages, in the order of the layers."""
    parts = [
        stages012.catalog(rank, one, sources)
        for rank, one in zip(location.ranks, saved, strict=True)
    ]
    entries: dict[str, Entry] = {}
    for part in parts:
        for name, entry in part.entries.items():
            if name in entries:  # of layers that share a module: every stage has its masters
                proof.check_replicas(entries[name], entry, sources)
            entries.setdefault(name, entry)
    owners = _owners(saved)
    found = [_called(name, entry, owners) for name, entry in entries.items()]
    first = parts[0]
    origin = first.origin
    catalog = replace(
        first,
        entries={entry.spec.name: entry for entry in sorted(found, key=_layer)},
        records=tuple(dict.fromkeys(record for part in parts for record in part.records)),
        findings=tuple(
            dict.fromkeys((*(f for part in parts for f in part.findings), *_absent(location)))
        ),
        origin=replace(
            origin,
            world_size=origin.world_size and origin.world_size * len(parts),
            details={
                **origin.details,
                "groups": [len(group) for group in _groups(saved)],
                "pipeline_stages": len(parts),
            },
        ),
    )
    return replace(catalog, optimizer=_reader(saved, catalog, sources))


def _with_layers(
    saved: Sequence[Saved], layers: Mapping[int, LayerFile], location: Location
) -> list[Saved]:
    """Each stage with the layers that its files name; those that none names go to the first."""
    numbers = [{int(m[1]) for n in _names(one) if (m := _NUMBERED.fullmatch(n))} for one in saved]
    lost = sorted(set().union(*numbers) - layers.keys())
    if lost:
        raise IncompleteError(
            f"the files of {len(lost)} of its layers are missing, beginning with layer {lost[0]}.",
            path=location.folder,
            hint="Copy the files of every rank and layer.",
        )
    rest = layers.keys() - set().union(*numbers)
    numbers[0] |= rest - _shared(saved, {number: layers[number] for number in rest})
    entries = []
    for one, mine in zip(saved, numbers, strict=True):
        held = {number: layers[number] for number in sorted(mine)}
        module = {f"{n}.{key}": t for n, file in held.items() for key, t in file.module.items()}
        unread = {f"{n}.{key}": t for n, file in held.items() for key, t in file.unread.items()}
        # Masters without names, of a run without ZeRO: those of one stage alone help nobody.
        model = replace(one.model[0], module=module, unread=unread, masters=(), flat_masters=())
        # Layers that share a module are told apart by their masters, which are not cut yet.
        spare = tuple(layers[number] for number in sorted(rest - numbers[0]))
        every = (*held.values(), *(spare if one is saved[0] else ()))
        entries.append(replace(one, model=(model, *one.model[1:]), layers=every))
    return entries


def _names(saved: Saved) -> Iterable[str]:
    """The parameters that a stage's files name."""
    groups = saved.model[0].groups
    if groups:
        return (name for group in groups for name in group)
    return (name for file in saved.optim for names in file.held for name in names)


def _tied(names: Iterable[str]) -> dict[str, set[str]]:
    """The parameters of each shared module, by its key."""
    found: dict[str, set[str]] = {}
    for name in names:
        match = _TIED.fullmatch(name)
        if match:
            found.setdefault(match[1], set()).add(match[2])
    return found


def _shared(saved: Sequence[Saved], spare: Mapping[int, LayerFile]) -> set[int]:
    """The layers, of those that no stage names, that can be a shared module's."""
    keys = [names for one in saved for names in _tied(_names(one)).values()]
    return {
        number
        for number, file in spare.items()
        if any(names <= file.module.keys() for names in keys)
    }


def _with_tied(one: Saved, saved: Sequence[Saved], sources: Sources) -> Saved:
    """The stage with the weights of the modules that it shares, each from its layer's file."""
    tied = _tied(_names(one))
    if not tied:
        return one
    module = dict(one.model[0].module)
    masters = stages012.parameters(one)
    for key, names in tied.items():
        start = f"tied_modules.{key}."
        mine = {name: entry for name, entry in masters.items() if name.startswith(start)}
        for file in _spare(saved):
            held = {start + name: tensor for name, tensor in file.module.items()}
            if names <= file.module.keys() and _are(held, mine, sources):
                module |= held
                break
        else:
            raise FormatError(
                f"no layer's file holds the weights of {start.removesuffix('.')!r} that the "
                "optimizer has: files of different saves are mixed, or the file is missing.",
                path=one.model[0].path,
                hint="Copy the files of every rank and layer.",
            )
    model = replace(one.model[0], module=module)
    return replace(one, model=(model, *one.model[1:]))


def _spare(saved: Sequence[Saved]) -> list[LayerFile]:
    """The files of layers that no stage names by their numbers."""
    named = {id(tensor) for one in saved for tensor in one.model[0].module.values()}
    return [
        file
        for one in saved
        for file in one.layers
        if file.module and not any(id(tensor) in named for tensor in file.module.values())
    ]


def _are(tensors: Mapping[str, TensorRef], masters: Mapping[str, Entry], sources: Sources) -> bool:
    """Whether these weights are those masters, rounded."""
    try:
        proof.check_masters(tensors, masters, sources)
    except FormatError:
        return False
    return True


def _owners(saved: Sequence[Saved]) -> dict[str, list[str]]:
    """What the parameters of shared modules are called by their layers: `0.weight`."""
    owners: dict[str, list[str]] = {}
    layers = [file for one in saved for file in one.layers]
    for one in saved:
        for name, tensor in one.model[0].module.items():
            match = _TIED.fullmatch(name)
            if match is None:
                continue
            of = [file.number for file in layers if file.module.get(match[2]) == tensor]
            if of:
                owners.setdefault(name, []).extend(f"{number}.{match[2]}" for number in of)
    return {name: list(dict.fromkeys(names)) for name, names in owners.items()}


def _called(name: str, entry: Entry, owners: Mapping[str, Sequence[str]]) -> Entry:
    """A shared module's parameter by its layer's number; any other as it is."""
    if name not in owners:
        return entry
    first, *more = owners[name]
    return replace(entry.renamed(first), aliases=(*more, name, *entry.aliases))


def _groups(saved: Sequence[Saved]) -> list[Shapes]:
    """The parameters of each group in all stages, those of shared modules once."""
    groups: dict[int, Shapes] = {}
    for one in saved:
        for number, group in enumerate(one.model[0].groups):
            groups.setdefault(number, {}).update(group)
    return list(groups.values())


def _layer(entry: Entry) -> int:
    match = _NUMBERED.fullmatch(entry.spec.name)
    return int(match[1]) if match else 0


def _absent(location: Location) -> tuple[Finding, ...]:
    """The finding that numbers of layers are left out: layers that are functions, if no file was
    lost."""
    there = location.layers.keys()
    lacking = sorted(set(range(max(there, default=-1) + 1)) - there)
    if not lacking:
        return ()
    message = (
        f"no file is there of the pipeline's layers {listed(map(str, lacking), _LISTED)}: "
        "functions have none, and layers that share an earlier one's weights."
    )
    return (Finding("layers-without-files", message),)


def _reader(saved: Sequence[Saved], catalog: Catalog, sources: Sources) -> ReadState | None:
    """What reads the state of all stages; None where there is none."""
    first = saved[0].model[0]
    if not (saved[0].optim or first.holds_optimizer):
        return None

    def read() -> TrainingState:
        if not saved[0].optim:
            raise UnsupportedError(
                "without ZeRO the optimizer's state is stored without names, and its run has "
                "pipeline stages: no file states which parameters it belongs to.",
                path=first.path,
                hint="Resume the run once with ZeRO stage 1 and save, or convert the weights "
                "alone.",
            )
        plain = PlainData(sources)
        content = model_file(first.path, sources)
        found = _joined([state.of_rank(one, plain) for one in saved], saved, sources)
        found = state.with_masters(found.owned(catalog.entries), catalog)
        return run_state(found, content, plain)

    return ReadState(read)


def _joined(
    states: Sequence[TrainingState], saved: Sequence[Saved], sources: Sources
) -> TrainingState:
    """The states of all stages as one. Shared modules have one in each, which must be the same."""
    first = states[0]
    groups: list[Group] = list(first.groups)
    moments = {kind: dict(table) for kind, table in first.moments.items()}
    steps = dict(first.steps)
    for one, other in zip(saved[1:], states[1:], strict=True):
        settings = [group.hyperparameters for group in other.groups]
        alike = settings == [group.hyperparameters for group in groups]
        if not alike or other.moments.keys() != moments.keys():
            raise FormatError(
                "its optimizer's groups or kinds of moments are not those of the first stage.",
                path=one.optim[0].path,
                hint=_ONE_SAVE,
            )
        seen = {name for group in groups for name in group.names}
        for kind, table in moments.items():
            theirs = other.moments[kind]
            for name in table.keys() & theirs.keys():
                proof.check_replicas(table[name], theirs[name], sources)
            table.update({name: entry for name, entry in theirs.items() if name not in table})
        steps.update(other.steps)
        groups = [
            Group((*mine.names, *(n for n in group.names if n not in seen)), mine.hyperparameters)
            for mine, group in zip(groups, other.groups, strict=True)
        ]
    records = tuple(dict.fromkeys(record for state in states for record in state.records))
    return replace(first, moments=moments, steps=steps, groups=tuple(groups), records=records)
