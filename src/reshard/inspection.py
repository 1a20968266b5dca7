"""What a checkpoint holds, from its metadata alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field
from msgspec.structs import asdict, replace

from reshard.checkpoint import OPEN, Checkpoint, opened, tensors_to_unfold
from reshard.core.catalog import Catalog
from reshard.core.collecting import paused_gc
from reshard.core.findings import Finding
from reshard.core.notebook import html_table
from reshard.core.options import Flag, Option, PathLike, Place, documented, parse
from reshard.core.sizes import size
from reshard.core.summary import StateSummary
from reshard.core.tensors import nbytes_read
from reshard.errors import (
    FormatError,
    IncompleteError,
    NamesError,
    PlanError,
    ReshardError,
    UnsupportedError,
    listed,
    printable,
)
from reshard.formats.info import named
from reshard.naming.matching import Matching
from reshard.storage.local import Sources
from reshard.storage.paths import file_size, files_below, is_file

#: The options of `reshard.inspect`.
INSPECT = {
    **OPEN,
    "base": Option(
        "base",
        Place(remote=True),
        "Also show how the checkpoint's names map onto those of this Hugging Face model.",
        group="Input",
        short="b",
    ),
    "optimizer": Option(
        "optimizer",
        Flag(),
        "Also show the training state: moments by kind, steps, parameter groups, schedule.",
        False,
        group="Output",
    ),
}


class Fitting(Struct, frozen=True):
    """How a checkpoint's names fit onto a base's, without reading weights.

    `message` is the error that a conversion would raise, empty where the names fit. `undecided` are
    pairs of tensors whose values decide whether they are one. `beside` are the files beside the
    model, `merged` counts adapters (their alpha need not be known here).
    """

    message: str = ""
    prefix: str = ""
    rules: tuple[str, ...] = ()
    matching: Matching = Matching()
    undecided: tuple[tuple[str, str], ...] = ()
    config_patches: Mapping[str, object] = field(default_factory=dict)
    beside: tuple[str, ...] = ()
    merged: int = 0

    @property
    def fits(self) -> bool:
        return not self.message

    def rows(self, number: int) -> list[tuple[str, str]]:
        """How the names of a `number` of tensors fit, as lines of a label and its words."""
        if not self.fits:
            return [("fits", "NO")]
        match = self.matching
        every = not (match.missing or match.filled or match.unexpected or self.merged)
        rows = [("fits", f"yes, all {number} names and shapes" if every else "yes")]
        if self.prefix:
            rows.append(("prefix", f"{self.prefix!r} is stripped"))
        if self.rules:
            rows.append(("names", "; ".join(self.rules)))
        if self.undecided:
            pairs = listed(f"{a} = {b}" for a, b in self.undecided)
            rows.append(("may be tied", f"{pairs}: their values decide"))
        if self.merged:
            rows.append(("adapters", f"{self.merged} low-rank updates are merged"))
        if self.config_patches:
            patches = listed(f"{path}: {value}" for path, value in self.config_patches.items())
            rows.append(("config", f"changed: {patches}"))
        if self.beside:
            rows.append(("beside", listed(self.beside)))
        called = {"tied": "base ties"}
        return [*rows, *((called.get(what, what), words) for what, words in match.rows())]

    def to_json(self) -> dict[str, Any]:
        """The fit as JSON values."""
        values = {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__struct_fields__
            for value in (getattr(self, name),)
            if name != "matching"
        }
        return {"fits": self.fits, **values, **self.matching.to_json()}


class Codes(Struct, frozen=True):
    """What a checkpoint's quantised weights are.

    `kinds`: the name of a kind -> how many weights are codes of it. `read`: reshard reads them as
    the numbers that they represent. `stated` is the kind that the config names, empty where it says
    nothing. `fault` says why they cannot be read, as a conversion would.
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    read: bool = False
    stated: str = ""
    fault: str = ""

    def __str__(self) -> str:
        if self.fault:
            return self.fault
        if not self.kinds:
            return f"config.json says so ({self.stated}), and no weight is a code"
        counts = "; ".join(f"{count} weights, {kind}" for kind, count in self.kinds.items())
        return counts if self.read else f"{counts} (not read as numbers)"


