"""Convert a checkpoint: one straight line from the source's metadata to the folder's rename.

prepare: read -> export (names, dtypes) -> lay out      nothing is written
carry out: transfer -> manifest -> verify -> commit
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from reshard import formats
from reshard.conversion import manifest
from reshard.conversion.destination import Replaced, check_apart, check_destination
from reshard.conversion.dtypes import CHOICES
from reshard.conversion.execute import Writing, carry_out
from reshard.conversion.options import (
    LORA,
    MODEL_TYPES,
    NAMES,
    POOLINGS,
    SRM_FORMATS,
    Lora,
    LoraChoice,
    Names,
    Options,
    RewardChoice,
    SrmFormat,
)
from reshard.conversion.planning import Job, prepare
from reshard.conversion.report import Report
from reshard.core.findings import Finding
from reshard.core.plan import parse_size
from reshard.errors import OptionError, VerificationError
from reshard.naming import parse_version
from reshard.naming.rewards import ModelType, Pooling, RewardOptions
from reshard.progress import StagedProgress
from reshard.storage.local import Sources
from reshard.transfer.commit import check_space
from reshard.transfer.engine import Outcome

PathLike = str | os.PathLike[str]

# More threads than this only compete for the memory bus.
_MAX_THREADS = 4

# As `save_pretrained` has it; for DCP small enough that many ranks read different files.
_MAX_SHARD_SIZE = {"hf": "5GB", "dcp": "1GB"}


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
    model_type: str | None = None,
    pooling_method: str | None = None,
    scale_for_train: bool | None = None,
    heads_types: Sequence[str] | None = None,
    probing_layer: int | None = None,
    value_head: str | None = None,
    srm_format: str = "both",
    lora: str | None = None,
    lora_alpha: float | None = None,
    adapter_config: PathLike | None = None,
    adapter: str | None = None,
    names: str | None = None,
    transformers_version: str | None = None,
    consumed_samples: int | None = None,
    exclude_frozen: bool = False,
    fill_from_base: bool = False,
    allow: Sequence[str] = (),
    allow_unchanged: bool = False,
    allow_step_mismatch: bool = False,
    strict: bool = False,
    threads: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    progress: StagedProgress | None = None,
) -> Report:
    """Convert the checkpoint at `source` into the folder `target`.

    The source's format is detected. With `base`, the Hugging Face model that training started
    from, the output has the base's names and dtypes and all its other files; without it, names and
    dtypes stay as they are in the checkpoint. `dtype` is one of `base` (the default with a base),
    `keep`, `float32`, `bfloat16`, `float16`. The command line's `reshard convert` takes the same
    options by the same names and `--help` describes them.

    Raises a `ReshardError` for anything that stands in the way; `target` then does not exist.

    >>> report = convert("run/_actor", "out", base="Qwen2.5-7B")      # doctest: +SKIP
    >>> report.verified                                               # doctest: +SKIP
    True
    """
    began = time.monotonic()
    _one_of("to", to, tuple(formats.TARGETS))
    _one_of("model_type", model_type, MODEL_TYPES)
    _one_of("srm_format", srm_format, SRM_FORMATS)
    _one_of("lora", lora, LORA)
    _one_of("names", names, NAMES)
    if names == "all" and to not in formats.ALIASING:
        raise OptionError(
            "names 'all' gives the same bytes several names, which files of --to hf cannot.",
            hint="Pass --to dcp, or leave out --names.",
        )
    if consumed_samples is not None and (to != "dcp" or not 0 <= consumed_samples < 1 << 63):
        raise OptionError(
            f"consumed_samples is {consumed_samples}, with --to {to}: it is the number of samples "
            "that a run of LightRFT has used up, written beside a DCP checkpoint.",
            hint="Pass a number from 0 on, and --to dcp; or leave out --consumed-samples.",
        )
    _one_of("pooling_method", pooling_method, POOLINGS)
    if isinstance(heads_types, str):
        raise OptionError("heads_types is a list of names.", hint=f"Pass [{heads_types!r}].")
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be positive, {threads} is not.")
    heads = RewardOptions(
        cast("Pooling | None", pooling_method),
        scale_for_train,
        tuple(heads_types) if heads_types else None,
        value_head,
    )
    shard_size = _MAX_SHARD_SIZE[to] if max_shard_size is None else max_shard_size
    options = Options(
        source=Path(source),
        target=Path(target),
        base=None if base is None else Path(base),
        to=to,
        selection=formats.Selection(tag, prefix, allow_step_mismatch),
        dtype=_check_dtype(dtype, base),
        max_shard_nbytes=parse_size(shard_size),
        exclude_frozen=exclude_frozen,
        fill_from_base=fill_from_base,
        allow=tuple(allow),
        rewards=RewardChoice(
            cast("ModelType | None", model_type),
            heads,
            probing_layer,
            cast(SrmFormat, srm_format),
        ),
        lora=LoraChoice(
            cast("Lora | None", lora),
            lora_alpha,
            None if adapter_config is None else Path(adapter_config),
            adapter,
        ),
        names=cast("Names | None", names),
        transformers_version=parse_version(transformers_version) if transformers_version else None,
        consumed_samples=consumed_samples,
    )
    if base is None:
        _check_needs_no_base(options, allow_unchanged=allow_unchanged)
    replaced = check_destination(options.target, options.source, options.base, overwrite=overwrite)
    workers = threads or min(_MAX_THREADS, os.cpu_count() or 1)
    with Sources() as sources:
        job = prepare(options, sources, strict=strict)
        # The source may have been found below the folder that was named.
        inputs = (job.catalog.origin.root, *sources.paths(), *(a.path for a in job.plan.assets))
        check_apart(options.target, "source", inputs)
        copied = sum(asset.path.stat().st_size for asset in job.plan.assets)
        check_space(options.target, job.plan.bytes_to_write + copied)
        if dry_run:
            return _report(job, time.monotonic() - began, replaced)

        def render(outcome: Outcome) -> bytes:
            _check_changed(job, outcome, allow_unchanged=allow_unchanged)
            return _manifest(job, outcome.digests, sources)

        writing = Writing(workers, overwrite, verify, progress)
        records = job.catalog.records
        outcome = carry_out(job.plan, sources, records, options.target, writing, render=render)
    return _report(job, time.monotonic() - began, replaced, outcome, verified=verify)


def _check_dtype(dtype: str | None, base: PathLike | None) -> str:
    choice = dtype or ("keep" if base is None else "base")
    _one_of("dtype", choice, CHOICES)
    if choice == "base" and base is None:
        raise OptionError("dtype 'base' takes the dtypes of a base.", hint="Pass --base.")
    return choice


def _check_needs_no_base(options: Options, *, allow_unchanged: bool) -> None:
    """Refuse options that act on a base's names or values where there is none."""
    rewards, heads, lora = options.rewards, options.rewards.heads, options.lora
    given = {
        "model-type": rewards.model_type not in (None, "vision2seq"),
        "pooling-method": heads.pooling is not None,
        "scale-for-train": heads.scaled is not None,
        "heads-types": heads.types is not None,
        "value-head": heads.value_head is not None,
        "probing-layer": rewards.probing_layer is not None,
        "srm-format": rewards.srm_format != RewardChoice().srm_format,
        "lora": lora.mode is not None,
        "lora-alpha": lora.alpha is not None,
        "adapter-config": lora.config is not None,
        "adapter": lora.adapter is not None,
        "fill-from-base": options.fill_from_base,
        "allow": bool(options.allow),
        "allow-unchanged": allow_unchanged,
    }
    idle = [f"--{name}" for name, said in given.items() if said]
    if idle:
        raise OptionError(
            f"{', '.join(idle)}: nothing to act on without a base.", hint="Pass --base."
        )


