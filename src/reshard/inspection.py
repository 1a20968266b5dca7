"""What is in a checkpoint, from its metadata alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict

from reshard.checkpoint import OPEN, Checkpoint, open_checkpoint
from reshard.core.options import Option, PathLike, Place, documented, parse
from reshard.core.tensors import nbytes_read
from reshard.errors import IncompleteError, NamesError, PlanError, UnsupportedError
from reshard.storage.local import Sources

#: The options of `reshard.inspect`.
INSPECT = {
    **OPEN,
    "base": Option(
        "base",
        Place(),
        "Also show how the names fit onto those of this Hugging Face model.",
        group="Input",
        short="b",
    ),
}


class Fitting(Struct, frozen=True):
    """How a checkpoint's names fit onto a base's, found without reading a weight.

    `message` is what a conversion would refuse with, empty where the names fit. `undecided` are
    pairs of tensors whose values decide whether they are one. `beside` are the files beside the
    model, `merged` counts adapters (their alpha need not be known here). `missing` of the base are
    not written, `filled` are copied from it, `unexpected` of the checkpoint are left out.
    """

    message: str = ""
    prefix: str = ""
    rules: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    undecided: tuple[tuple[str, str], ...] = ()
    resized: tuple[str, ...] = ()
    config_patches: Mapping[str, object] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    merged: int = 0
    missing: tuple[str, ...] = ()
    filled: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.message


class Inspection(Struct, frozen=True):
    """A checkpoint's summary. Sizes are bytes; tied names count neither tensors nor parameters.

    `total_bytes` is what the tensors take as the checkpoint holds them, `bytes_to_read` what a
    conversion reads, `bytes_on_disk` what all files of the checkpoint's folder take.
    """

    checkpoint: Checkpoint
    num_tensors: int
    num_parameters: int
    total_bytes: int
    bytes_to_read: int
    bytes_on_disk: int
    dtypes: dict[str, int]
    kinds: dict[str, int]
    fitting: Fitting | None = None

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
            "bytes_on_disk": self.bytes_on_disk,
            "dtypes": self.dtypes,
            "kinds": self.kinds,
            "tied": {
                alias: entry.spec.name
                for entry in catalog.entries.values()
                for alias in entry.aliases
            },
            "frozen": [e.spec.name for e in catalog.entries.values() if e.kind == "frozen"],
            "findings": [finding.to_json() for finding in catalog.findings],
            **catalog.origin.details,
        }
        if self.fitting is not None:
            found = {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in asdict(self.fitting).items()
            }
            result["base"] = {"fits": self.fitting.fits, **found}
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


@documented(INSPECT)
def inspect(
    path: PathLike,
    *,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
    base: PathLike | None = None,
) -> Inspection:
    """Summarise the checkpoint at `path`; no weights are read.

    Raises `OptionError` for a wrong value, and another `ReshardError` for anything that is missing
    or damaged.
    """
    values = parse(INSPECT, dict(locals()))
    checkpoint = open_checkpoint(
        values["path"], tag=values["tag"], prefix=values["prefix"], role=values["role"]
    )
    entries = list(checkpoint.catalog.entries.values())
    return Inspection(
        checkpoint=checkpoint,
        num_tensors=len(entries),
        num_parameters=sum(e.spec.numel for e in entries if e.kind != "buffer"),
        total_bytes=sum(e.spec.nbytes for e in entries),
        bytes_to_read=sum(nbytes_read(entry.fragments) for entry in entries),
        bytes_on_disk=_size(checkpoint.catalog.origin.root),
        dtypes=dict(Counter(e.spec.dtype.name for e in entries)),
        kinds=dict(Counter(t.kind for t in checkpoint.tensors.values())),
        fitting=None if values["base"] is None else _fit(checkpoint, values["base"]),
    )


def _size(root: Path) -> int:
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return sum(file.stat().st_size for file in files)


def _fit(checkpoint: Checkpoint, folder: Path) -> Fitting:
    from reshard.conversion import output_model
    from reshard.conversion.base_model import read_base
    from reshard.conversion.options import LoraChoice, Options
    from reshard.formats import Selection

    catalog = checkpoint.catalog
    with Sources() as sources:
        base = read_base(folder, sources)
        # Any alpha will do: adapters are counted, not merged.
        options = Options(catalog.origin.root, folder, folder, "hf", Selection(), "base", 1,
                          lora=LoraChoice(alpha=1.0))  # fmt: skip
        try:
            exported = output_model.onto(catalog, base, options, None)
        except NamesError as error:
            return Fitting(str(error), missing=error.missing, unexpected=error.unexpected)
        except (IncompleteError, PlanError, UnsupportedError) as error:
            return Fitting(str(error))
    found = exported.name_map
    return Fitting(
        prefix=found.prefix,
        rules=found.rules,
        tied=found.tied,
        undecided=found.undecided,
        resized=tuple(f"{r.name}: {r.base_rows} rows to {r.rows}" for r in found.resized),
        config_patches=exported.patches,
        beside=tuple(side.name for side in exported.sides),
        merged=exported.merged,
        missing=exported.missing,
        filled=exported.filled,
        unexpected=found.dropped,
    )
