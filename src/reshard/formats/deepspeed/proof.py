"""Proof from their contents that the files of a folder come from one save.

DeepSpeed writes each rank's file separately, and only the file's name says which rank wrote it. A
copied, renamed or stale file has the right shapes. This module reads what reveals it: step counts,
checksums that two ranks should not share, and for stages 1 and 2 a sample of the weights, which the
model file holds a second time, rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reshard.containers.torch import TensorRef
from reshard.core.dtypes import DType
from reshard.core.rearrange import crop, unflatten
from reshard.core.tensors import Box, Entry, Extent, Record
from reshard.errors import FormatError
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.parse import ModelFile, OptimFile
from reshard.storage.local import Sources

Array = np.ndarray[Any, Any]

# Elements compared at the start and in the middle of each fragment.
_SAMPLE = 32
# Bytes that stand for a tensor without a checksum, at its start, middle and end.
_PIECE = 4096
_ONE_SAVE = "Copy all files of one save."


def check_steps(optim: tuple[OptimFile, ...], sources: Sources) -> None:
    """All ranks' optimizers must have made the same number of steps."""
    first = _step(optim[0], sources)
    for other in optim[1:]:
        step = _step(other, sources)
        if step != first:
            raise FormatError(
                f"its optimizer is at step {step}, that of {optim[0].path.name} at step {first}: "
                "files of different saves are mixed.",
                path=other.path,
                hint=_ONE_SAVE,
            )


def check_model_step(saved: Saved, sources: Sources) -> None:
    """The model files' step count must be the optimizer's (stage 3: nothing else ties them)."""
    model = saved.model[0]
    step = _step(saved.optim[0], sources)
    if model.steps is None or step is None or step == model.steps - model.skipped:
        return
    raise FormatError(
        f"its optimizer is at step {step}, and {model.path.name} was saved after "
        f"{model.steps - model.skipped} steps: files of different saves are mixed.",
        path=saved.optim[0].path,
        hint=f"{_ONE_SAVE} If the optimizer was restarted on purpose, pass --allow-step-mismatch.",
    )


def check_copies(optim: tuple[OptimFile, ...], sources: Sources) -> None:
    """No two ranks may hold the same weights and moments: one file is then a copy of the other."""
    held = {file.path: (*file.flats, *file.moments) for file in optim}
    _check_distinct(held, [record for file in optim for record in file.records], sources)


def check_frozen_copies(model: tuple[ModelFile, ...], sources: Sources) -> None:
    """No two ranks may hold the same parts of frozen parameters (stage 3)."""
    held = {file.path: tuple(file.frozen_fragments.values()) for file in model}
    _check_distinct(held, [record for file in model for record in file.records], sources)


def _check_distinct(
    held: Mapping[Path, tuple[TensorRef, ...]], records: list[Record], sources: Sources
) -> None:
    """The tensors of two files may not all be the same. Legacy containers have no checksums:
    samples replace them."""
    crc = {(record.extent.file.path, record.extent.offset): record.crc32 for record in records}
    seen: dict[tuple[object, ...], Path] = {}
    for path, tensors in held.items():
        full = [tensor for tensor in tensors if tensor.extent.nbytes]
        if not full:
            continue
        key = tuple(
            (t.extent.nbytes, crc.get((t.extent.file.path, t.extent.offset)) or _sample(t, sources))
            for t in full
        )
        earlier = seen.setdefault(key, path)
        if earlier != path and not all(_constant(tensor, sources) for tensor in full):
            raise FormatError(
                f"it holds exactly what {earlier.name} holds: it is a copy of another rank's file.",
                path=path,
                hint="Copy each rank's own file.",
            )


def check_masters(
    module: Mapping[str, TensorRef], entries: Mapping[str, Entry], sources: Sources
) -> None:
    """The masters, rounded to the module's dtype, must be the module's weights (stages 1 and 2).

    A sample of every fragment is compared, so each rank's file is checked for its own part.
    """
    for name, entry in entries.items():
        stored = module.get(name)
        if stored is None:
            continue
        if stored.shape != entry.spec.shape:
            raise FormatError(
                f"its shape is {stored.shape} in the module and {entry.spec.shape} in the list "
                "of parameters.",
                path=stored.extent.file.path,
                tensor=name,
            )
        if stored.strides is not None:
            continue
        for master, rounded in _samples(entry, stored):
            values = _numbers(master, entry.spec.dtype, sources).astype(stored.dtype.numpy)
            if not _same(values, _numbers(rounded, stored.dtype, sources)):
                raise FormatError(
                    f"its weights in {_file(master)} differ from those in {_file(rounded)}: the "
                    "files come from different saves or ranks.",
                    path=Path(stored.extent.file.path).parent,
                    tensor=name,
                    hint=_ONE_SAVE,
                )


