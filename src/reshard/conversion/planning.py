"""Everything that a conversion decides, and every user error, before a byte is written.

locate and read -> output model (names, dtypes) -> layout in memory -> files, patched config, assets
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from msgspec import Struct
from msgspec.structs import replace

from reshard import formats
from reshard.conversion import memory_names, output_model, released, trainer_names, training
from reshard.conversion.base_model import (
    CONFIG,
    Base,
    changed_fields,
    dtype_patches,
    holds_config,
    patched_config,
    quantisation_paths,
    read_base,
)
from reshard.conversion.dtypes import OutputTensor
from reshard.conversion.idle import idle
from reshard.conversion.manifest import check_listable
from reshard.conversion.options import Options
from reshard.conversion.output_model import OutputModel
from reshard.conversion.quantised import as_numbers, dequantised, itself
from reshard.core.catalog import Asset, Catalog
from reshard.core.findings import CODES, Finding
from reshard.core.plan import OutputFile, Plan, Texts
from reshard.core.state import TrainingState
from reshard.core.tensors import main_dtype
from reshard.errors import FormatError, PlanError, UnsupportedError
from reshard.formats import locate
from reshard.formats.dcp.lightrft import client_state
from reshard.formats.info import named, output_format
from reshard.naming import Translation, memory_outputs, translation
from reshard.storage.local import Sources, snapshot
from reshard.storage.paths import exists
from reshard.transfer.checksums import Stretches, without_checksum
from reshard.transfer.reading import equal, first_bytes
from reshard.transfer.targets import check_space


class Job(Struct, frozen=True):
    """A conversion that is planned and not begun; `options` are those that it decided on.

    `unprotected` are the source's stretches that have no checksum, `config` the fields of
    config.json that are not the base's: its value and the new one.
    """

    options: Options
    catalog: Catalog
    output: OutputModel
    plan: Plan
    unprotected: Stretches = Stretches()
    config: Mapping[str, tuple[object, object]] = {}


# Bytes of an output that is planned though there is no room for it: thousand trillion parameters.
_MAX_PLANNED = 1 << 52


def prepare(
    options: Options, sources: Sources, *, strict: bool | Sequence[str], dry_run: bool = False
) -> Job:
    """The plan of a conversion, or the error that stands in its way; no byte is written.

    With `dry_run` an output that there is no room for is planned all the same.

    With `strict` a finding is an error: any warning, or those of the codes given.
    """
    catalog = locate.read(options.source, sources, options.selection)
    if options.selection.masters and named(catalog.format).masters == "never":
        raise UnsupportedError(
            f"reshard cannot read masters from {named(catalog.format).title}.",
            path=options.source,
            hint="Leave out --masters.",
        )
    unprotected = without_checksum(catalog.entries.values(), catalog.records)
    findings = (*_unsettled(catalog, options), *_unchecked(catalog, unprotected))
    catalog = replace(catalog, findings=findings)
    check_strict(catalog.findings, options, strict)
    if not catalog.entries:
        raise PlanError("it holds no tensors; there is nothing to convert.", path=options.source)
    catalog, state = training.with_state(catalog, options)
    base = None if options.base is None else read_base(options.base, sources)
    if base is not None and base.records:
        catalog = replace(catalog, records=(*catalog.records, *base.records))
    options = replace(options, names=memory_names.chosen(options, catalog, base))
    catalog, numbers = as_numbers(catalog, base, options, sources)
    output = plan_output(catalog, base, options, sources)
    if state is not None:
        output = carried_along(output, state, catalog, base, options, sources)
    # Before the layout, which takes long for the petabytes that a damaged file may state.
    check_listable([tensor.spec for tensor in output.model])
    nbytes = sum(tensor.spec.nbytes for tensor in output.model)
    if not dry_run or nbytes > _MAX_PLANNED:
        check_space(options.target, nbytes)
    files, texts, said = _files(output, options)
    if not files:
        raise PlanError("nothing is left to write.", path=options.source)
    if options.consumed_samples is not None and state is None:
        texts = (*texts, client_state(options.consumed_samples))
    model = base
    if base is None and output_format(options.to).takes_files:
        model = itself(catalog, numbers, sources)
    assets, patched, lacking = _assets(output, model, options)
    plan = Plan(
        files,
        (*texts, *patched, *output.texts),
        assets,
        (
            *catalog.findings,
            *_from_cache(options),
            *dequantised(numbers, base),
            *output.findings,
            *_of_release(output, catalog, base, options, sources),
            *said,
            *idle(options, catalog, base, output),
            *lacking,
        ),
    )
    check_strict(plan.findings, options, strict)
    _check_names(plan)
    texts_by_name = dict((*patched, *output.texts))
    changed = (
        changed_fields(model, texts_by_name[CONFIG])
        if model is not None and CONFIG in texts_by_name
        else {}
    )
    return Job(options, catalog, output, plan, unprotected, changed)


def _from_cache(options: Options) -> tuple[Finding, ...]:
    """Which snapshots of the Hugging Face cache are read, where a model was named as on the hub."""
    return tuple(
        Finding("from-cache", f"{path} is read from the Hugging Face cache: {snapshot(path)}.")
        for path in (options.source, options.base)
        if path is not None and not exists(path)
    )


def _check_names(plan: Plan) -> None:
    """Refuse files whose names are not text: `reshard.json` lists all files."""
    for asset in plan.assets:
        try:
            asset.name.encode()
        except UnicodeEncodeError:
            raise FormatError(
                "the file's name is not UTF-8, so it cannot be listed in reshard.json.",
                path=asset.path,
                hint="Rename it, or move it away.",
            ) from None


def _unsettled(catalog: Catalog, options: Options) -> tuple[Finding, ...]:
    """The reader's findings, but for those whose fix is an option that is passed."""
    settled = {"shapes-unstated"} if options.base is not None else set()
    settled |= {"names-without-weights"} if options.fill_from_base else set()
    return tuple(found for found in catalog.findings if found.code not in settled)


