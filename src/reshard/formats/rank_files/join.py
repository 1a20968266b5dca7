"""The ranks' states as one table: every tensor tiled by the parts that the ranks hold.

Ranks of one save state the same names, shapes and placements. Where two hold the same box (the
replicas of HSDP, plain tensors) one is taken and the other must hold the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from reshard.containers import copies
from reshard.containers.distributed import Local
from reshard.containers.torch import TensorRef
from reshard.core.findings import Finding
from reshard.core.tensors import Box, Entry, Record, TensorSpec
from reshard.core.tiling import proven
from reshard.errors import FormatError, IncompleteError, at
from reshard.formats.rank_files.files import NOTHING_MISSING, Missing, Saved
from reshard.formats.rank_files.state import State
from reshard.storage.local import Sources

# Bytes compared at once.
_PIECE = 1 << 20
# Bytes by which tensors are told apart at first.
_BEGINNING = 4096
_ONE_SAVE = "Copy the files of all ranks again, from one save."


class Table(Struct, frozen=True):
    """The tensors of all ranks. `unshaped` are flattened, and no file states their shapes."""

    entries: Mapping[str, Entry]
    records: tuple[Record, ...]
    findings: tuple[Finding, ...] = ()
    unshaped: frozenset[str] = frozenset()


class RankPart(Struct, frozen=True):
    """A part of a tensor in one rank's file."""

    state: State
    box: Box
    tensor: TensorRef


def joined(states: Sequence[State], saved: Saved, sources: Sources) -> Table:
    """The tensors that the ranks hold together.

    Raises `IncompleteError`, `FormatError`.
    """
    check_names(states)
    world = saved.world or stated_world(states)
    if world is not None:
        saved.check_ranks(world)
    missing = NOTHING_MISSING if world is None else saved.missing(world)
    entries: dict[str, Entry] = {}
    records: dict[str, list[Record]] = {}
    first: dict[tuple[object, ...], str] = {}
    for name in states[0].tensors:
        held = parts_of(name, states, sources)
        entry = entry_of(name, states[0].tensors[name], held, saved, missing)
        key = tuple((h.state.rank, h.tensor.storage, h.tensor.strides) for h in held)
        earlier = first.setdefault((entry.spec.shape, key), name) if entry.fragments else name
        if earlier != name and entry.spec.numel:
            entries[earlier] = replace(entries[earlier], aliases=(*entries[earlier].aliases, name))
            continue
        entries[name] = entry
        if len(held) > 1:
            records[name] = records_of(held)
    copies.check(records, sources)
    return Table(
        entries,
        tuple(record for state in states for record in state.records),
        _replicas_missing(missing),
    )


def stated_world(states: Sequence[State]) -> int | None:
    """The number of ranks as the distributed tensors state it; None where there are none."""
    worlds = [v.world for state in states for v in state.tensors.values() if isinstance(v, Local)]
    return max((world for world in worlds if world is not None), default=None)


def check_names(states: Sequence[State]) -> None:
    """All ranks must hold the same names."""
    for state in states[1:]:
        apart = state.tensors.keys() ^ states[0].tensors.keys()
        if apart:
            raise FormatError(
                f"{len(apart)} of its names and those of {states[0].path.name} differ, such as "
                f"{min(apart)!r}: files of different saves are mixed.",
                path=state.path,
                hint=_ONE_SAVE,
            )


def parts_of(name: str, states: Sequence[State], sources: Sources) -> list[RankPart]:
    """The different boxes of a tensor that the ranks hold, each once; replicas are compared.

    Raises `FormatError` where ranks contradict each other.
    """
    first = states[0].tensors[name]
    parts: dict[Box, RankPart] = {}
    for state in states:
        value = state.tensors[name]
        if _described(value) != _described(first):
            raise FormatError(
                f"it is {_words(value)} here, but {_words(first)} in {states[0].path.name}: files "
                "of different saves are mixed.",
                path=state.path,
                tensor=name,
                hint=_ONE_SAVE,
            )
        for held in _parts(state, value):
            other = parts.setdefault(held.box, held)
            if other is not held and not _same(held, other, sources):
                raise FormatError(
                    f"it must equal the copy in {other.state.path.name}, at {held.box.offsets}, "
                    "but the values differ.",
                    path=state.path,
                    tensor=name,
                    hint=_ONE_SAVE,
                )
    return [held for box, held in parts.items() if box.numel or not box.shape]


