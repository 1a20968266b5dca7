"""Into training: a model's tensors by the names that a loaded model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from reshard.conversion.base_model import Base, holds_config, patched_fields
from reshard.conversion.dtypes import OutputTensor, as_entries, output_tensor
from reshard.conversion.options import Names, Options
from reshard.conversion.output_model import OutputModel
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry
from reshard.errors import PlanError
from reshard.formats import huggingface
from reshard.formats.info import output_format
from reshard.naming import NEWEST, parse_version, to_memory, was_read
from reshard.naming.answering import Apart, answers
from reshard.naming.layouts import Version
from reshard.storage.local import Sources


def chosen(options: Options, catalog: Catalog, base: Base | None) -> Names:
    """Which names are written: those of the option, or by default all names of the same bytes."""
    if options.names is not None:
        return options.names
    if options.optimizer:
        # A moment has one name, that of the loaded model; a checkpoint of training has it already.
        return "disk" if base is None else "memory"
    at_hand = base is not None or holds_config(catalog)
    return "all" if output_format(options.to).names_twice and at_hand else "disk"


def config_of(
    output: OutputModel, catalog: Catalog, base: Base | None, sources: Sources, needed: str
) -> Mapping[str, Any]:
    """The model's config, which the flag `needed` needs: the base's as the output changes it, or
    that of the Hugging Face folder that is converted."""
    if base is not None:
        return patched_fields(base, output.patches)
    if not holds_config(catalog):
        raise PlanError(f"{needed} needs the model's config.", hint="Pass --base.")
    return huggingface.read_config(catalog.origin.root, sources)


def placed(output: OutputModel, config: Mapping[str, Any], options: Options) -> OutputModel:
    """The output with the names and shapes of a loaded model of the requested transformers
    version."""
    version = version_of(options)
    loaded = to_memory(as_entries(output.model), config, version)
    text = ".".join(map(str, version))
    said = [
        Finding("memory-names", f"the names are those of a loaded model of transformers {text}.")
    ]
    if not was_read(version):
        newest = ".".join(map(str, NEWEST))
        message = (
            f"the loaded models of transformers {text} are not known: their names are assumed to "
            f"be those of the nearest known version, of which the newest is {newest}."
        )
        # Where the version was named, the code's own fix would offer what was passed.
        fix = "Load the output with strict names: one that differs is then an error."
        passed = options.transformers_version is not None
        said.append(Finding("memory-version-unknown", message, fix=fix if passed else ""))
    return replace(
        output,
        model=_once(loaded) if output_format(options.to).names_twice else _each(loaded),
        findings=(*output.findings, *said),
        loaded_by=text,
    )


def version_of(options: Options) -> Version:
    """The transformers version whose loaded model is meant."""
    return options.transformers_version or _installed() or NEWEST


def _each(entries: Mapping[str, Entry]) -> list[OutputTensor]:
    return [output_tensor(name, entry) for name, entry in entries.items()]


def _once(entries: Mapping[str, Entry]) -> list[OutputTensor]:
    """A tensor of the output for each; one with the bytes of an earlier one becomes its alias."""
    tensors: dict[object, OutputTensor] = {}
    for tensor in _each(entries):
        held = tensor.source.fragments
        # An empty tensor has no bytes to share.
        key = (held, tensor.spec.shape) if held else tensor.spec.name
        first = tensors.setdefault(key, tensor)
        if first is not tensor:
            tensors[key] = replace(first, aliases=(*first.aliases, tensor.spec.name))
    return list(tensors.values())


def answering(output: OutputModel, config: Mapping[str, Any], options: Options) -> OutputModel:
    """The output whose tensors also have the names that the loaded models of every transformers
    version ask for, as far as these are the same bytes.

    Raises `PlanError` where they are not for the version that the options name.
    """
    found = answers({t.spec.name: t.spec.shape for t in output.model}, config)
    version = options.transformers_version
    findings = []
    for apart in found.apart:
        finding = _apart(apart)
        if version is not None and apart.holds(version):
            raise PlanError(finding.message, hint=finding.fix)
        findings.append(finding)
    model = [replace(t, aliases=found.names.get(t.spec.name, ())) for t in output.model]
    count = sum(len(tensor.aliases) for tensor in model)
    if count:
        message = (
            f"the tensors also have the names that loaded models ask for: {count} more names for "
            "the same bytes."
        )
        findings.append(Finding("memory-names-added", message))
    return replace(output, model=model, findings=(*output.findings, *findings))


def _apart(apart: Apart) -> Finding:
    """The finding that the loaded models of some versions will not find their tensors."""
    if not apart.name:
        return Finding(
            "memory-layout-unknown",
            f"reshard does not know how loaded models of transformers {apart.versions} derive "
            "their tensors from those of the files: dcp.load into such a model may not find its "
            "names.",
        )
    since = ".".join(map(str, apart.since))
    return Finding(
        "memory-layout-apart",
        f"the loaded models of transformers {apart.versions} hold {apart.count} tensors that are "
        f"stacked, transposed or split differently than in the files, such as {apart.name!r}: "
        "dcp.load into such a model does not find them in this folder.",
        fix=f"For such a run, convert with --names memory --transformers-version {since}, or with "
        "the run's own version.",
    )


def _installed() -> Version | None:
    """The installed transformers' version, looked up without importing it."""
    from importlib import metadata  # 25 ms, for the few who ask

    try:
        return parse_version(metadata.version("transformers"))
    except metadata.PackageNotFoundError:
        return None
