"""FSDP1's LOCAL_STATE_DICT: flat parameters, and slices of them.

FSDP1 lays the parameters of each wrapped module end to end in one flat parameter, and gives each
rank an equal part. A rank's local state dict holds its part as a ShardedTensor of one dimension,

    model.layers.0._flat_param    one for each wrapped module; `_flat_param` is the root's

and with use_orig_params=True every parameter besides, as a slice of that part which may be empty:

    rank 0   q_proj.weight[0:576]  k_proj.weight[0:192]  up_proj.weight[]          ...
    rank 1   q_proj.weight[]       k_proj.weight[]       up_proj.weight[0:548]     ...

A slice is a view of the part, in the file as in memory: so its place in the flat parameter is
known, and reshard proves that the slices of one parameter follow each other. No file states the
shapes: such tensors are flattened, and the base gives them their shapes (`reshard.naming.flat`).
With use_orig_params=False no file states the names of the parameters either, and the flat
parameters themselves are read. Between parameters lies padding up to 16 bytes, at the end up to a
multiple of the ranks. Read off torch 2.13 (torch/distributed/fsdp/_flat_param.py,
_state_dict_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers import copies
from reshard.containers.distributed import Local
from reshard.containers.torch import TensorRef
from reshard.core.tensors import Entry, Fragment, Record, TensorSpec, flat
from reshard.errors import FormatError, IncompleteError, UnsupportedError
from reshard.formats.rank_files.files import Saved
from reshard.formats.rank_files.join import (
    RankPart,
    Table,
    check_names,
    entry_of,
    parts_of,
    ranks_missing,
    records_of,
    stated_world,
)
from reshard.formats.rank_files.state import State
from reshard.storage.local import Sources

_FLAT = "_flat_param"
# Bytes to which FSDP1 aligns each parameter in a flat one.
_ALIGNMENT = 16


class _Slice(Struct, frozen=True):
    """A rank's slice of a parameter, at element `start` of the flat parameter `unit`."""

    unit: str
    start: int
    part: RankPart

    @property
    def numel(self) -> int:
        return self.part.tensor.shape[0]


def holds_flat_parameters(states: Sequence[State]) -> bool:
    """Whether these are local state dicts."""
    return any(map(is_flat, states[0].tensors))


def is_flat(name: str) -> bool:
    """Whether a name is that of a flat parameter."""
    return name.rpartition(".")[2] == _FLAT


def joined(states: Sequence[State], saved: Saved, sources: Sources) -> Table:
    """Every parameter, flattened; flat parameters as they are where nothing names what is in them.

    Raises `IncompleteError`, `FormatError`, `UnsupportedError`.
    """
    check_names(states)
    world = saved.world or stated_world(states) or len(states)
    saved.check_ranks(world)
    missing = saved.missing(world)
    if missing.count:
        raise ranks_missing(missing, saved)
    entries: dict[str, Entry] = {}
    records: dict[str, list[Record]] = {}
    units: dict[str, list[RankPart]] = {}
    for name in filter(is_flat, states[0].tensors):
        units[name] = parts_of(name, states, sources)
        entries[name] = _whole(name, states[0].tensors[name], units[name], saved)
        records[name] = records_of(units[name])
    places = [_Places(state, units) for state in states]
    slices: dict[str, list[_Slice]] = {}
    owners: dict[tuple[tuple[str, int, int], ...], str] = {}
    loose: list[str] = []
    for name, value in states[0].tensors.items():
        if is_flat(name):
            continue
        found = [s for place in places for s in place.slice(name)]
        empty = isinstance(value, TensorRef) and value.shape == (0,)
        place = tuple(sorted((s.unit, s.start, s.numel) for s in found))
        owner = owners.setdefault(place, name) if found else name
        if owner != name:  # tied: the same slices by another name
            entries[owner] = replace(entries[owner], aliases=(*entries[owner].aliases, name))
        elif found or (empty and all(_shape(state, name) == (0,) for state in states)):
            entries[name], slices[name] = _parameter(name, value, found), found
        else:
            loose.append(name)
    copies.check(records, sources)
    named = {s.unit for found in slices.values() for s in found}
    if named != units.keys():
        _refuse_slices(loose, states)
    for name in loose:  # every rank holds it whole
        held = parts_of(name, states, sources)
        entries[name] = entry_of(name, states[0].tensors[name], held, saved)
    _check_gaps(entries, slices, world)
    for unit in named:
        del entries[unit]
    unshaped = frozenset(slices) | frozenset(filter(is_flat, entries))
    return Table(
        entries, tuple(record for state in states for record in state.records), (), unshaped
    )


