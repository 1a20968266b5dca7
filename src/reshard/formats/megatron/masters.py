"""The fp32 masters that the optimizer's state holds, in the shapes of the model's tensors.

    optimizer.state.fp32_param.KEY                ordinary mixed precision: as KEY is shaped
    optimizer.state.param.KEY                     fully_reshardable: the same
    optimizer.state.fp32_param.KEY [2, 2, 1, n]   fully_sharded_model_space, megatron-core 0.12:
                                                  blocks of a grid of 2 x 2 x 1, each flattened
    optimizer.distributed.dp_group_idx_0...       dp_reshardable: buckets without names;
                                                  dp_zero_gather_scatter: one object

Of several optimizers the keys begin with `chained_0.`. Read off megatron-core 0.12 and 0.16
(optimizer/distrib_optimizer.py, dist_checkpointing/strategies/resharding.py) and files they wrote.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec.structs import replace

from reshard.containers.dcp.metadata import Metadata
from reshard.core import rearrange
from reshard.core.findings import Finding
from reshard.core.regex import regex
from reshard.core.tensors import Entry, Shape
from reshard.errors import FormatError, NotFoundError, UnsupportedError, listed

#: The optimizer's tensors; of several optimizers (experts have one of their own) with a number.
OPTIMIZER = regex(r"(?:chained_\d+\.)?optimizer\..+")
#: What the state calls masters, and what they are called here.
KINDS, MASTER = ("fp32_param", "param"), "master"
_MASTER = regex(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")
_DISTRIBUTED = r"(?:chained_\d+\.)?optimizer\.distributed\."
_UNNAMED = regex(rf"{_DISTRIBUTED}.+")
_GATHERED = regex(rf"{_DISTRIBUTED}.*\.param_state(?:/.+)?")
_LISTED = 5


def named(metadata: Metadata, keys: Iterable[str], folder: Path) -> dict[str, str]:
    """The key of the master of each of the model's tensors that has one.

    Raises `UnsupportedError` where masters have no names, `NotFoundError` where there are none.
    """
    mine = set(keys)
    names: dict[str, str] = {}
    for key in metadata.tensors:
        match = _MASTER.fullmatch(key)
        if match is None or match[1] not in mine:
            continue
        if match[1] in names:
            raise FormatError(
                f"it and {names[match[1]]!r} are masters of one tensor.", path=folder, tensor=key
            )
        names[match[1]] = key
    if names:
        return names
    refuse_unnamed(metadata, folder, "fp32 masters", "Leave out --masters.")
    raise NotFoundError(
        "it holds no fp32 masters: the run trained in float32, or saved no optimizer.",
        path=folder,
        hint="Leave out --masters.",
    )


def refuse_unnamed(metadata: Metadata, folder: Path, what: str, otherwise: str) -> None:
    """Raise `UnsupportedError` where the optimizer's state lies in parts that name nothing."""
    kinds = (
        (metadata.tensors, _UNNAMED, "buckets, which do not name their contents (dp_reshardable)"),
        (
            metadata.objects,
            _GATHERED,
            "object, which is not opened, and names nothing (dp_zero_gather_scatter)",
        ),
    )
    for held, pattern, where in kinds:
        if any(map(pattern.fullmatch, held)):
            raise UnsupportedError(
                f"the {what} lie in the optimizer's {where}.",
                path=folder,
                hint=f"{otherwise} Or load the checkpoint into the run, and save it with "
                "--dist-ckpt-optim-fully-reshardable.",
            )


def placed(
    entries: Mapping[str, Entry], keys: Mapping[str, str], folder: Path
) -> tuple[dict[str, Entry], tuple[Finding, ...]]:
    """The model's tensors with the masters in their places; `entries` holds both, by their keys.

    Raises `FormatError` where a master is not of its tensor's shape.
    """
    taken = set(keys.values())
    masters = {name: entry for name, entry in entries.items() if name not in taken}
    for name, key in keys.items():
        model = masters[name]
        masters[name] = replace(
            shaped(entries[key], model.spec.shape, folder).renamed(name),
            kind=model.kind,
            aliases=model.aliases,
        )
    lacking = [n for n, e in masters.items() if n not in keys and e.spec.dtype.itemsize == 2]
    if not lacking:
        return masters, ()
    message = (
        f"{len(lacking)} tensors of 16 bits have no fp32 master, as those that were frozen: "
        f"{listed(lacking, _LISTED)}."
    )
    return masters, (Finding("masters-missing", message),)


def shaped(entry: Entry, shape: Shape, folder: Path) -> Entry:
    """The master in the shape of the model's tensor: as it is, or assembled from its blocks."""
    own = entry.spec.shape
    if own == shape:
        return entry
    grid, numel = own[:-1], own[-1] if own else 0
    even = len(grid) == len(shape) and all(
        count and size % count == 0 for size, count in zip(shape, grid, strict=True)
    )
    block = tuple(size // count for size, count in zip(shape, grid, strict=True)) if even else ()
    if not even or math.prod(block) != numel:
        raise FormatError(
            f"its shape is {own}, and the model's tensor has {shape}.",
            path=folder,
            tensor=entry.spec.name,
        )
    return _joined(entry, block, 0)


def _joined(entry: Entry, block: Shape, dim: int) -> Entry:
    """Blocks in row-major order of their grid, each flattened, as one tensor."""
    if len(entry.spec.shape) == 1:
        return rearrange.reshape(entry, block)
    parts = [_joined(row, block, dim + 1) for row in rearrange.rows(entry)]
    return parts[0] if len(parts) == 1 else rearrange.concat(parts, dim)
