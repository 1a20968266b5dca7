"""One rank's file: its state dict, in which every tensor is plain or decoded."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from reshard.containers.distributed import Decoder, Local, is_distributed
from reshard.containers.torch import Opaque, TensorRef, TorchFile
from reshard.containers.torch import read as read_torch
from reshard.core.findings import Finding, objects_unread
from reshard.core.tensors import Extent, Record
from reshard.errors import UnsupportedError
from reshard.formats import MODEL
from reshard.storage.local import Sources


class State(Struct, frozen=True):
    """A rank's tensors by name, in the file's order, and the checksums of the file's storages."""

    path: Path
    rank: int
    tensors: Mapping[str, TensorRef | Local]
    records: tuple[Record, ...]
    findings: tuple[Finding, ...] = ()

    def record(self, extent: Extent) -> Record | None:
        """The checksum of the storage that holds an extent, if the file states one."""
        at = bisect.bisect_right(self.records, extent.offset, key=lambda r: r.extent.offset) - 1
        if at < 0 or not extent.nbytes:
            return None
        record = self.records[at]
        end = record.extent.offset + record.extent.nbytes
        return record if extent.offset + extent.nbytes <= end else None


def read_state(path: Path, rank: int, sources: Sources) -> State:
    """The state dict that one rank saved.

    Raises `FormatError`, `IncompleteError`, `UnsupportedError` as the torch reader and the decoder
    do, and where there is no state dict.
    """
    content = read_torch(sources.open(path))
    decoder = Decoder(str(path), rank, sources)
    tensors: dict[str, TensorRef | Local] = {}
    for name, value in _state_dict(path, content).items():
        if isinstance(value, TensorRef):
            tensors[name] = value
        elif isinstance(value, Opaque) and is_distributed(value):
            tensors[name] = decoder.decode(name, value)
        elif isinstance(value, Opaque) and value.is_tensor:
            raise UnsupportedError(
                f"it is {value.describe()}, which is not supported.", path=path, tensor=name
            )
    findings = [Finding("no-checksums", warning, path.name) for warning in content.warnings]
    unread = [name for name in content.opaque if not name.startswith("torch.")]
    findings += [objects_unread(unread)] if unread else []
    records = tuple(sorted(content.records, key=lambda record: record.extent.offset))
    return State(path, rank, tensors, records, tuple(findings))


def _state_dict(path: Path, content: TorchFile) -> dict[str, object]:
    value = content.value
    for key in MODEL:
        inner = value.get(key) if isinstance(value, dict) else None
        if isinstance(inner, dict) and inner:
            value = inner
            break
    tensors: dict[str, object] = {
        name: each
        for name, each in (value.items() if isinstance(value, dict) else ())
        if isinstance(name, str) and isinstance(each, TensorRef | Opaque)
    }
    if not any(isinstance(each, TensorRef) or is_distributed(each) for each in tensors.values()):
        raise UnsupportedError(
            "it holds no state dict: no dict of names to tensors.",
            path=path,
            hint="Name the files that torch.save(model.state_dict(), ...) wrote.",
        )
    return tensors
