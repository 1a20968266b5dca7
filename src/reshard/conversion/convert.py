"""Convert a checkpoint: one straight line from the source's metadata to the folder's rename.

prepare: read -> output model (names, dtypes) -> lay out      nothing is written
carry out: transfer -> manifest -> verify -> commit
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from reshard.conversion import manifest
from reshard.conversion.declared import CONVERT, parsed, words
from reshard.conversion.destination import Replaced, check_apart, check_destination
from reshard.conversion.execute import carry_out
from reshard.conversion.options import DTypeChoice, Engine, Layout, Lora, Names, SrmFormat, To
from reshard.conversion.other_errors import with_other_errors
from reshard.conversion.planning import Job, check_strict, prepare
from reshard.conversion.report import Moments, Report
from reshard.conversion.state_values import alike, check_values
from reshard.core.collecting import paused_gc
from reshard.core.findings import Finding
from reshard.core.options import PathLike, TorchDType, documented
from reshard.core.plan import Plan
from reshard.core.state import STATE_TABLE
from reshard.errors import VerificationError, WriteError, listed
from reshard.naming.rewards import ModelType, Pooling
from reshard.progress import StagedProgress
from reshard.storage import requests
from reshard.storage.local import Sources, snapshot
from reshard.storage.paths import file_size
from reshard.transfer import memory
from reshard.transfer.outcome import Outcome
from reshard.transfer.targets import target_at

# Options of a run that a later command does not repeat.
_ONCE = ("overwrite", "resume", "dry_run")


@documented(CONVERT)
def convert(
    source: PathLike,
    target: PathLike,
    *,
    to: To = "hf",
    base: PathLike | None = None,
    tag: str | None = None,
    prefix: str | None = None,
    role: str | None = None,
    masters: bool = False,
    dtype: DTypeChoice | TorchDType | None = None,
    max_shard_size: str | int | None = None,
    model_type: ModelType | None = None,
    pooling_method: Pooling | None = None,
    scale_for_train: bool | None = None,
    heads_types: Sequence[str] | None = None,
    probing_layer: int | None = None,
    value_head: str | None = None,
    srm_format: SrmFormat = "both",
    lora: Lora | None = None,
    lora_alpha: float | None = None,
    adapter_config: PathLike | None = None,
    adapter: str | None = None,
    names: Names | None = None,
    transformers_version: str | None = None,
    consumed_samples: int | None = None,
    optimizer: bool = False,
    layout: Layout | None = None,
    hyperparameters: PathLike | None = None,
    exclude_frozen: bool = False,
    fill_from_base: bool = False,
    allow: Sequence[str] = (),
    allow_unchanged: bool = False,
    allow_step_mismatch: bool = False,
    strict: bool | Sequence[str] = False,
    threads: int | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    progress: StagedProgress | None = None,
) -> Report:
    """Convert the checkpoint at `source` into the folder `target`.

    The source's format is detected. With `base`, the Hugging Face model that training started
    from, the output has the base's names and dtypes and all its other files; without it, names and
    dtypes stay as they are in the checkpoint. The command line's `reshard convert` takes the same
    options by the same names.

    Raises `OptionError`, which names the option, for a wrong value, and another `ReshardError` for
    any other failure; `target` then does not exist.

    Examples
    --------
    >>> report = convert("run/_actor", "out", base="Qwen2.5-7B")      # doctest: +SKIP
    >>> report.verified                                               # doctest: +SKIP
    True
    """
    given = dict(locals())
    began, asked = time.monotonic(), requests.total()
    options, running = parsed(given)
    writing = running.writing
    with with_other_errors(options):
        replaced = check_destination(
            options.target, options.source, options.base, overwrite=writing.overwrite
        )
    with Sources() as sources:
        with with_other_errors(options, checked_target=True), paused_gc():
            job = prepare(options, sources, strict=running.strict, dry_run=running.dry_run)
        # The source may have been found below the folder that was named.
        inputs = (job.catalog.origin.root, *sources.paths(), *(a.path for a in job.plan.assets))
        check_apart(options.target, "source", inputs)
        copied = sum(file_size(asset.path) for asset in job.plan.assets)
        lacking = target_at(options.target).lacking_space(job.plan.bytes_to_write + copied)
        if running.dry_run:
            job = job if lacking is None else _without_room(job, lacking)
            check_strict(job.plan.findings, options, running.strict)
            report = _report(
                job, given, time.monotonic() - began, replaced, _tag(job), threads=writing.threads
            )
            return replace(report, requests=requests.since(asked))
        if lacking is not None:
            raise lacking

        jobs, drafts = [job], list[Report]()
        del job

        def render(outcome: Outcome, copied: Mapping[str, str]) -> bytes:
            job = jobs.pop()  # from here on nobody holds it
            _check_changed(job, outcome, allow_unchanged=running.allow_unchanged)
            check_values(job.output.state, outcome)
            check_strict(_of_values(job, outcome), options, running.strict)
            # Nothing is read after the commit: it could fail, and the output stands.
            tag, threads = _tag(job), writing.threads
            drafts.append(_report(job, given, 0, replaced, tag, outcome, threads=threads))
            files = manifest.listed(job.plan, sources, copied)
            job = replace(job, plan=Plan(()))  # a quarter of what is held
            return _manifest(job, outcome.digests, files)

        outcome = carry_out(
            jobs[0].plan,
            sources,
            iter(jobs[0].catalog.records),
            options.target,
            writing,
            render=render,
            unprotected=jobs[0].unprotected,
        )
    (draft,) = drafts
    return replace(
        draft,
        seconds=round(time.monotonic() - began, 3),
        verified=writing.verify,
        findings=(*draft.findings, *outcome.findings),
        bytes_reused=outcome.reused if writing.resume else draft.bytes_reused,
        requests=requests.since(asked),
    )


def _without_room(job: Job, lacking: WriteError) -> Job:
    """Add the finding that the disk has no room for the output: a dry run reports it."""
    found = Finding("no-space", lacking.message, fix=lacking.hint or "")
    return replace(job, plan=replace(job.plan, findings=(*job.plan.findings, found)))


def _check_changed(job: Job, outcome: Outcome, *, allow_unchanged: bool) -> None:
    """Training does not give a result whose every tensor equals the base's."""
    if outcome.compared and not outcome.changed and not allow_unchanged:
        raise VerificationError(
            f"all {outcome.compared} tensors equal the base model's, so nothing was trained.",
            path=job.catalog.origin.root,
            hint="If that is what you expect, pass --allow-unchanged.",
        )


