"""A checkpoint as a mapping of tensors, which `reshard.open` returns."""

from __future__ import annotations

import bisect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache, cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace

from reshard import formats
from reshard.core.catalog import Catalog
from reshard.core.collecting import paused_gc
from reshard.core.dtypes import DType
from reshard.core.fragments import regions
from reshard.core.notebook import folded, html_table
from reshard.core.options import Option, PathLike, Place, Text, documented, parse, table
from reshard.core.sizes import size
from reshard.core.state import Group, Plain, TrainingState
from reshard.core.tensors import Entry, FileRef, Record, TensorKind, stored
from reshard.errors import listed
from reshard.formats import locate
from reshard.storage.local import Sources
from reshard.storage.source import Identity

if TYPE_CHECKING:
    import numpy as np


TAG = Option(
    "tag",
    Text(),
    "Which save of a run: its name (global_step100, checkpoint-100), its number, or latest; "
    "default: the newest complete one.",
    group="Input",
    short="t",
)
PREFIX = Option(
    "prefix",
    Text(),
    "Where the model lies in a nested state dict, e.g. actor.model; the prefix is removed from "
    "the names.",
    group="Input",
)
ROLE = Option(
    "role",
    Text(),
    "Which model of a save with several models, e.g. actor or critic.",
    group="Input",
)
#: The options of `reshard.open`.
OPEN = table(
    Option("path", Place(remote=True), "The checkpoint, or a folder above it.", required=True),
    TAG,
    PREFIX,
    ROLE,
)


class Files:
    """What the files of a checkpoint were when it was opened, and the checksums that they state.

    `whole` opens the checkpoint anew, where it was opened without looking where each tensor lies.
    """

    def __init__(
        self,
        identities: Mapping[str, Identity],
        records: Iterable[Record],
        whole: Callable[[], Checkpoint] | None = None,
    ) -> None:
        self.identities = identities
        self.whole = whole
        self._records: dict[FileRef, list[Record]] = {}
        for record in records:
            self._records.setdefault(record.extent.file, []).append(record)
        for found in self._records.values():
            found.sort(key=_start)

    def records(self, entry: Entry) -> list[Record]:
        """The records that contain a tensor's bytes, each once."""
        found: dict[Record, None] = {}
        for extent in stored(entry.fragments):
            records = self._records.get(extent.file, [])
            last = bisect.bisect_right(records, extent.offset, key=_start) - 1
            if last >= 0:
                found[records[last]] = None
        return list(found)


def _start(record: Record) -> int:
    return record.extent.offset


_NO_FILES = Files({}, ())