class _Places:
    """Where the slices of one rank's file lie: by the storage that they share with a flat part."""

    def __init__(self, state: State, units: dict[str, list[RankPart]]) -> None:
        self._state = state
        self._parts: dict[str, list[tuple[str, RankPart]]] = {}
        for unit, parts in units.items():
            for held in parts:
                if held.state is state:
                    self._parts.setdefault(held.tensor.storage[0], []).append((unit, held))

    def slice(self, name: str) -> Iterator[_Slice]:
        """The rank's slice of a parameter, if it is one and not empty."""
        value = self._state.tensors[name]
        if not isinstance(value, TensorRef) or len(value.shape) != 1 or not value.extent.nbytes:
            return
        for unit, part in self._parts.get(value.storage[0], ()):
            whole, mine = part.tensor.extent, value.extent
            inside = whole.offset <= mine.offset
            if inside and mine.offset + mine.nbytes <= whole.offset + whole.nbytes:
                if value.dtype != part.tensor.dtype or value.strides is not None:
                    raise FormatError(
                        f"it is {value.dtype} in a flat parameter of {part.tensor.dtype}.",
                        path=self._state.path,
                        tensor=name,
                    )
                at = (mine.offset - whole.offset) // value.dtype.itemsize
                start = part.box.offsets[0] + at
                yield _Slice(unit, start, RankPart(self._state, part.box, value))


def _whole(name: str, value: TensorRef | Local, parts: Sequence[RankPart], saved: Saved) -> Entry:
    """A flat parameter, joined from all ranks' parts."""
    if isinstance(value, TensorRef) or len(value.shape) != 1:
        raise UnsupportedError(
            "a flat parameter is not a sharded tensor of one dimension.",
            path=saved.folder,
            tensor=name,
        )
    return entry_of(name, value, parts, saved)


def _parameter(name: str, value: TensorRef | Local, slices: list[_Slice]) -> Entry:
    """A parameter, joined from its slices, which must be adjacent in the flat parameter."""
    slices.sort(key=lambda piece: piece.start)
    at, fragments = 0, []
    numel = sum(piece.numel for piece in slices)
    for piece, following in zip(slices, [*slices[1:], None], strict=True):
        if following is not None and (
            piece.unit != following.unit or piece.start + piece.numel != following.start
        ):
            raise IncompleteError(
                f"{following.part.state.path.name} holds a slice of it that does not follow the "
                f"one in {piece.part.state.path.name}.",
                path=following.part.state.path,
                tensor=name,
                hint="Copy the files of all ranks again, from one save.",
            )
        tensor = piece.part.tensor
        fragments.append(Fragment(flat(numel, at, piece.numel), tensor.extent, tensor.dtype))
        at += piece.numel
    return Entry(TensorSpec(name, value.dtype, (numel,)), tuple(fragments))


def _check_gaps(entries: dict[str, Entry], slices: dict[str, list[_Slice]], world: int) -> None:
    """Between the parameters of a flat one there is only padding: else one is missing."""
    spans: dict[str, list[tuple[int, int, str]]] = {}
    for name, found in slices.items():
        if found:
            end = found[-1].start + found[-1].numel
            spans.setdefault(found[0].unit, []).append((found[0].start, end, name))
    for unit, held in spans.items():
        spec = entries[unit].spec
        allowed = max(1, _ALIGNMENT // spec.dtype.itemsize)
        end, before = 0, unit
        for start, stop, name in sorted(held):
            if not 0 <= start - end < allowed:
                raise _gap(unit, before, name, start - end)
            end, before = stop, name
        if not 0 <= spec.numel - end < allowed + world:
            raise _gap(unit, before, "its end", spec.numel - end)


def _gap(unit: str, before: str, after: str, numel: int) -> FormatError:
    return FormatError(
        f"{numel} elements lie between {before!r} and {after!r}, more than padding: the state "
        "dict does not name everything in it.",
        tensor=unit,
    )


def _shape(state: State, name: str) -> tuple[int, ...]:
    return state.tensors[name].shape


def _refuse_slices(loose: Sequence[str], states: Sequence[State]) -> None:
    """Beside flat parameters without a known slice, a tensor of one dimension may be a slice that
    was copied out of one, and could belong anywhere, or a buffer."""
    for name in loose:
        value = states[0].tensors[name]
        if value.dtype.floating and any(len(_shape(state, name)) == 1 for state in states):
            raise UnsupportedError(
                "it may be a slice of a flat parameter, but it is not a view of one, so reshard "
                "cannot prove where it belongs.",
                path=states[0].path,
                tensor=name,
                hint="Save without offloading to the CPU, or with SHARDED_STATE_DICT.",
            )