def _one_of(name: str, value: str | None, choices: tuple[str, ...]) -> None:
    if value is not None and value not in choices:
        raise OptionError(f"{value!r} is no {name}.", hint=f"Use one of {', '.join(choices)}.")


def _check_changed(job: Job, outcome: Outcome, *, allow_unchanged: bool) -> None:
    """A result whose every tensor is the base's is not what training gives."""
    if outcome.compared and not outcome.changed and not allow_unchanged:
        raise VerificationError(
            f"all {outcome.compared} tensors equal the base model's: the checkpoint holds no "
            "training.",
            path=job.catalog.origin.root,
            hint="Pass --allow-unchanged if that is meant.",
        )


def _manifest(job: Job, digests: Mapping[tuple[str, str], str], sources: Sources) -> bytes:
    exported = job.export
    names = {
        "prefix": exported.name_map.prefix,
        "rules": list(exported.name_map.rules),
        "tied": dict(exported.name_map.tied),
        "filled": list(exported.filled),
        "missing": list(exported.missing),
        "unexpected": list(exported.name_map.dropped),
        "merged": exported.merged,
        "transformers_version": exported.live,
        "aliases": {name: target.spec.name for target in exported.model for name in target.aliases},
        "lora": None if exported.scaling is None else exported.scaling.to_json(),
    }
    model = manifest.state([target.spec for target in exported.model], "", digests)
    beside = {
        side.name: manifest.state([t.spec for t in side.targets], side.name, digests)
        for side in exported.sides
    }
    catalog, stated = job.catalog, job.options.stated()
    files = manifest.listed(job.plan, sources)
    return manifest.render(catalog.format, catalog.origin, stated, names, model, beside, files)


def _report(
    job: Job,
    seconds: float,
    replaced: Replaced | None,
    outcome: Outcome | None = None,
    *,
    verified: bool = False,
) -> Report:
    findings = list(job.plan.findings)
    if outcome is not None and outcome.compared and not outcome.changed:
        findings.append(
            Finding("unchanged", f"all {outcome.compared} tensors equal the base model's.")
        )
    if outcome is not None:
        findings.extend(outcome.findings)
    exported = job.export
    return Report(
        source=os.fspath(job.options.source),
        target=os.fspath(job.options.target),
        format=job.catalog.format,
        tag=job.catalog.origin.tag,
        num_tensors=len(exported.model) or sum(len(side.targets) for side in exported.sides),
        bytes_read=job.plan.bytes_to_read if outcome is None else outcome.bytes_read,
        bytes_written=job.plan.bytes_to_write,
        seconds=round(seconds, 3),
        verified=verified,
        files=tuple(file.name for file in job.plan.files),
        missing=exported.missing,
        unexpected=exported.name_map.dropped,
        tied=exported.name_map.tied,
        filled=exported.filled,
        prefix=exported.name_map.prefix,
        rules=exported.name_map.rules,
        merged=exported.merged,
        compared=0 if outcome is None else outcome.compared,
        changed=0 if outcome is None else outcome.changed,
        records_checked=0 if outcome is None else outcome.records_checked,
        findings=tuple(findings),
        dry_run=outcome is None,
        replaced=replaced,
    )