class Inspection(Struct, frozen=True):
    """A checkpoint's summary. Sizes are bytes; tied names count neither tensors nor parameters.

    `total_bytes` is what the tensors take as the checkpoint holds them, `bytes_to_read` what a
    conversion reads, `bytes_on_disk` what all files of the checkpoint's folder take. `dtypes` and
    sizes are those of what is stored, codes and scales included; `codes` is None where nothing
    is quantised. A DCP checkpoint's items are not opened before a tensor of `checkpoint` is read.
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
    codes: Codes | None = None
    optimizer: StateSummary | None = None

    def rows(self) -> list[tuple[str, str]]:
        """The summary as lines of a label and its words, as `inspect` shows it."""
        catalog = self.checkpoint.catalog
        rows = [
            ("path", os.fspath(catalog.origin.root)),
            ("is", self._kind()),
            ("holds", self._contents()),
            ("on disk", self._sizes()),
        ]
        if self.codes is not None:
            rows.append(("quantised", str(self.codes)))
        tied = {alias: e.spec.name for e in catalog.entries.values() for alias in e.aliases}
        if len(tied) > 1:
            rows.append(("tied", listed(f"{a} = {b}" for a, b in tied.items())))
        frozen = [e.spec.name for e in catalog.entries.values() if e.kind == "frozen"]
        if frozen:
            rows.append(("frozen", f"{len(frozen)}: {listed(frozen, 5)}"))
        for name, value in catalog.origin.details.items():
            if name == "groups" and value:
                rows.append(
                    ("groups", f"{len(value)} parameter groups, of {_shown(value)} parameters")
                )
            elif name not in ("zero_stage", "global_steps") and value not in (None, [], {}, "", 0):
                rows.append((name.replace("_", " "), _shown(value)))
        if self.optimizer is not None:
            rows += self.optimizer.rows()
        return rows if self.fitting is None else [*rows, *self.fitting.rows(self.num_tensors)]

    def _kind(self) -> str:
        """What the checkpoint is: the framework, how it was saved, by how many ranks, at which
        step."""
        catalog = self.checkpoint.catalog
        origin, details = catalog.origin, catalog.origin.details
        title = named(catalog.format).title
        version = f"{origin.framework} {origin.version or ''}".strip()
        stage, step = details.get("zero_stage"), details.get("global_steps")
        ranks = origin.world_size
        parts = [
            title.removeprefix("a ").removeprefix("an "),
            version,
            "" if stage is None else f"ZeRO-{stage}" if stage else "without ZeRO",
            "" if ranks is None else f"{ranks} rank{'s' * (ranks != 1)}",
            "" if step is None else f"step {step}",
            f"tag {origin.tag}" if origin.tag else "",
        ]
        return ", ".join(filter(None, parts))

    def _contents(self) -> str:
        entries = self.checkpoint.catalog.entries
        dtypes = ", ".join(
            name if len(self.dtypes) == 1 else f"{name} ({count})"
            for name, count in self.dtypes.items()
        )
        buffers = self.kinds.get("buffer", 0)
        tied = [(alias, entry.spec.name) for entry in entries.values() for alias in entry.aliases]
        words = (
            f"{_counted(self.num_parameters)} parameters in {self.num_tensors} tensors, {dtypes}"
        )
        words += f"; {buffers} of them are buffers" if buffers else ""
        return words + (f"; {tied[0][0]} tied to {tied[0][1]}" if len(tied) == 1 else "")

    def _sizes(self) -> str:
        words = f"{size(self.bytes_on_disk)}, of which weights {size(self.total_bytes)}"
        if self.bytes_to_read != self.total_bytes:
            words += f"; a conversion reads {size(self.bytes_to_read)}"
        return words

    def __str__(self) -> str:
        return "\n".join(f"{label:<10} {printable(words)}" for label, words in self.rows())

    def _repr_html_(self) -> str:
        """The summary as a notebook shows it."""
        return html_table(
            "Checkpoint", self.rows(), more=tensors_to_unfold(self.checkpoint.tensors)
        )

    def __repr__(self) -> str:
        return f"<Inspection: {self._kind()}; {self._contents()}>"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those of the checkpoint, and of its training state where that was asked for."""
        state = None if self.optimizer is None else self.optimizer.state
        return (*self.checkpoint.catalog.findings, *(() if state is None else state.findings))

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
            "quantised": None if self.codes is None else asdict(self.codes),
            "tied": {
                alias: entry.spec.name
                for entry in catalog.entries.values()
                for alias in entry.aliases
            },
            "frozen": [e.spec.name for e in catalog.entries.values() if e.kind == "frozen"],
            "findings": [finding.to_json() for finding in self.findings],
            **catalog.origin.details,
        }
        if self.optimizer is not None:
            result["optimizer"] = self.optimizer.to_json()
        if self.fitting is not None:
            result["base"] = self.fitting.to_json()
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
    optimizer: bool = False,
) -> Inspection:
    """Summarise the checkpoint at `path`; no weights are read, and of moments only where they lie.

    Raises `OptionError` for a wrong value, and another `ReshardError` for anything that is missing
    or damaged.
    """
    values = parse(INSPECT, dict(locals()))
    checkpoint = opened(values, optimizer=values["optimizer"], located=False)
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
        codes=_codes(checkpoint.catalog),
        optimizer=_state(checkpoint) if values["optimizer"] else None,
    )


