"""Into training: a model's tensors under the names of a trainer that has its own models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from reshard.conversion.dtypes import OutputTensor, as_entries, output_tensor
from reshard.conversion.options import Names, Options
from reshard.conversion.output_model import OutputModel
from reshard.core.findings import Finding
from reshard.core.tensors import Entry
from reshard.errors import PlanError, listed
from reshard.formats.info import output_format
from reshard.naming import Translation, apply, megatron_into, meta, titan_into
from reshard.storage.local import Sources
from reshard.transfer.reading import equal

_LISTED = 5
_TITAN: Names = "torchtitan"
# What the format of Meta's files calls its names.
_META = "meta"


def trainer(options: Options) -> str | None:
    """The trainer whose names the output has; None: its names are the hub's, or a loaded
    model's."""
    return output_format(options.to).naming or (_TITAN if options.names == _TITAN else None)


def asked(options: Options) -> str:
    """The flag that asked for them."""
    return f"--names {_TITAN}" if options.names == _TITAN else f"--to {options.to}"


def renamed(
    output: OutputModel, config: Mapping[str, Any], options: Options, sources: Sources
) -> OutputModel:
    """The output by the trainer's names.

    Raises `UnsupportedError`, `NamesError`; `PlanError` where what the trainer shares is two.
    """
    entries = as_entries(output.model)
    if options.names == _TITAN:
        return _of_titan(output, entries, config, sources)
    if output_format(options.to).naming == _META:
        return _of_meta(output, entries, config)
    return _of_megatron(output, entries, config, sources)


def _of_meta(
    output: OutputModel, entries: Mapping[str, Entry], config: Mapping[str, Any]
) -> OutputModel:
    found = meta.into(entries, config)
    text = json.dumps(meta.params(found, config), indent=2) + "\n"
    model = [output_tensor(name, entry) for name, entry in found.items()]
    named = _with_names(output, model, "Meta's", ())
    return replace(named, texts=(*named.texts, (meta.PARAMS, text.encode())))


def _of_titan(
    output: OutputModel, entries: Mapping[str, Entry], config: Mapping[str, Any], sources: Sources
) -> OutputModel:
    found = titan_into.into(entries, config)
    _check_copies(found.copies, entries, sources)
    model = [
        output_tensor(name, entry, aliases=entry.aliases) for name, entry in found.entries.items()
    ]
    said = []
    if found.left_out:
        message = (
            f"{len(found.left_out)} tensors of layers for multi-token prediction are not written: "
            f"{listed(found.left_out, _LISTED)}."
        )
        said.append(Finding("layers-left-out", message))
    named = _with_names(output, model, "torchtitan's", said)

    def make(table: Mapping[str, Entry]) -> dict[str, Entry]:
        held = {name: entry for name, entry in table.items() if name in entries}
        return dict(titan_into.into(held, config).entries)

    return replace(named, trainer=Translation(found.sources, make))


def _of_megatron(
    output: OutputModel, entries: Mapping[str, Entry], config: Mapping[str, Any], sources: Sources
) -> OutputModel:
    found = megatron_into.into({name: e.spec for name, e in entries.items()}, config)
    _check_copies(found.copies, entries, sources)
    model = [
        output_tensor(name, entry, aliases=found.aliases.get(name, ()))
        for name, entry in apply(found.outputs, entries).items()
    ]
    return _with_names(output, model, "Megatron-Core's", _left_out(found))


def _with_names(
    output: OutputModel, model: Sequence[OutputTensor], whose: str, said: Sequence[Finding]
) -> OutputModel:
    """The output with these tensors, which have the names of a trainer, and what is said of it."""
    rule = f"the hub's names -> {whose} ({len(output.model)} -> {len(model)})"
    name_map = replace(output.name_map, rules=(*output.name_map.rules, rule))
    findings = (*output.findings, *said)
    return replace(output, model=model, name_map=name_map, findings=findings)


def _check_copies(
    copies: Mapping[str, str], entries: Mapping[str, Entry], sources: Sources
) -> None:
    """Refuse copies that differ: the trainer has one tensor for both."""
    for name, shared in copies.items():
        if shared not in entries or entries[name].spec.shape != entries[shared].spec.shape:
            raise PlanError(
                f"it differs from {shared!r}, of which the trainer expects it to be a copy.",
                tensor=name,
            )
        if not equal(entries[name], entries[shared], sources):
            raise PlanError(
                f"it differs from {shared!r}, but the trainer has one tensor for both.",
                tensor=name,
            )


def _left_out(into: megatron_into.Into) -> list[Finding]:
    if not into.copies:
        return []
    message = (
        f"{len(into.copies)} copies of embedding and head in layers for multi-token prediction "
        f"are not written, since Megatron-Core shares them: {listed(list(into.copies), _LISTED)}."
    )
    return [Finding("copies-shared", message)]