def _parts(state: State, value: TensorRef | Local) -> list[RankPart]:
    if isinstance(value, TensorRef):
        return [RankPart(state, value.fragment().box, value)]
    return [RankPart(state, piece.box, piece.tensor) for piece in value.fragments]


def _described(value: TensorRef | Local) -> tuple[object, ...]:
    """What all ranks must agree on about a tensor."""
    if isinstance(value, TensorRef):
        return ("Tensor", value.dtype, value.shape)
    return (value.kind, value.dtype, value.shape, value.layout)


def _words(value: TensorRef | Local) -> str:
    kind = "plain" if isinstance(value, TensorRef) else f"a {value.kind}"
    more = "" if isinstance(value, TensorRef) else f" laid out as {_brief(value.layout)}"
    return f"{kind}, {value.dtype} {value.shape}{more}"


def _brief(layout: tuple[object, ...]) -> str:
    text = repr(layout)
    return text if len(text) < 120 else f"{text[:120]}..."


def records_of(parts: Sequence[RankPart]) -> list[Record]:
    """The checksums of these parts' storages, of the files that state them."""
    found = (each.state.record(each.tensor.extent) for each in parts)
    return [record for record in found if record is not None]


def entry_of(
    name: str,
    first: TensorRef | Local,
    parts: Sequence[RankPart],
    saved: Saved,
    missing: Missing = NOTHING_MISSING,
) -> Entry:
    """A tensor made of these parts, which must tile it; `first` is what the first rank states of
    it.

    Raises `IncompleteError`, `FormatError`.
    """
    spec = TensorSpec(name, first.dtype, first.shape)
    fragments = tuple(each.tensor.fragment(each.box) for each in parts) if spec.numel else ()
    try:
        with at(saved.folder):
            return proven(spec, fragments, "parameter" if spec.dtype.floating else "buffer")
    except IncompleteError:
        if missing.count:
            raise ranks_missing(missing, saved) from None
        raise


def ranks_missing(missing: Missing, saved: Saved) -> IncompleteError:
    """The error of a folder without the files of some ranks."""
    return IncompleteError(
        f"of {missing.count + len(saved.files)} ranks' files, {missing.count} "
        f"{'is' if missing.count == 1 else 'are'} missing: {missing}.",
        path=saved.folder,
        hint="Copy the files of all ranks, from all nodes if each kept its own.",
    )


def _replicas_missing(missing: Missing) -> tuple[Finding, ...]:
    if not missing.count:
        return ()
    message = (
        f"the files of these ranks are missing: {missing}; all that they held is in the others' "
        "(replicas, or ranks that own nothing)."
    )
    return (Finding("replicas-missing", message, subject=missing.names[0]),)


def same_parts(
    state: State, one: TensorRef | Local, other: TensorRef | Local, sources: Sources
) -> bool:
    """Whether a rank holds the same boxes of two tensors, with the same bytes in them."""
    pairs = zip(_parts(state, one), _parts(state, other), strict=False)
    alike = _described(one) == _described(other)
    return alike and all(a.box == b.box and _same(a, b, sources) for a, b in pairs)


def beginning(state: State, tensor: TensorRef | Local, sources: Sources) -> bytes:
    """The first bytes that a rank holds of a tensor: what differs there needs no closer look."""
    for part in _parts(state, tensor):
        extent = part.tensor.extent
        if extent.nbytes:
            return sources.open(extent.file).read(extent.offset, min(extent.nbytes, _BEGINNING))
    return b""


def _same(one: RankPart, other: RankPart, sources: Sources) -> bool:
    """Whether two files hold the same bytes: by their checksums, else by reading them."""
    mine, theirs = one.tensor, other.tensor
    if one.state.path == other.state.path and mine.storage == theirs.storage:
        return True
    if mine.strides != theirs.strides or mine.extent.nbytes != theirs.extent.nbytes:
        return False
    records = [one.state.record(mine.extent), other.state.record(theirs.extent)]
    if all(
        record is not None and record.extent == tensor.extent
        for record, tensor in zip(records, (mine, theirs), strict=True)
    ):
        return records[0].crc32 == records[1].crc32  # type: ignore[union-attr]
    for start in range(0, mine.extent.nbytes, _PIECE):
        nbytes = min(_PIECE, mine.extent.nbytes - start)
        left, right = (
            sources.open(t.extent.file).read(t.extent.offset + start, nbytes)
            for t in (mine, theirs)
        )
        if left != right:
            return False
    return True