def check_replicas(one: Entry, other: Entry, sources: Sources) -> None:
    """Two ranks' copies of one tensor must be the same. A sample of every fragment is compared."""
    for fragment in (*unflatten(one).fragments, *unflatten(other).fragments):
        for run in _runs(fragment.box):
            first, second = (_run(entry, run, sources) for entry in (one, other))
            if not _same(first, second):
                raise FormatError(
                    "two ranks must hold the same values of it, but do not: "
                    f"{first.ravel()[:1]} and {second.ravel()[:1]} at {run.offsets}.",
                    path=Path(fragment.in_file.file.path).parent,
                    tensor=one.spec.name,
                    hint=_ONE_SAVE,
                )


def _runs(box: Box) -> Iterator[Box]:
    """Short runs along the last dimension, from the box's start and from its middle."""
    if not box.shape:
        yield box
        return
    sizes = (1,) * (len(box.sizes) - 1) + (min(_SAMPLE, box.sizes[-1]),)
    middle = tuple(o + (n - m) // 2 for o, n, m in zip(box.offsets, box.sizes, sizes, strict=True))
    for offsets in {box.offsets, middle}:
        yield Box(box.shape, offsets, sizes)


def _run(entry: Entry, box: Box, sources: Sources) -> Array:
    """The elements of a box that is a run along the last dimension."""
    pieces = sorted(crop(entry, box).fragments, key=lambda piece: piece.box.offsets)
    values = [
        _numbers(piece.in_file, piece.dtype, sources)[:: piece.strides[-1] if piece.strides else 1]
        for piece in pieces
    ]
    return np.concatenate(values)


def _samples(entry: Entry, stored: TensorRef) -> Iterator[tuple[Extent, Extent]]:
    """Pairs of places that hold the same elements, as master and as module weight."""
    for fragment in entry.fragments:
        (start,), (length,) = fragment.box.offsets, fragment.box.sizes
        for at in {0, length // 2}:
            count = min(_SAMPLE, length - at)
            size, half = fragment.dtype.itemsize, stored.dtype.itemsize
            yield (
                Extent(fragment.in_file.file, fragment.extent.offset + at * size, count * size),
                Extent(
                    stored.extent.file,
                    stored.extent.offset + (start + at) * half,
                    count * half,
                ),
            )


def _step(file: OptimFile, sources: Sources) -> int | None:
    """The step count, read from the file where it is stored as a tensor."""
    if not isinstance(file.step, TensorRef):
        return file.step
    step = _numbers(file.step.extent, file.step.dtype, sources)[0]
    if not np.isfinite(step):
        raise FormatError(f"its optimizer's step count is {step}.", path=file.path)
    return int(step.real)


def _sample(tensor: TensorRef, sources: Sources) -> bytes:
    """Some of a tensor's bytes: from its start, its middle and its end."""
    extent = tensor.extent
    nbytes = min(extent.nbytes, _PIECE)
    starts = (0, (extent.nbytes - nbytes) // 2, extent.nbytes - nbytes)
    source = sources.open(extent.file)
    return b"".join(source.read(extent.offset + start, nbytes) for start in starts)


def _constant(tensor: TensorRef, sources: Sources) -> bool:
    """Whether the first values are all the same: two ranks can hold equal parts of this kind."""
    size = tensor.dtype.itemsize
    nbytes = min(tensor.extent.nbytes, 4096 * size)
    extent = Extent(tensor.extent.file, tensor.extent.offset, nbytes)
    values = _numbers(extent, tensor.dtype, sources)
    with np.errstate(invalid="ignore"):
        return bool((values == values[0]).all())


def _numbers(extent: Extent, dtype: DType, sources: Sources) -> Array:
    data = sources.open(extent.file).read(extent.offset, extent.nbytes)
    return np.frombuffer(data, dtype.numpy)


def _same(one: Array, other: Array) -> bool:
    # Comparing some patterns of NaN bits makes numpy warn.
    with np.errstate(invalid="ignore"):
        return bool(((one == other) | ((one != one) & (other != other))).all())


def _file(extent: Extent) -> str:
    return extent.file.path.rpartition("/")[2]
