"""Stages 0, 1 and 2, and BF16_Optimizer: flat parameter groups, cut into equal partitions."""

from __future__ import annotations

import math
from collections.abc import Mapping

from reshard.core.catalog import Catalog
from reshard.core.tensors import Entry, TensorKind, TensorSpec
from reshard.core.tiling import proven
from reshard.errors import FormatError, IncompleteError
from reshard.formats.deepspeed import experts, proof, unnamed
from reshard.formats.deepspeed.aliases import other_names
from reshard.formats.deepspeed.describe import describe
from reshard.formats.deepspeed.experts import holds_experts
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.flat import flat_space, in_module_order, stored_entry
from reshard.formats.deepspeed.parse import ModelFile, OptimFile, Shapes, refuse_unread
from reshard.formats.deepspeed.place import Location
from reshard.storage.local import Sources


def catalog(location: Location, saved: Saved, sources: Sources) -> Catalog:
    """The masters of all groups, and from the module what has no master."""
    entries = parameters(saved)
    if saved.optim:
        proof.check_steps(saved.optim, sources)
        proof.check_masters(saved.module, entries, sources)
    elif (saved.model[0].masters or saved.model[0].flat_masters) and not saved.experts:
        entries = unnamed.masters(saved, sources) or {}
        proof.check_masters(saved.module, entries, sources)
    return describe(location, saved, complete(entries, saved))


def parameters(saved: Saved) -> dict[str, Entry]:
    """The flat tensors of all groups, cut into parameters; none without ZeRO."""
    entries: dict[str, Entry] = {}
    if saved.optim:
        for number, shapes in enumerate(saved.model[0].groups):
            entries.update(_group(number, shapes, saved))
    return entries


def complete(masters: Mapping[str, Entry], saved: Saved) -> dict[str, Entry]:
    """The masters, and from the module what has none: buffers, frozen parameters, other names.

    `exclude_frozen_parameters` takes a frozen parameter out of the module under its first name
    only (runtime/engine.py, `module_state_dict`): of a tied one the other name still holds
    the weights.
    """
    model, module = saved.model[0], saved.module
    entries = dict(masters)
    aliases = other_names(model, entries)
    refuse_unread(model, model.unread.keys() - entries.keys() - aliases.keys())
    for name, tensor in module.items():
        owner = aliases.get(name, name)
        if owner not in entries and (owner == name or owner not in module):
            entries[owner] = stored_entry(owner, tensor, _kind(owner, model, zero=bool(masters)))
    return in_module_order(entries, aliases, module)


def _group(number: int, shapes: Shapes, saved: Saved) -> dict[str, Entry]:
    """The parameters of one group, of all experts where it is theirs."""
    if not holds_experts(shapes):
        return _cut(number, shapes, saved.optim)
    entries = {}
    for rank in experts.ranks(number, shapes, saved):
        for name, entry in _cut(number, shapes, rank.optim).items():
            entries[rank.names[name]] = entry.renamed(rank.names[name])
    return entries


def _cut(number: int, shapes: Shapes, optim: tuple[OptimFile, ...]) -> dict[str, Entry]:
    """The parameters of one group, which the files of `optim` share.

    `shapes` is in the order in which they lie in it.
    """
    if number >= len(optim[0].flats):
        raise FormatError(
            f"it has {len(optim[0].flats)} flat groups, but the model file lists {number + 1} or "
            "more: files of different saves are mixed.",
            path=optim[0].path,
        )
    paddings = (0,) * len(shapes)
    if optim[0].paddings is not None:
        paddings = optim[0].paddings[number]
    if len(paddings) != len(shapes):
        raise FormatError(
            f"group {number} has {len(shapes)} parameters and {len(paddings)} paddings.",
            path=optim[0].path,
        )
    needed = sum(math.prod(shape) for shape in shapes.values()) + sum(paddings)
    _check_partitions(number, needed, optim)
    space = flat_space([file.flats[number] for file in optim])
    dtype = optim[0].flats[number].dtype
    entries = {}
    at = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        spec = TensorSpec(name, dtype, shape)
        entries[name] = proven(spec, space.fragments(at, spec.numel, spec.numel, 0), "parameter")
        at += spec.numel + padding
    return entries


def _check_partitions(number: int, needed: int, optim: tuple[OptimFile, ...]) -> None:
    """Each rank's part must have the length that DeepSpeed gives it.

    Partitions are equal, the group padded to a multiple of 2 * world size. ZeRO-1 and 2 drop the
    padding when they save (stage_1_and_2.py, _get_groups_without_padding), so the last parts are
    shorter or empty; BF16_Optimizer keeps it.
    """
    lengths = [file.flats[number].shape[0] for file in optim]
    world_size = len(lengths)
    full = lengths[0]
    trimmed = [min(full, max(0, needed - rank * full)) for rank in range(world_size)]
    aligned = -(-needed // (2 * world_size)) * 2 * world_size
    padded = [full] * world_size if needed <= full * world_size <= aligned else trimmed
    for rank, length in enumerate(lengths):
        if lengths != padded and length != trimmed[rank]:
            raise IncompleteError(
                f"rank {rank} holds {length} elements of group {number}, but must hold "
                f"{trimmed[rank]}: its parameters have {needed} elements, and there are "
                f"{world_size} ranks.",
                path=optim[rank].path,
                hint="The files come from different runs, or files of ranks were renamed.",
            )
    if sum(lengths) < needed:
        raise IncompleteError(
            f"the ranks hold {sum(lengths)} elements of group {number}, but its parameters have "
            f"{needed}.",
            path=optim[0].path,
            hint="The files come from different saves, or a rank's file is missing.",
        )


def _kind(name: str, model: ModelFile, *, zero: bool) -> TensorKind:
    if name in model.buffers:
        return "buffer"
    return "frozen" if zero else "parameter"
