"""The catalog: a checkpoint as a table of tensors, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from reshard.core.findings import Finding
from reshard.core.state import ReadState, TrainingState
from reshard.core.tensors import Entry, Record


class Origin(Struct, frozen=True):
    """Where a catalog was read from.

    `root` is the folder (or file) that holds the tensors, `version` the framework's version as
    the checkpoint states it, `details` whatever else `inspect` shows, as JSON values
    (for DeepSpeed: `zero_stage`, `groups`, ...).
    """

    root: Path
    framework: str
    version: str | None = None
    tag: str | None = None
    world_size: int | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Asset(Struct, frozen=True):
    """A file that is copied unchanged; `name` is its path inside the folder, with `/`."""

    name: str
    path: Path


class Catalog(Struct, frozen=True):
    """A checkpoint: its tensors by name, and everything known about their source.

    `entries` holds each stored tensor once; other names of the same weights are in `Entry.aliases`.
    `records` are the checksummed stretches of the files, which the engine checks as their bytes
    pass. `findings` are what a user should know; if the path named a folder above the checkpoint,
    the first says which checkpoint was taken. They change no weights. `renamed` are aliases that
    are not tied parameters but names of the tensor in other layouts of the model. `unshaped` are
    entries that hold a tensor flattened, whose shape the checkpoint does not state (FSDP1's local
    state dicts): a base gives them their shapes, see `reshard.naming.flat`. `optimizer`, where the
    checkpoint holds training state, reads it when it is called, while the `Sources` that the
    catalog was read with are open; its names are those of `entries`.
    """

    format: str
    origin: Origin
    entries: Mapping[str, Entry]
    records: Sequence[Record] = ()
    findings: tuple[Finding, ...] = ()
    renamed: frozenset[str] = frozenset()
    unshaped: frozenset[str] = frozenset()
    optimizer: ReadState | None = None

    def of_one_layout(self) -> Mapping[str, Entry]:
        """The entries with the names of one layout: with tied parameters, without the renamed."""
        if not self.renamed:
            return self.entries
        return {
            name: entry.aliased(tuple(a for a in entry.aliases if a not in self.renamed))
            for name, entry in self.entries.items()
        }

    def training_state(self) -> TrainingState | None:
        """The state of the model's optimizer, proven to be this model's; None where there is none.

        Reads it. Raises what its reader raises, and `FormatError` where it is another model's.
        """
        if self.optimizer is None:
            return None
        return self.optimizer().checked(self.entries, self.origin.root)

    def names(self) -> Iterator[str]:
        """Every name, aliases included."""
        for name, entry in self.entries.items():
            yield name
            yield from entry.aliases
