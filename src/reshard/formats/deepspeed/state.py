"""A save's training state: moments cut out of the flat tensors exactly as the masters are.

    ZeRO-1, 2, BF16_Optimizer    a moment's flat tensors keep the padding that masters may drop
    ZeRO-3                       one for each sub-group; a sub-group is of one parameter group
    without ZeRO                 shaped tensors without names: `unnamed`
    universal                    a file for each parameter and kind: `universal_state`

The state is read again from the files on request: the catalog keeps only the masters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from reshard.containers.torch import read as read_torch
from reshard.containers.torch.plain import PlainData
from reshard.core.catalog import Catalog
from reshard.core.state import Group, ReadState, Step, TrainingState
from reshard.core.tensors import Entry, Shape
from reshard.core.tiling import proven
from reshard.errors import FormatError
from reshard.formats.deepspeed import (
    experts,
    muon,
    stage3,
    stages012,
    tensor_parallel,
    universal_state,
    unnamed,
)
from reshard.formats.deepspeed.experts import holds_experts
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.parse import Shapes
from reshard.formats.deepspeed.place import Location
from reshard.formats.deepspeed.run_state import model_file, run_state
from reshard.formats.deepspeed.wrapped import Wrapped, WrappedGroup, parse_wrapped
from reshard.storage.local import Sources

_ONE_SAVE = "Copy all files of one save."


def reader(
    ranks: Sequence[Location], saved: Sequence[Saved], catalog: Catalog, sources: Sources
) -> ReadState | None:
    """What reads the state of a save, given the files of all model parallel ranks; None where it
    holds none."""
    first = saved[0].model[0]
    if not (saved[0].optim or ranks[0].universal or first.holds_optimizer):
        return None

    def read() -> TrainingState:
        plain = PlainData(sources)
        content = model_file(first.path, sources)
        if saved[0].optim:
            state = with_masters(_zero(saved, plain), catalog)
        elif ranks[0].universal:
            state = universal_state.read(ranks[0], saved[0], catalog, plain)
        else:
            state = unnamed.read(saved, content, catalog, plain)
        return run_state(state, content, plain)

    return ReadState(read)


def _zero(saved: Sequence[Saved], plain: PlainData) -> TrainingState:
    """The state of a ZeRO save, that of tensor parallel ranks joined as their weights are."""
    ranks = [of_rank(one, plain) for one in saved]
    if len(saved) == 1:
        return ranks[0]
    join = tensor_parallel.joiner(saved, plain.sources)
    first = ranks[0]
    for one, other in zip(saved[1:], ranks[1:], strict=True):
        if not _alike(first, other, one):
            raise FormatError(
                "its optimizer's groups, steps or kinds of moments are not those of the first "
                "tensor parallel rank.",
                path=one.optim[0].path,
                hint=_ONE_SAVE,
            )
    moments: dict[str, dict[str, Entry]] = {}
    for kind, table in first.moments.items():
        tables = [(state.moments[kind], one) for state, one in zip(ranks, saved, strict=True)]
        moments[kind] = {
            name: join([_part(held, entry, one) for held, one in tables])
            for name, entry in table.items()
        }
    records = tuple(dict.fromkeys(record for f in ranks for record in f.records))
    return replace(first, moments=moments, records=records)


def _alike(first: TrainingState, other: TrainingState, saved: Saved) -> bool:
    """Whether a rank's groups, steps and kinds of moments are those of the first, but for
    parameters of which it has no element, as where three ranks share two heads: its optimizer does
    not have these."""
    if len(first.groups) != len(other.groups) or first.moments.keys() != other.moments.keys():
        return False
    if not other.steps.items() <= first.steps.items():
        return False
    if any(other.moments[kind].keys() - table.keys() for kind, table in first.moments.items()):
        return False
    for mine, theirs in zip(first.groups, other.groups, strict=True):
        if mine.hyperparameters != theirs.hyperparameters:
            return False
        known = set(theirs.names)
        lacking = [name for name in mine.names if name not in known]
        if tuple(name for name in mine.names if name in known) != theirs.names:
            return False
        if any(math.prod(_module_shape(name, saved)) for name in lacking):
            return False
    return True


def _module_shape(name: str, saved: Saved) -> Shape:
    """The shape of a rank's part of a parameter, as its module has it."""
    return saved.module[name].shape if name in saved.module else (1,)


def _part(table: Mapping[str, Entry], like: Entry, saved: Saved) -> Entry:
    """A rank's part of a moment, which may have no element.

    Raises `IncompleteError` where it has some, but not in the table.
    """
    name = like.spec.name
    if name in table:
        return table[name]
    return proven(replace(like.spec, shape=_module_shape(name, saved)), ())


def with_masters(state: TrainingState, catalog: Catalog) -> TrainingState:
    """The state with its masters, which are the weights of the catalog."""
    names = (name for group in state.groups for name in group.names)
    return replace(state, masters={name: catalog.entries[name] for name in names})