class Tensor(Struct, frozen=True):
    """A tensor of a checkpoint; its elements are read by `numpy` only.

    `kind` is `parameter`, `buffer`, `frozen`, or `tied` for another name of stored weights.
    """

    name: str
    kind: TensorKind
    entry: Entry
    files: Files = _NO_FILES

    def __repr__(self) -> str:
        return f"<Tensor {self.name!r}: {self.dtype} {self.shape}, {self.kind}>"

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

        Memory: the tensor, and 4 MiB. Raises `IncompleteError` where a file was truncated or
        changed since the checkpoint was opened, `FormatError` where its bytes do not match the
        checksum that the file states.
        """
        from reshard.transfer.reading import read_array

        if self.files.whole is not None:
            return self.files.whole().tensors[self.name].numpy()
        with Sources(self.files.identities) as sources:
            array = read_array(self.entry, sources, self.files.records(self.entry))
            sources.check_unchanged()
        return array


class UnknownNameError(KeyError):
    """The checkpoint has no tensor of this name; the text lists the nearest names."""

    def __init__(self, name: str, names: Iterable[str]) -> None:
        super().__init__(name)
        self.names = names

    def __str__(self) -> str:
        near = get_close_matches(str(self.args[0]), self.names, 3, 0.7)
        return f"{self.args[0]!r}{f' (nearest: {listed(near)})' if near else ''}"


class Tensors(Mapping[str, Tensor]):
    """Name -> tensor, tied names included, in the order of the checkpoint."""

    def __init__(self, entries: Mapping[str, Entry], files: Files = _NO_FILES) -> None:
        self._tensors = {}
        for name, entry in entries.items():
            self._tensors[name] = Tensor(name, entry.kind, entry, files)
            for alias in entry.aliases:
                self._tensors[alias] = Tensor(alias, "tied", entry, files)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise UnknownNameError(name, self._tensors) from None

    def __repr__(self) -> str:
        return f"<{len(self)} tensors>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Optimizer:
    """The training state of a checkpoint: what its optimizer holds of each parameter.

    `moments` are tensors by kind (`exp_avg`) and parameter, read by their `numpy` only. `steps` are
    the updates that each parameter has had, `groups` the parameters of each group with their
    hyperparameters. `scheduler` is None where the checkpoint holds none.
    """

    def __init__(self, state: TrainingState, identities: Mapping[str, Identity]) -> None:
        files = Files(identities, state.records)
        self.state = state
        self.moments: Mapping[str, Mapping[str, Tensor]] = {
            kind: Tensors(table, files) for kind, table in state.moments.items()
        }
        self.masters: Mapping[str, Tensor] = Tensors(state.masters, files)
        self.steps: dict[str, int] = {name: step.count for name, step in state.steps.items()}
        self.groups: tuple[Group, ...] = state.groups
        self.scheduler: Mapping[str, Plain] | None = state.scheduler
        self.counters: Mapping[str, int] = state.counters
        self.client_state: Mapping[str, Plain] = state.client_state

    def __repr__(self) -> str:
        return f"<Optimizer {', '.join(self.moments)} of {len(self.state.names)} parameters>"


class Checkpoint:
    """A checkpoint, read from its metadata. No file stays open."""

    def __init__(
        self,
        catalog: Catalog,
        identities: Mapping[str, Identity],
        again: Callable[[Sources], Catalog] | None = None,
        whole: Callable[[], Checkpoint] | None = None,
    ) -> None:
        self._again = again
        self.files: Files = Files(identities, catalog.records, whole)
        self.catalog = catalog
        self.format: str = catalog.format
        self.version: str | None = catalog.origin.version
        self.tag: str | None = catalog.origin.tag
        self.world_size: int | None = catalog.origin.world_size
        self.tensors: Mapping[str, Tensor] = Tensors(catalog.entries, self.files)

    @cached_property
    def optimizer(self) -> Optimizer | None:
        """The training state; None where the checkpoint holds none. Read when first asked for.

        Raises `ReshardError` where it cannot be read: it lacks names, is of another model or
        quantised, or its files changed since the checkpoint was opened.
        """
        if self.catalog.optimizer is None or self._again is None:
            return None
        with Sources(self.files.identities) as sources:
            return _optimizer(self._again(sources), sources)

    def _repr_html_(self) -> str:
        """The checkpoint as a notebook shows it: what it is, and its tensors to unfold."""
        found = {
            "format": self.format,
            "version": self.version,
            "tag": self.tag,
            "ranks": self.world_size,
            "tensors": len(self.catalog.entries),
            "parameters": f"{sum(e.spec.numel for e in self.catalog.entries.values()):,}",
            "bytes": size(sum(e.spec.nbytes for e in self.catalog.entries.values())),
        }
        rows = [(label, str(value)) for label, value in found.items() if value is not None]
        title = f"Checkpoint: {os.fspath(self.catalog.origin.root)}"
        return html_table(title, rows, more=tensors_to_unfold(self.tensors))

    def __repr__(self) -> str:
        return f"<Checkpoint {self.format} {os.fspath(self.catalog.origin.root)!r}>"


def _optimizer(catalog: Catalog, sources: Sources) -> Optimizer | None:
    """The training state of a catalog whose files are open; None where it has none."""
    state = catalog.training_state()
    if state is None:
        return None
    for file in {extent.file.path for extent in regions(state.entries())}:
        sources.open(file)
    return Optimizer(state, sources.identities())


# A notebook keeps what it shows: of very many tensors, these.
_SHOWN = 1000


def tensors_to_unfold(tensors: Mapping[str, Tensor]) -> str:
    """The tensors as a notebook's table that is shown on request; the first of very many."""
    rows = [
        (one.name, str(one.dtype), str(list(one.shape)), size(one.nbytes), one.kind)
        for one in islice(tensors.values(), _SHOWN)
    ]
    title = f"{len(tensors)} tensors" + (f", of them {_SHOWN}" if len(tensors) > _SHOWN else "")
    return folded(title, html_table("", rows, header=("name", "dtype", "shape", "size", "kind")))


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

    Examples
    --------
    >>> checkpoint = open_checkpoint("run/_actor")                    # doctest: +SKIP
    >>> checkpoint.tensors["lm_head.weight"].shape                    # doctest: +SKIP
    (32000, 4096)
    >>> checkpoint.optimizer.moments["exp_avg"]["lm_head.weight"].numpy()      # doctest: +SKIP
    """
    return opened(parse(OPEN, dict(locals())))


def opened(
    values: Mapping[str, Any], *, optimizer: bool = False, located: bool = True
) -> Checkpoint:
    """The checkpoint that parsed options name; with `optimizer` its training state is read, too.

    Without `located` a reader may leave out to look where each tensor lies, which of a checkpoint
    of many parts takes long: the catalog serves for a summary, and the first tensor that is read
    opens the checkpoint anew.
    """
    selection = formats.Selection(
        values["tag"], values["prefix"], True, values["role"], located=located
    )

    def read(sources: Sources) -> Catalog:
        return locate.read(values["path"], sources, replace(selection, located=True))

    with Sources() as sources:
        with paused_gc():
            catalog = locate.read(values["path"], sources, selection)
        for file in {extent.file.path for extent in regions(catalog.entries.values())}:
            sources.open(file)
        whole = None if located else cache(lambda: opened(values))
        checkpoint = Checkpoint(catalog, sources.identities(), read, whole)
        if optimizer:
            # In place of the cached property, which would read the table a second time.
            checkpoint.__dict__["optimizer"] = _optimizer(catalog, sources)
        return checkpoint