def _state(checkpoint: Checkpoint) -> StateSummary:
    """The training state; of a checkpoint without one, that it has none."""
    held = checkpoint.optimizer
    return StateSummary() if held is None else StateSummary(held.state)


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return listed(f"{name}: {count}" for name, count in value.items())
    return listed(map(str, value)) if isinstance(value, list) else str(value)


def _counted(number: int) -> str:
    """A number of parameters for people.

    >>> _counted(134_515_008), _counted(859)
    ('134.5 M', '859')
    """
    for limit, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number:,}"


def _size(root: Path) -> int:
    files = [root] if is_file(root) else filter(is_file, files_below(root))
    return sum(map(file_size, files))


def _codes(catalog: Catalog) -> Codes | None:
    """What the quantised weights are, by their tensors and by the config beside them."""
    from reshard.conversion.quantised import config_of
    from reshard.naming.quantised import numbers, refused, statement

    with Sources() as sources:
        config = config_of(catalog, sources)
    stated = statement(config)
    title = "" if stated is None else stated.title
    unread = refused(catalog.entries, stated)
    if unread is not None:
        return Codes({unread.title: len(unread.modules)}, stated=title)
    try:
        found = numbers(catalog.entries, config)
    except ReshardError as error:
        return Codes(stated=title, fault=str(error))
    if not found.kinds and stated is None:
        return None
    return Codes(dict(Counter(found.kinds.values()).most_common()), bool(found.kinds), title)


def _fit(checkpoint: Checkpoint, folder: Path) -> Fitting:
    from reshard.conversion import output_model
    from reshard.conversion.base_model import read_base
    from reshard.conversion.options import ANY_ALPHA, unwritten
    from reshard.conversion.quantised import as_numbers

    root = checkpoint.catalog.origin.root
    with Sources() as sources, paused_gc():
        base = read_base(folder, sources)
        # As a conversion does without flags, which may choose other names than the files'.
        options = replace(unwritten(root, folder), dtype="base", names=None, lora=ANY_ALPHA)
        try:
            numbers, _ = as_numbers(checkpoint.catalog, base, options, sources)
            output = output_model.onto(numbers, base, options, None)
        except NamesError as error:
            return Fitting(str(error), matching=error.matching)
        except (FormatError, IncompleteError, PlanError, UnsupportedError) as error:
            return Fitting(str(error))
    found = output.name_map
    return Fitting(
        prefix=found.prefix,
        rules=found.rules,
        matching=output.matching,
        undecided=found.undecided,
        config_patches=output.patches,
        beside=tuple(file.name for file in output.side_files),
        merged=output.merged,
    )
