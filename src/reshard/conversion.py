"""Convert a checkpoint: one straight line from the source's metadata to the folder's rename.

read -> fit names -> choose dtypes -> lay out        (nothing is written up to here)
     -> transfer -> manifest -> verify -> commit
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from reshard import formats, locate, manifest
from reshard.base import CONFIG, Base, dtype_patches, patched_config, read_base
from reshard.catalog import Asset, Catalog
from reshard.errors import PlanError, VerificationError, WriteError
from reshard.naming import Fit, FitOptions, fit
from reshard.plan import Plan, parse_size
from reshard.storage import Sources
from reshard.targets import CHOICES, Target, choose
from reshard.tensors import Entry
from reshard.transfer.checksums import Ledger
from reshard.transfer.commit import OutputFolder, check_space, refuse_existing
from reshard.transfer.engine import Engine, Outcome
from reshard.verification import equal, verify_folder

#: Called with (what is done: "write" or "verify", bytes done, bytes in all).
Progress = Callable[[str, int, int], None]
PathLike = str | os.PathLike[str]

# More threads than this only compete for the memory bus.
_MAX_THREADS = 4

# As `save_pretrained` has it; for DCP small enough that many ranks read different files.
_MAX_SHARD_SIZE = {"hf": "5GB", "dcp": "1GB"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did, or with `dry_run` would do.

    `missing` are tensors of the base that the output lacks, `unexpected` tensors of the checkpoint
    that were left out, `tied` names whose weights are stored under another name. `changed` of
    `compared` tensors differ from the base model's. Sizes are bytes.
    """

    source: str
    target: str
    format: str
    tag: str | None
    num_tensors: int
    bytes_read: int
    bytes_written: int
    seconds: float
    verified: bool
    files: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    prefix: str = ""
    rules: tuple[str, ...] = ()
    compared: int = 0
    changed: int = 0
    records_checked: int = 0
    warnings: tuple[str, ...] = ()
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values, as `convert --json` prints it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name in self.__dataclass_fields__
            for value in (getattr(self, name),)
        }


def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: str = "hf",
    base: PathLike | None = None,
    tag: str | None = None,
    prefix: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int | None = None,
    exclude_frozen: bool = False,
    fill_from_base: bool = False,
    allow_unchanged: bool = False,
    allow_step_mismatch: bool = False,
    strict: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Convert the checkpoint at `source` into the folder `target`.

    The source's format is detected. With `base`, the Hugging Face model that training started
    from, the output has the base's names and dtypes and all its other files; without it, names and
    dtypes stay as they are in the checkpoint. `dtype` is one of `base` (the default with a base),
    `keep`, `float32`, `bfloat16`, `float16`. The command line's `reshard convert` takes the same
    options by the same names.

    Raises a `ReshardError` for anything that stands in the way; `target` then does not exist.

    >>> report = convert("run/_actor", "out", base="Qwen2.5-7B")      # doctest: +SKIP
    >>> report.verified                                               # doctest: +SKIP
    True
    """
    began = time.monotonic()
    options = _Options(
        source=Path(source),
        target=Path(target),
        base=None if base is None else Path(base),
        to=to,
        selection=formats.Selection(tag, prefix, allow_step_mismatch),
        dtype=_check_dtype(dtype, base),
        max_shard_nbytes=parse_size(max_shard_size or _MAX_SHARD_SIZE.get(to, "5GB")),
        exclude_frozen=exclude_frozen,
        fill_from_base=fill_from_base,
    )
    if to not in formats.TARGETS:
        raise PlanError(
            f"{to!r} is not a target format.", hint=f"Use one of {', '.join(formats.TARGETS)}."
        )
    if fill_from_base and base is None:
        raise PlanError("--fill-from-base takes tensors from a base.", hint="Pass --base.")
    check_target(options.target, options.source, options.base, overwrite=overwrite)
    workers = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    with Sources() as sources:
        job = _plan(options, sources, strict=strict)
        check_space(options.target, job.plan.bytes_to_write)
        if dry_run:
            return _report(job, options, time.monotonic() - began)
        outcome = _write(
            job,
            options,
            sources,
            threads=workers,
            overwrite=overwrite,
            verified=verify,
            allow_unchanged=allow_unchanged,
            progress=progress,
        )
    return _report(job, options, time.monotonic() - began, outcome, verified=verify)


@dataclass(frozen=True, slots=True)
class _Options:
    """What decides the output's bytes."""

    source: Path
    target: Path
    base: Path | None
    to: str
    selection: formats.Selection
    dtype: str
    max_shard_nbytes: int
    exclude_frozen: bool
    fill_from_base: bool

    def stated(self) -> dict[str, Any]:
        """The options as `reshard.json` records them."""
        return {
            "to": self.to,
            "dtype": self.dtype,
            "max_shard_nbytes": self.max_shard_nbytes,
            "exclude_frozen": self.exclude_frozen,
            "fill_from_base": self.fill_from_base,
        }


