"""Stage 3: every parameter cut into as many equal pieces as there are ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.partition import Ranks, partitioned
from reshard.core.tensors import Entry, Fragment, TensorSpec
from reshard.core.tiling import proven
from reshard.errors import FormatError, IncompleteError, UnsupportedError, listed
from reshard.formats.deepspeed import proof
from reshard.formats.deepspeed.describe import describe
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.flat import flat_space, in_module_order, stored_entry
from reshard.formats.deepspeed.parse import Shapes, refuse_unread
from reshard.formats.deepspeed.place import Location
from reshard.storage.local import Sources


def catalog(
    location: Location, saved: Saved, sources: Sources, *, allow_step_mismatch: bool
) -> Catalog:
    """The masters of all sub-groups, frozen pieces and buffers from the model files."""
    proof.check_steps(saved.optim, sources)
    proof.check_copies(saved.optim, sources)
    proof.check_frozen_copies(saved.model, sources)
    if not allow_step_mismatch:
        proof.check_model_step(saved, sources)
    entries, findings = complete(parameters(saved), saved)
    return describe(location, saved, entries, findings)


def parameters(saved: Saved) -> dict[str, Entry]:
    """The flat tensors of all sub-groups, cut into parameters."""
    return {entry.spec.name: entry for entry in _parameters(saved)}


def complete(masters: Mapping[str, Entry], saved: Saved) -> tuple[dict[str, Entry], list[Finding]]:
    """The masters, and from the model files what has none: frozen parameters, buffers, other names.

    With it the findings on what nothing has.
    """
    model = saved.model[0]
    entries = dict(masters)
    entries.update((entry.spec.name, entry) for entry in _frozen(saved))
    refuse_unread(model, model.buffers - entries.keys())
    for name in model.buffers:
        if name in model.module:
            entries[name] = stored_entry(name, model.module[name], "buffer")
    shared = model.shared or {}
    aliases = {
        alias: stored
        for alias, stored in shared.items()
        # A frozen parameter that was excluded leaves its other names, as empty placeholders.
        if alias not in entries and stored in entries
    }
    known = entries.keys() | aliases.keys()
    findings = []
    absent = [name for name in model.module if name not in known]
    if absent:
        message = (
            f"{len(absent)} of the names have no weights, as frozen parameters that "
            f"were excluded, or saved before DeepSpeed 0.9.1: {listed(absent, 5)}."
        )
        findings.append(Finding("names-without-weights", message))
    return in_module_order(entries, aliases, model.module), findings


def _parameters(saved: Saved) -> Iterator[Entry]:
    """Walk the sub-groups: a rank's flat group is one piece of each of its parameters, in order."""
    groups = saved.model[0].groups
    _check_lengths(groups, saved)
    ranks = Ranks([flat_space(file.flats) for file in saved.optim])
    cursor = 0
    for name, shape in (item for group in groups for item in group.items()):
        entry = partitioned(name, shape, ranks, cursor)
        yield entry
        cursor += ranks.piece(entry.spec.numel)


def _check_lengths(groups: tuple[Shapes, ...], saved: Saved) -> None:
    """Every rank's flat groups must be as long as the pieces they hold.

    Since 0.5.4 the lists of shapes and the flat groups correspond one to one; before, only their
    concatenations did.
    """
    world_size = len(saved.optim)
    needed = [
        sum(-(-math.prod(shape) // world_size) for shape in group.values()) for group in groups
    ]
    for rank, file in enumerate(saved.optim):
        lengths = [flat.shape[0] for flat in file.flats]
        matches = lengths == needed if len(lengths) == len(needed) else sum(lengths) == sum(needed)
        if matches:
            continue
        if 0 in lengths and any(needed):
            raise UnsupportedError(
                f"rank {rank}'s fp32 weights are not in the file: the optimizer was offloaded to "
                "NVMe, whose swap files are not supported.",
                path=file.path,
                hint="Save with DeepSpeed's save_16bit_model, or without NVMe offload.",
            )
        raise IncompleteError(
            f"rank {rank} holds flat groups of {lengths} elements, but the parameters and "
            f"{world_size} ranks need {needed}.",
            path=file.path,
            hint="The files come from different runs or world sizes.",
        )


def _frozen(saved: Saved) -> Iterator[Entry]:
    """Frozen parameters: each model file holds its rank's piece, in the training dtype."""
    world_size = len(saved.model)
    for name, shape in saved.model[0].frozen_shapes.items():
        numel = math.prod(shape)
        piece = -(-numel // world_size)
        fragments: list[Fragment] = []
        dtype = None
        for rank, file in enumerate(saved.model):
            part = file.frozen_fragments.get(name)
            if part is None or part.shape != (piece,):
                found = "none" if part is None else f"{part.shape[0] if part.shape else 1}"
                raise FormatError(
                    f"rank {rank} should hold {piece} of its elements, but holds {found}.",
                    path=file.path,
                    tensor=name,
                )
            dtype = part.dtype
            at = min(rank * piece, numel)
            length = min(piece, numel - at)
            fragments += flat_space([part]).fragments(0, length, numel, at)
        if dtype is not None:
            yield proven(TensorSpec(name, dtype, shape), fragments, "frozen")
