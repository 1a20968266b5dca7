"""A checkpoint as a mapping of tensors: what `reshard.open` gives."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from reshard import formats
from reshard.core.catalog import Catalog
from reshard.core.dtypes import DType
from reshard.core.options import Option, PathLike, Place, Text, documented, parse, table
from reshard.core.tensors import Entry, Kind
from reshard.formats import locate
from reshard.storage.local import Sources

if TYPE_CHECKING:
    import numpy as np


TAG = Option(
    "tag",
    Text(),
    "Which of several saves: its name (global_step100, checkpoint-100), its number, or latest; "
    "default: the newest complete one.",
    group="Input",
    short="t",
)
PREFIX = Option(
    "prefix",
    Text(),
    "The model's part of a nested state dict, e.g. actor.model; it is stripped from the names.",
    group="Input",
)
ROLE = Option(
    "role",
    Text(),
    "Which model of a save that holds several, e.g. actor or critic.",
    group="Input",
)
#: The options of `reshard.open`.
OPEN = table(
    Option("path", Place(), "The checkpoint, or a folder above it.", required=True),
    TAG,
    PREFIX,
    ROLE,
)


class Tensor(Struct, frozen=True):
    """A tensor of a checkpoint; its elements are read by `numpy` only.

    `kind` is `parameter`, `buffer`, `frozen`, or `tied` for another name of stored weights.
    """

    name: str
    kind: Kind
    entry: Entry

    @property
    def dtype(self) -> DType:
        return self.entry.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.spec.shape

    @property
    def nbytes(self) -> int:
        return self.entry.spec.nbytes

    def numpy(self) -> np.ndarray[Any, Any]:
        """The tensor's elements, read now. bfloat16 and float8 are types of ml_dtypes.

        Memory: the tensor, and 4 MiB. Raises `IncompleteError` where a file was cut off.
        """
        from reshard.transfer.reading import read_array

        with Sources() as sources:
            return read_array(self.entry, sources)


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor, tied names included, in the order of the checkpoint."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._tensors = {}
        for name, entry in entries.items():
            self._tensors[name] = Tensor(name, entry.kind, entry)
            for alias in entry.aliases:
                self._tensors[alias] = Tensor(alias, "tied", entry)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Checkpoint:
    """A checkpoint, read from its metadata. No file stays open."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.format = catalog.format
        self.version = catalog.origin.version
        self.tag = catalog.origin.tag
        self.world_size = catalog.origin.world_size
        self.tensors: Mapping[str, Tensor] = Tensors(catalog.entries)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.format} {os.fspath(self.catalog.origin.root)!r}>"


@documented(OPEN)
def open_checkpoint(
    path: PathLike,
    *,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
) -> Checkpoint:
    """Read a checkpoint's table of tensors; no weights are read.

    The format is detected. Raises `OptionError` for a wrong value, and another `ReshardError` for
    anything that is missing or damaged.

    >>> checkpoint = open_checkpoint("run/_actor")                    # doctest: +SKIP
    >>> checkpoint.tensors["lm_head.weight"].shape                    # doctest: +SKIP
    (32000, 4096)
    """
    values = parse(OPEN, dict(locals()))
    selection = formats.Selection(values["tag"], values["prefix"], True, values["role"])
    with Sources() as sources:
        return Checkpoint(locate.read(values["path"], sources, selection))