def _unchecked(catalog: Catalog, unprotected: Stretches) -> tuple[Finding, ...]:
    """The finding that files lack checksums that their format has, unless its reader reported
    it."""
    known = any(found.code == "no-checksums" for found in catalog.findings)
    if not unprotected or known or not named(catalog.format).checksums:
        return ()
    total = len(unprotected) + len(catalog.records)
    files = unprotected.files
    message = (
        f"{len(unprotected)} of {total} stretches of its files, in {files} of them, have no "
        "checksum: they were saved without one (a CRC-32 of 0)."
    )
    return (Finding("no-checksums", message),)


def check_strict(
    findings: Sequence[Finding], options: Options, strict: bool | Sequence[str]
) -> None:
    """Refuse findings of the codes in `strict`, or, if it is True, all except those of severity
    info."""
    refused = [found for found in findings if found.refused_by(strict)]
    if refused:
        more = f" And {len(refused) - 1} more." if len(refused) > 1 else ""
        raise PlanError(
            f"--strict refuses the finding {refused[0].code}: {refused[0].message}{more}",
            path=options.source,
            hint=refused[0].fix or CODES[refused[0].code].fix or None,
        )


def plan_output(
    catalog: Catalog, base: Base | None, options: Options, sources: Sources
) -> OutputModel:
    """What the checkpoint becomes: by the base's names or its own, or those of a loaded model or of
    a trainer."""
    if base is None:
        output = output_model.plain(catalog, options)
    else:
        output = output_model.onto(catalog, base, options, sources)
    if trainer_names.trainer(options) is not None:
        config = memory_names.config_of(
            output, catalog, base, sources, trainer_names.asked(options)
        )
        return trainer_names.renamed(output, config, options, sources)
    if options.names in ("all", "memory"):
        asked = f"--names {options.names}"
        config = memory_names.config_of(output, catalog, base, sources, asked)
        place = memory_names.placed if options.names == "memory" else memory_names.answering
        output = place(output, config, options)
    elif options.names == "hub":
        config = memory_names.config_of(output, catalog, base, sources, "--names hub")
        output = released.in_layout(output, config)
    return output


def _of_release(
    output: OutputModel, catalog: Catalog, base: Base | None, options: Options, sources: Sources
) -> tuple[Finding, ...]:
    """How the output differs from releases, where it is a model's folder."""
    known = base is not None or holds_config(catalog)
    if not (known and output.model and output.assets and output_format(options.to).takes_files):
        return ()
    if options.names == "memory":
        return ()
    config = memory_names.config_of(output, catalog, base, sources, "--names hub")
    return tuple(released.findings(output, config))


