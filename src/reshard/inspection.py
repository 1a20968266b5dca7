"""What is in a checkpoint, from its metadata alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from reshard.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint's summary. Sizes are bytes; tied names count neither tensors nor parameters.

    `total_bytes` is what the tensors take as the checkpoint holds them, `bytes_to_read` what a
    conversion reads, `bytes_on_disk` the size of all the checkpoint's files that were opened.
    """

    checkpoint: Checkpoint
    num_tensors: int
    num_parameters: int
    total_bytes: int
    bytes_to_read: int
    dtypes: dict[str, int]
    kinds: dict[str, int]

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """The summary as JSON values, as `inspect --json` prints it."""
        catalog = self.checkpoint.catalog
        result: dict[str, Any] = {
            "format": catalog.format,
            "framework": catalog.origin.framework,
            "version": catalog.origin.version,
            "path": os.fspath(catalog.origin.root),
            "tag": catalog.origin.tag,
            "world_size": catalog.origin.world_size,
            "num_tensors": self.num_tensors,
            "num_parameters": self.num_parameters,
            "total_bytes": self.total_bytes,
            "bytes_to_read": self.bytes_to_read,
            "dtypes": self.dtypes,
            "kinds": self.kinds,
            "tied": {
                alias: entry.spec.name
                for entry in catalog.entries.values()
                for alias in entry.aliases
            },
            "frozen": [e.spec.name for e in catalog.entries.values() if e.kind == "frozen"],
            "notes": list(catalog.notes),
            **catalog.origin.details,
        }
        if tensors:
            result["tensors"] = [
                {
                    "name": tensor.name,
                    "dtype": tensor.dtype.name,
                    "shape": list(tensor.shape),
                    "nbytes": tensor.nbytes,
                    "kind": tensor.kind,
                }
                for tensor in self.checkpoint.tensors.values()
            ]
        return result


def inspect(path: str | os.PathLike[str], *, tag: str | None = None) -> Inspection:
    """Summarise the checkpoint at `path`; no weights are read."""
    checkpoint = open_checkpoint(path, tag=tag)
    entries = list(checkpoint.catalog.entries.values())
    return Inspection(
        checkpoint=checkpoint,
        num_tensors=len(entries),
        num_parameters=sum(e.spec.numel for e in entries if e.kind != "buffer"),
        total_bytes=sum(e.spec.nbytes for e in entries),
        bytes_to_read=sum(f.extent.nbytes for e in entries for f in e.fragments),
        dtypes=dict(Counter(e.spec.dtype.name for e in entries)),
        kinds=dict(Counter(t.kind for t in checkpoint.tensors.values())),
    )
