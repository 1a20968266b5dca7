"""Tensor parallel ranks: what each holds, joined to whole parameters.

    mp_rank_00_model_states.pt                    each rank's files are a checkpoint of its parts,
    [bf16_]zero_pp_rank_<D>_mp_rank_00_optim_states.pt   read as one without tensor parallelism is
    mp_rank_01_model_states.pt
    [bf16_]zero_pp_rank_<D>_mp_rank_01_optim_states.pt

Only `universal_checkpoint_info`, which AutoTP writes and Megatron does not, says how the parts form
the full tensor. What several ranks hold is taken from the first of them, and a sample of the others
must equal it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec.structs import replace

from reshard.core import rearrange
from reshard.core.catalog import Catalog
from reshard.core.tensors import Box, Entry, TensorSpec
from reshard.core.tiling import proven
from reshard.errors import FormatError, IncompleteError, UnsupportedError, listed
from reshard.formats.deepspeed import parallel_info, proof
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.parallel_info import ParallelInfo
from reshard.formats.deepspeed.place import Location, absent, describe_extra
from reshard.formats.deepspeed.sharding import Block, Sharding, replicated
from reshard.storage.local import Sources


def check(location: Location, saved: Sequence[Saved], sources: Sources) -> list[Saved]:
    """Prove that all model parallel ranks are there and of one save; returns them, ready for
    reading.

    Only global rank 0 writes which parameters are tied, so all ranks get what it wrote. Raises
    `IncompleteError`, `FormatError`, `UnsupportedError`.
    """
    check_ranks(location, saved)
    if len(saved) > 1:
        _check_handled(location, saved)
    check_one_save(saved, sources)
    first = saved[0].model[0]
    model = [tuple(replace(file, shared=first.shared) for file in one.model) for one in saved]
    return [replace(one, model=files) for one, files in zip(saved, model, strict=True)]


def check_ranks(location: Location, saved: Sequence[Saved]) -> None:
    """All model parallel ranks must be there, and no more. Raises `IncompleteError`,
    `FormatError`."""
    first = saved[0].model[0]
    world_size = first.mp_world_size or len(saved)
    missing = absent(location.mp_ranks, world_size, location.folder)
    extra = [rank for rank in location.mp_ranks if rank >= world_size]
    if missing:
        beyond = f"; {describe_extra(extra, 'model parallel rank')}" if extra else ""
        raise IncompleteError(
            f"the files of model parallel rank {missing[0]} of {world_size} (mp_rank_"
            f"{missing[0]:02d}) are missing{beyond}.",
            path=location.folder,
            hint="Copy every rank's files.",
        )
    if len(saved) > world_size:
        raise FormatError(
            f"it holds files of {len(saved)} model parallel ranks, and the model files state "
            f"{world_size}: files of different saves are mixed.",
            path=location.folder,
            hint="Remove the files that an older save left.",
        )


def check_one_save(saved: Sequence[Saved], sources: Sources) -> None:
    """All model parallel ranks must state the same version, stage and step. Raises
    `FormatError`."""
    for other in saved[1:]:
        _check_same_save(saved[0], other, sources)


def join(saved: Sequence[Saved], parts: Sequence[Catalog], sources: Sources) -> Catalog:
    """The catalog of the whole, given those of all tensor parallel ranks, in order."""
    join_one = joiner(saved, sources)
    _check_names(saved, parts)
    entries = {name: join_one([part.entries[name] for part in parts]) for name in parts[0].entries}
    origin = parts[0].origin
    return replace(
        parts[0],
        entries=entries,
        records=tuple(dict.fromkeys(record for part in parts for record in part.records)),
        findings=tuple(dict.fromkeys(f for part in parts for f in part.findings)),
        origin=replace(
            origin,
            world_size=origin.world_size and origin.world_size * len(parts),
            details={**origin.details, "tensor_parallel": len(parts)},
        ),
    )


def joiner(saved: Sequence[Saved], sources: Sources) -> Callable[[Sequence[Entry]], Entry]:
    """What joins one tensor, given as all tensor parallel ranks hold it, in order."""
    first = saved[0].model[0]
    info = parallel_info.parse(first.parallel_info or {}, first.path)

    def join_one(parts: Sequence[Entry]) -> Entry:
        sharding = _sharding(info, parts)
        for block in sharding.blocks:
            copies = [_cropped(parts, block, number) for number in range(len(block.held))]
            for copy in copies[1:]:
                proof.check_replicas(copies[0], copy, sources)
        return _joined(parts, sharding)

    return join_one


def _check_handled(location: Location, saved: Sequence[Saved]) -> None:
    """Only tensor parallelism, and only where the files say how it split the parameters."""
    problem = None
    if any(one.model[0].pipeline_stages > 1 for one in saved):
        problem = "it was trained with pipeline parallelism"
    elif location.experts:
        problem = "it was trained with experts under tensor parallelism"
    elif location.universal:
        problem = "it is a universal checkpoint of tensor parallel ranks"
    if problem is not None:
        raise UnsupportedError(f"{problem}, which is not supported.", path=location.folder)
    for one in saved:
        if one.model[0].parallel_info is None:
            raise UnsupportedError(
                f"it was trained with tensor parallelism over {len(saved)} ranks, but it does not "
                "state how these split the parameters: it has no universal_checkpoint_info, "
                "which Megatron and AutoTP before DeepSpeed 0.18.9 do not write.",
                path=one.model[0].path,
                hint="Load and save it once with AutoTP of DeepSpeed 0.19.8, or export it with the "
                "framework that trained it.",
            )


def _check_same_save(one: Saved, other: Saved, sources: Sources) -> None:
    """Two tensor parallel ranks must have the same version, steps and data parallel ranks."""
    mine, theirs = one.model[0], other.model[0]
    for what, first, second in (
        ("DeepSpeed version", mine.version, theirs.version),
        ("global step", mine.steps, theirs.steps),
        ("ZeRO stage", one.stage, other.stage),
        ("number of data parallel ranks", len(one.optim), len(other.optim)),
    ):
        if first != second:
            raise FormatError(
                f"its {what} is {second}, that of {mine.path.name} is {first}: files of different "
                "saves are mixed.",
                path=theirs.path,
                hint="Copy all files of one save.",
            )
    if one.optim:
        proof.check_steps((one.optim[0], other.optim[0]), sources)


def _check_names(saved: Sequence[Saved], parts: Sequence[Catalog]) -> None:
    for one, part in zip(saved, parts, strict=True):
        differing = sorted(part.entries.keys() ^ parts[0].entries.keys())
        if differing:
            raise FormatError(
                f"it and {saved[0].model[0].path.name} do not hold the same tensors: only one of "
                f"them has {listed(differing, 5)}.",
                path=one.model[0].path,
                hint="Copy all files of one save.",
            )


def _sharding(info: ParallelInfo, parts: Sequence[Entry]) -> Sharding:
    """How the ranks split a tensor. No buffer is ever split, and no list mentions any."""
    shapes = [entry.spec.shape for entry in parts]
    if parts[0].kind != "buffer":
        return info.sharding(parts[0].spec.name, shapes)
    try:
        return replicated(shapes)
    except ValueError as problem:
        raise FormatError(f"{problem}.", path=info.path, tensor=parts[0].spec.name) from None


def _joined(parts: Sequence[Entry], sharding: Sharding) -> Entry:
    """The whole tensor, each block from the first rank that holds it."""
    # A rank may hold no element of a parameter; then no optimizer has it, and its dtype differs.
    like = next((entry for entry in parts if entry.spec.numel), parts[0])
    fragments = []
    for block in sharding.blocks:
        part = _cropped(parts, block, 0)
        if part.spec.dtype != like.spec.dtype:
            raise FormatError(
                f"its dtype is {like.spec.dtype} on one tensor parallel rank and "
                f"{part.spec.dtype} on another.",
                tensor=like.spec.name,
            )
        for fragment in rearrange.unflatten(part).fragments:
            offsets = tuple(a + b for a, b in zip(fragment.box.offsets, block.at, strict=True))
            box = Box(sharding.shape, offsets, fragment.box.sizes)
            fragments.append(replace(fragment, box=box))
    spec = TensorSpec(like.spec.name, like.spec.dtype, sharding.shape)
    return proven(spec, fragments, like.kind, parts[0].aliases)


def _cropped(parts: Sequence[Entry], block: Block, number: int) -> Entry:
    """A block as the `number`-th of the ranks that have it holds it."""
    rank, start = block.held[number]
    entry = parts[rank]
    return rearrange.crop(entry, Box(entry.spec.shape, start, block.sizes))