@dataclass(frozen=True, slots=True)
class _Job:
    """A conversion that is planned and not begun."""

    catalog: Catalog
    fit: Fit
    missing: tuple[str, ...]
    filled: tuple[str, ...]
    targets: Sequence[Target]
    plan: Plan


def check_target(target: Path, source: Path, base: Path | None, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that is or holds an input. Raises `WriteError`."""
    place = target.absolute().resolve()
    for what, path in (("source", source), ("base model", base)):
        if path is not None and (path.resolve() == place or place in path.resolve().parents):
            raise WriteError(
                f"the output is or holds the {what}, {path}.",
                path=target,
                hint="Name a new folder.",
            )
    refuse_existing(target, overwrite=overwrite)


def _check_dtype(dtype: str | None, base: PathLike | None) -> str:
    choice = dtype or ("keep" if base is None else "base")
    if choice not in CHOICES:
        raise PlanError(f"{choice!r} is no choice of dtype.", hint=f"Use one of {CHOICES}.")
    if choice == "base" and base is None:
        raise PlanError("dtype 'base' takes the dtypes of a base.", hint="Pass --base.")
    return choice


def _plan(options: _Options, sources: Sources, *, strict: bool) -> _Job:
    """Everything that can be decided, and every user's error, before a byte is written."""
    catalog = locate.read(options.source, sources, options.selection)
    if strict and catalog.notes:
        raise PlanError(
            f"--strict was passed, and there is a finding: {catalog.notes[0]}", path=options.source
        )
    if not catalog.entries:
        raise PlanError("it holds no tensors; there is nothing to convert.", path=options.source)
    base = None if options.base is None else read_base(options.base, sources)
    found, entries, filled, missing = _fitted(catalog, base, options, sources)
    targets = choose(list(entries.items()), base.entries if base else {}, options.dtype)
    slots = [(item.spec, item.source, item.reference) for item in targets]
    files, texts = formats.target(options.to).lay_out(slots, options.max_shard_nbytes)
    assets: tuple[Asset, ...] = ()
    warnings = [*catalog.notes, *found.warnings]
    if base is not None and options.to == "hf":
        patches = dict(found.config_patches)
        if options.dtype not in ("base", "keep"):
            patches.update(dtype_patches(base, options.dtype))
        assets = base.assets
        if patches:
            texts = (*texts, (CONFIG, patched_config(base, patches)))
            assets = tuple(asset for asset in assets if asset.name != CONFIG)
    elif options.to == "hf":
        warnings.append(
            "no base was given: names are those of the checkpoint, and config, tokenizer and "
            "other files are not there."
        )
    plan = Plan(files, texts, assets, tuple(warnings))
    return _Job(catalog, found, missing, filled, targets, plan)


def _fitted(
    catalog: Catalog, base: Base | None, options: _Options, sources: Sources
) -> tuple[Fit, dict[str, Entry], tuple[str, ...], tuple[str, ...]]:
    """The fit, the output's tensors by name, and the names filled from the base and left out."""
    if base is None:
        kept = {
            name: entry
            for name, entry in catalog.entries.items()
            if not (options.exclude_frozen and entry.kind == "frozen")
        }
        tied = {alias: name for name, entry in kept.items() for alias in entry.aliases}
        return Fit(kept, tied=tied), kept, (), ()
    fit_options = FitOptions(fill_from_base=options.fill_from_base or options.exclude_frozen)
    found = fit(
        catalog.entries,
        base.schema,
        options=fit_options,
        equal=lambda one, other: equal(one, other, sources),
    )
    entries = dict(found.entries)
    absent = list(found.filled)
    if options.exclude_frozen:
        frozen = [name for name, entry in entries.items() if entry.kind == "frozen"]
        absent += frozen
        for name in frozen:
            del entries[name]
    if not options.fill_from_base:
        return found, entries, (), tuple(absent)
    entries.update((name, base.entries[name]) for name in absent)
    return found, entries, tuple(absent), ()


def _write(
    job: _Job,
    options: _Options,
    sources: Sources,
    *,
    threads: int,
    overwrite: bool,
    verified: bool,
    allow_unchanged: bool,
    progress: Progress | None,
) -> Outcome:
    """Carry out a plan: everything into a partial folder, checked, then one rename."""

    def step(what: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(what, done, total)

    plan = job.plan
    with OutputFolder(options.target, plan_digest(plan), overwrite=overwrite) as folder:
        ledger = Ledger(job.catalog.records)
        engine = Engine(plan, sources, ledger, folder, threads=threads, progress=step("write"))
        outcome = engine.run()
        _check_changed(job, outcome, allow_unchanged=allow_unchanged)
        for asset in plan.assets:
            folder.copy(asset)
        for name, text in plan.texts:
            folder.write(name, text)
        stated = manifest.state([item.spec for item in job.targets], outcome.digests)
        folder.write(manifest.MANIFEST, _manifest(job, options, stated))
        sources.check_unchanged()
        if verified:
            verify_folder(folder.partial, threads=threads, progress=step("verify"))
        folder.commit()
    return outcome


def _check_changed(job: _Job, outcome: Outcome, *, allow_unchanged: bool) -> None:
    """A result whose every tensor is the base's is not what training gives."""
    if outcome.compared and not outcome.changed and not allow_unchanged:
        raise VerificationError(
            f"all {outcome.compared} tensors equal the base model's: the checkpoint holds no "
            "training.",
            path=job.catalog.origin.root,
            hint="Pass --allow-unchanged if that is meant.",
        )


def plan_digest(plan: Plan) -> str:
    """A name for the plan: of every header, every slot's source and every file that is copied."""
    hasher = xxhash.xxh3_128()
    for part in (plan.files, plan.texts, [asset.name for asset in plan.assets]):
        hasher.update(repr(part).encode())
    return hasher.hexdigest()


def _manifest(job: _Job, options: _Options, stated: Mapping[str, manifest.Stated]) -> bytes:
    names = {
        "prefix": job.fit.prefix,
        "rules": list(job.fit.rules),
        "tied": dict(job.fit.tied),
        "filled": list(job.filled),
        "missing": list(job.missing),
        "unexpected": list(job.fit.dropped),
    }
    return manifest.render(job.catalog.format, job.catalog.origin, options.stated(), names, stated)


def _report(
    job: _Job,
    options: _Options,
    seconds: float,
    outcome: Outcome | None = None,
    *,
    verified: bool = False,
) -> Report:
    warnings = list(job.plan.warnings)
    if outcome is not None and outcome.compared and not outcome.changed:
        warnings.append(f"all {outcome.compared} tensors equal the base model's.")
    return Report(
        source=os.fspath(options.source),
        target=os.fspath(options.target),
        format=job.catalog.format,
        tag=job.catalog.origin.tag,
        num_tensors=len(job.targets),
        bytes_read=job.plan.bytes_to_read if outcome is None else outcome.bytes_read,
        bytes_written=job.plan.bytes_to_write,
        seconds=round(seconds, 3),
        verified=verified,
        files=tuple(file.name for file in job.plan.files),
        missing=job.missing,
        unexpected=job.fit.dropped,
        tied=job.fit.tied,
        filled=job.filled,
        prefix=job.fit.prefix,
        rules=job.fit.rules,
        compared=0 if outcome is None else outcome.compared,
        changed=0 if outcome is None else outcome.changed,
        records_checked=0 if outcome is None else outcome.records_checked,
        warnings=tuple(warnings),
        dry_run=outcome is None,
    )