def carried_along(
    output: OutputModel,
    state: TrainingState,
    catalog: Catalog,
    base: Base | None,
    options: Options,
    sources: Sources,
    *,
    completed: bool = True,
) -> OutputModel:
    """The output with the training state under its names, and with the settings that the format
    needs, unless `completed` is false.

    Without a base the loaded model asks for the tied names, too, which a base's layout adds.
    """
    maps: list[Translation] = []
    if base is None:
        output = replace(output, model=[replace(t, aliases=t.source.aliases) for t in output.model])
    else:
        if output.translation is not None:
            maps.append(output.translation)
        maps.append(translation(output.name_map.outputs))
        if options.names == "memory":
            table = dict(catalog.entries)
            for names in maps:
                table = names.make(table)
            shapes = {name: entry.spec.shape for name, entry in table.items()}
            config = memory_names.config_of(output, catalog, base, sources, "--optimizer")
            loaded = memory_outputs(shapes, config, memory_names.version_of(options))
            maps.append(translation(loaded))
    to = output_format(options.to)
    carried = training.carried(state, output, maps)
    if base is None:
        output = training.with_ties(
            output,
            carried,
            lambda one, other: equal(one, other, sources),
            lambda entry: first_bytes(entry, sources),
        )
    if completed:
        carried = formats.as_written(to, carried, options.layout)
    if to.full_precision:
        return training.in_full_precision(carried, output)
    findings = (*output.findings, *training.rounded(carried, output))
    return replace(output, state=carried, findings=findings)


def _files(
    output: OutputModel, options: Options
) -> tuple[tuple[OutputFile, ...], Texts, tuple[Finding, ...]]:
    """The model's files and those beside it, the small files that list them, and what a user
    should know of them."""
    files: tuple[OutputFile, ...] = ()
    texts: Texts = ()
    findings: tuple[Finding, ...] = ()
    if output.state is not None:
        laid = formats.state_writer(output_format(options.to)).lay_out_state(
            _slots(output.model), output.state, options.max_shard_nbytes, options.layout
        )
        files, texts, findings = laid.files, laid.texts, laid.findings
    elif output.model:
        layout = formats.writer(output_format(options.to))
        files, texts = layout.lay_out(_slots(output.model), options.max_shard_nbytes)
    beside = tuple(
        formats.single_writer(file.name).lay_out_file(file.name, _slots(file.tensors))
        for file in output.side_files
    )
    if not texts and any(_lies_among(file.name, files) for file in output.side_files):
        texts = formats.index(output_format(options.to), files)
    return files + beside, texts, findings


def _lies_among(name: str, files: Sequence[OutputFile]) -> bool:
    """Whether a file's name does not distinguish it from the model's: same folder, same suffix."""
    return "/" not in name and PurePath(name).suffix in {PurePath(f.name).suffix for f in files}


def _slots(tensors: Sequence[OutputTensor]) -> list[formats.TensorToWrite]:
    return [(t.spec, t.source.aliased(t.aliases), t.reference) for t in tensors]


def _assets(
    output: OutputModel, base: Base | None, options: Options
) -> tuple[tuple[Asset, ...], tuple[tuple[str, bytes], ...], tuple[Finding, ...]]:
    """The base's other files, its patched config, and what a folder without them lacks."""
    if not output_format(options.to).takes_files:
        return (), (), ()
    if base is None:
        lacks = Finding(
            "no-base",
            f"{options.target} holds only weights, under the checkpoint's names: it has no "
            "config.json and no tokenizer, so transformers and vLLM cannot load it.",
        )
        return (), (), (lacks,)
    if not output.assets:
        return (), (), ()
    findings = _said_of(base)
    patches = {**base.repairs, **output.patches}
    dtype = _stated_dtype(output, base, options)
    if dtype is not None:
        patches.update(dtype_patches(base, dtype))
    written = {file.name for file in output.side_files}
    modules = [module for module in base.modules if module.file in written]
    assets = tuple(a for a in base.assets if not any(module.owns(a) for module in modules))
    if not patches and not quantisation_paths(base):
        return assets, (), findings
    assets = tuple(asset for asset in assets if asset.name != CONFIG)
    return assets, ((CONFIG, patched_config(base, patches)),), findings


def _said_of(base: Base) -> tuple[Finding, ...]:
    """The finding on the base's config: a class name that was repaired."""
    if not base.repairs:
        return ()
    message = (
        f"the base's config names {base.stated_class!r}, which is what FSDP calls a class while it "
        f"trains; the output's names {base.config['architectures'][0]!r}."
    )
    return (Finding("architecture-repaired", message, subject=CONFIG),)


def _stated_dtype(output: OutputModel, base: Base, options: Options) -> str | None:
    """The dtype that the config must state where it need not be the base's; None: leave it.

    Of `keep`, and of a base that is quantised, it is the one that most elements have.
    """
    if options.dtype == "base" and base.quantised is None:
        return None
    if options.dtype not in ("base", "keep"):
        return options.dtype
    main = main_dtype(tensor.spec for tensor in output.model)
    return main.name if main is not None and main.floating and main.itemsize > 1 else None