def of_rank(saved: Saved, plain: PlainData) -> TrainingState:
    """What the files of one model parallel rank hold."""
    wrapped = []
    for file in saved.optim:
        content = read_torch(plain.sources.open(file.path))
        wrapped.append(parse_wrapped(file.path, content.value, len(file.flats), plain))
    _check_same(wrapped, saved)
    numbers = len(saved.optim[0].flats)
    shapes = _shapes(saved, numbers)
    moments: dict[str, dict[str, Entry]] = {}
    kinds = [kind for number in range(numbers) for kind in wrapped[0].kinds(number)]
    for kind in dict.fromkeys(kinds):
        moments[kind] = _table(saved, wrapped, kind, plain.sources)
    names = [_names(number, of, saved) for number, of in enumerate(shapes)]
    steps: dict[str, Step] = {}
    for number, state in enumerate(wrapped[0].states):
        if state is not None and state.step is not None:
            steps.update(dict.fromkeys(names[number], state.step))
    return TrainingState(
        moments=moments,
        steps=steps,
        groups=tuple(_group(group, names) for group in wrapped[0].groups),
        scaler=wrapped[0].scaler,
        records=tuple(dict.fromkeys(r for file in saved.optim for r in file.records)),
        source=f"ZeRO-{saved.stage}",
    )


def _shapes(saved: Saved, numbers: int) -> tuple[Shapes, ...]:
    """The parameters of each flat tensor."""
    groups = saved.model[0].groups
    if len(groups) != numbers:
        raise FormatError(
            f"it has {numbers} flat tensors, but the model file lists the parameters of "
            f"{len(groups)}, so no file states which group a parameter belongs to.",
            path=saved.optim[0].path,
            hint="Load and save it once with a newer DeepSpeed.",
        )
    return groups


def _names(number: int, shapes: Shapes, saved: Saved) -> tuple[str, ...]:
    """The parameters of a flat tensor; of all experts where it is theirs."""
    if saved.stage == 3 or not holds_experts(shapes):
        return tuple(shapes)
    return tuple(
        rank.names[name] for rank in experts.ranks(number, shapes, saved) for name in shapes
    )


def _group(group: WrappedGroup, names: Sequence[tuple[str, ...]]) -> Group:
    covered = tuple(name for number in group.flats for name in names[number])
    return Group(covered, group.hyperparameters)


def _table(
    saved: Saved, wrapped: Sequence[Wrapped], kind: str, sources: Sources
) -> dict[str, Entry]:
    """The moments of a kind, of those flat tensors that have it."""
    numbers = [n for n in range(len(saved.optim[0].flats)) if kind in wrapped[0].kinds(n)]
    entries: dict[str, Entry] = {}
    if saved.stage != 3 and kind == muon.MOMENTUM:
        for number in numbers.copy():
            found = muon.of_whole_parameters(number, saved, wrapped, sources)
            if found is not None:
                entries |= found
                numbers.remove(number)

    def only(of: Sequence[object]) -> tuple[object, ...]:
        return tuple(of[number] for number in numbers)

    optim = tuple(
        replace(
            file,
            flats=tuple(one.flat(number, kind) for number in numbers),
            partition_count=only(file.partition_count)
            if len(file.partition_count) == len(file.flats)
            else file.partition_count,
            paddings=None if file.paddings is None else only(file.paddings),
        )
        for file, one in zip(saved.optim, wrapped, strict=True)
    )
    first = saved.model[0]
    model = (replace(first, groups=only(first.groups)), *saved.model[1:])
    held = replace(saved, optim=optim, model=model)
    cut = stage3.parameters(held) if saved.stage == 3 else stages012.parameters(held)
    return entries | cut


def _check_same(wrapped: Sequence[Wrapped], saved: Saved) -> None:
    """All ranks must have the same groups, kinds of moments and steps."""
    first = wrapped[0]
    for other, file in zip(wrapped[1:], saved.optim[1:], strict=True):
        # Muon holds nothing of a group of which its rank has no part.
        there = [n for n, flat in enumerate(file.flats) if flat.shape[0] or other.kinds(n)]
        for what, mine, theirs in (
            ("optimizer's groups", first.groups, other.groups),
            ("optimizer's steps", _steps(first), _steps(other)),
            ("kinds of moments", _kinds(first, there), _kinds(other, there)),
        ):
            if mine != theirs:
                numbers = f" ({theirs} and {mine})" if "groups" not in what else ""
                raise FormatError(
                    f"its {what} are not those of {first.path.name}{numbers}: files of "
                    "different saves are mixed.",
                    path=other.path,
                    hint=_ONE_SAVE,
                )


def _steps(one: Wrapped) -> list[int | None]:
    return [None if s is None or s.step is None else s.step.count for s in one.states]


def _kinds(one: Wrapped, numbers: Sequence[int]) -> list[tuple[str, ...]]:
    return [one.kinds(number) for number in numbers]
