"""Metadata of long runs, read as opcode by opcode; small ones as large ones are."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from reshard.containers.dcp.metadata import Metadata
from reshard.containers.dcp.parsing import compared, unpickled
from reshard.containers.dcp.tables import Tables
from reshard.containers.torch import bulk, read_pickle, repeats
from reshard.errors import ReshardError

#: Offsets of one, two, four, five and six bytes.
FAR = (0, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 39) - 1, 1 << 39, (1 << 47) - 1)
NAMES = ("w", "größe", "Ô" * 9, "x" * 250, "mlp.experts.7.up_proj.weight")


@contextmanager
def as_large() -> Iterator[None]:
    """Small pickles are read as large ones are."""
    with (
        patch.multiple(repeats, MIN_BULK_NBYTES=0, _MIN_RUN=1, _FEW_NBYTES=0),
        patch.multiple(bulk, _MIN_WINDOW=0, _MIN_COUNT=2),
    ):
        yield


def save(parts: int, tensors: int = 1, *, dims: int = 2, own_names: bool = True) -> dcp.Metadata:
    """Tensors of equal shapes, each cut along the first dimension into `parts`."""
    described: dict[str, Any] = {}
    stored: dict[Any, Any] = {}
    for number in range(tensors):
        name = f"{number}.{NAMES[number % len(NAMES)]}"
        chunks = []
        for part in range(parts):
            offsets = (part * 100, *(0,) * (dims - 1)) if dims else ()
            sizes = (100, *(300,) * (dims - 1)) if dims else ()
            chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            own = name.encode().decode() if own_names else name
            file = f"__{part % 3}_0.distcp"
            place = _StorageInfo(file, FAR[(number + part) % len(FAR)] + number, 7 + part)
            stored[dcp.MetadataIndex(own, offsets, part)] = place
        shape = (parts * 100, *(300,) * (dims - 1)) if dims else ()
        properties = dcp.TensorProperties(torch.bfloat16)
        described[name] = dcp.TensorStorageMetadata(properties, torch.Size(shape), chunks)
    paths = {name: (name,) for name in described}
    return dcp.Metadata(described, paths, stored, dcp.StorageMeta("x"), "1.0.0")


def in_batches(metadata: dcp.Metadata, batch: int = 4) -> bytes:
    """The pickle, with so many items between two SETITEMS; values that repeat are known from the
    second batch on."""
    stream = io.BytesIO()
    pickler = pickle._Pickler(stream, 4)
    vars(pickler)["_BATCHSIZE"] = batch
    pickler.dump(metadata)
    return stream.getvalue()


def both(data: bytes) -> Iterator[Metadata | str]:
    """What is read in bulk, and opcode by opcode: the metadata, or the refusal."""
    ways: tuple[Callable[[], Metadata], ...] = (
        lambda: unpickled(data, Path("p")),
        lambda: compared(read_pickle(data, path="p").value, Tables("p")),
    )
    for read in ways:
        try:
            yield read()
        except ReshardError as error:
            yield f"{type(error).__name__} {error}"


def same(data: bytes) -> Metadata | str:
    """What both read; refusals may name another place of a broken pickle."""
    fast, slow = both(data)
    if isinstance(fast, Metadata) or isinstance(slow, Metadata):
        assert fast == slow
    else:
        assert fast.split()[0] == slow.split()[0]
    return fast