def _of_values(job: Job, outcome: Outcome) -> list[Finding]:
    """The findings on the values that passed: NaN, infinity, moments that are others'."""
    spoilt = [
        f"{table}{': ' if table else ''}{name} ({found.nan} NaN, {found.infinite} infinite)"
        for (table, name), found in outcome.not_finite.items()
        if found.nan or found.infinite
    ]
    what = f"{len(spoilt)} of {len(outcome.digests)} tensors hold values that are not finite"
    found = [Finding("not-finite", f"{what}: {listed(spoilt)}.")] if spoilt else []
    return [*found, *alike(job.output.state, outcome)]


def _manifest(
    job: Job,
    digests: Mapping[tuple[str, str], str],
    files: Mapping[str, manifest.WrittenFile],
) -> bytes:
    output = job.output
    names = {
        "prefix": output.name_map.prefix,
        "rules": list(output.name_map.rules),
        **output.matching.to_json(),
        "merged": output.merged,
        "transformers_version": output.loaded_by,
        "aliases": {name: t.spec.name for t in output.model for name in t.aliases},
        "lora": None if output.scaling is None else output.scaling.to_json(),
    }
    model = manifest.Table([t.spec for t in output.model], "", digests)
    beside = {
        file.name: manifest.Table([t.spec for t in file.tensors], file.name, digests)
        for file in output.side_files
    }
    state = output.state
    written = () if state is None else state.entries(masters=False)
    moments = manifest.Table([entry.spec for entry in written], STATE_TABLE, digests)
    catalog, stated = job.catalog, job.options.stated()
    return manifest.render(
        catalog.format,
        catalog.origin,
        stated,
        names,
        model,
        beside,
        files,
        generates=output.generates,
        state=moments,
        run=None if state is None else manifest.run_of(state),
    )


def _completed(finding: Finding, job: Job, given: Mapping[str, object]) -> Finding:
    """A finding that no base was given, with the command that makes the output complete."""
    if finding.code != "no-base":
        return finding
    again = {name: value for name, value in given.items() if name not in _ONCE}
    command = ["reshard", "convert", *words(again), "--base", "MODEL"]
    command += [] if given["dry_run"] else ["--overwrite"]
    return replace(finding, fix=f"To complete it: {shlex.join(command)}")


def _tag(job: Job) -> str | None:
    """The tag that was read, or the name of a checkpoint found below the source."""
    origin, source = job.catalog.origin, snapshot(job.options.source)
    if origin.tag is not None or origin.root == source:
        return origin.tag
    below = origin.root.relative_to(source) if origin.root.is_relative_to(source) else origin.root
    return next((part for part in below.parts if re.search(r"\d", part)), below.name)


def _report(
    job: Job,
    given: Mapping[str, object],
    seconds: float,
    replaced: Replaced | None,
    tag: str | None,
    outcome: Outcome | None = None,
    *,
    threads: int,
) -> Report:
    """What is reported of a conversion, up to what carrying it out to the end adds."""
    findings = list(job.plan.findings)
    if outcome is not None and outcome.compared and not outcome.changed:
        findings.append(
            Finding("unchanged", f"all {outcome.compared} tensors equal the base model's.")
        )
    if outcome is not None:
        findings.extend(_of_values(job, outcome))
    findings = [_completed(found, job, given) for found in findings]
    output = job.output
    return Report(
        source=os.fspath(job.options.source),
        target=os.fspath(job.options.target),
        format=job.catalog.format,
        tag=tag,
        checkpoint=os.fspath(job.catalog.origin.root),
        adapter=output.adapter,
        num_tensors=len(output.model) or sum(len(file.tensors) for file in output.side_files),
        bytes_read=job.plan.bytes_to_read if outcome is None else outcome.bytes_read,
        bytes_written=job.plan.bytes_to_write,
        seconds=round(seconds, 3),
        verified=False,
        files=tuple(file.name for file in job.plan.files),
        copied=tuple(asset.name for asset in job.plan.assets),
        config=job.config,
        memory=memory.needed(job.plan, threads) if outcome is None else None,
        matching=output.matching,
        prefix=output.name_map.prefix,
        rules=output.name_map.rules,
        merged=output.merged,
        compared=0 if outcome is None else outcome.compared,
        changed=0 if outcome is None else outcome.changed,
        records_checked=0 if outcome is None else outcome.checked.compared,
        records_unchecked=0 if outcome is None else outcome.checked.unchecked,
        findings=tuple(findings),
        dry_run=outcome is None,
        replaced=replaced,
        state=None if output.state is None else Moments.of(output.state),
    )
