"""Quantised models as input: a base or a checkpoint as the numbers that its codes represent.

Kinds that are not read as numbers are refused here, by name. If a checkpoint has adapters on such
weights, only the adapters are read, and the weights come from an unquantised base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from reshard.conversion.base_model import Base, base_of, holds_config
from reshard.conversion.options import Options
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.errors import at
from reshard.formats import huggingface
from reshard.naming.lora.config import NAME as ADAPTER_CONFIG
from reshard.naming.lora.find import holds_adapters
from reshard.naming.quantised import (
    Numbers,
    Refused,
    numbers,
    refused,
    statement,
    without_codes,
)
from reshard.storage.local import Sources
from reshard.storage.paths import is_file, is_folder

_SOURCE_HINT = "Convert the unquantised release that it was made from."
_ADAPTERS_HINT = (
    "Its adapters are there: to merge them onto the unquantised (16-bit) model, pass that as "
    "--base with --fill-from-base."
)


def config_of(catalog: Catalog, sources: Sources) -> Mapping[str, Any]:
    """The config beside a checkpoint's tensors; empty where there is none."""
    root = catalog.origin.root
    folder = root if is_folder(root) else root.parent
    return huggingface.read_config(folder, sources) if holds_config(catalog, folder) else {}


def refused_kind(catalog: Catalog, sources: Sources) -> Refused | None:
    """The kind of a checkpoint's weights, if that kind is not read as numbers."""
    return refused(catalog.entries, statement(config_of(catalog, sources)))


def source_numbers(
    catalog: Catalog,
    sources: Sources,
    *,
    config: Mapping[str, Any] | None = None,
    filled: bool = False,
) -> tuple[Catalog, Numbers]:
    """A checkpoint's tensors as numbers, and what was found.

    `config` is the base's, for a checkpoint that has none. With `filled` there is an unquantised
    base that weights are taken from: adapters on weights of a kind that is not read go without
    those. Raises `UnsupportedError` for such a kind otherwise.
    """
    own = config_of(catalog, sources) or config or {}
    entries, findings = catalog.entries, catalog.findings
    kind = refused(entries, statement(own))
    if kind is not None:
        adapters = holds_adapters(entries)
        if not (adapters and filled):
            raise kind.error(_ADAPTERS_HINT if adapters else _SOURCE_HINT)
        entries = without_codes(entries, kind)
        left = len(catalog.entries) - len(entries)
        findings = (
            *findings,
            Finding(
                "codes-left-out",
                f"{len(kind.modules)} weights of the checkpoint are quantised by {kind.title}: "
                f"their {left} tensors are left out, and the base's weights, which differ from "
                f"them by the quantisation error, are used instead.",
            ),
        )
    found = numbers(entries, own)
    return replace(catalog, entries=found.entries, findings=findings), found


def as_numbers(
    catalog: Catalog, base: Base | None, options: Options, sources: Sources
) -> tuple[Catalog, Numbers]:
    """The checkpoint of a conversion with its quantised weights as numbers."""
    config = None if base is None else base.config
    filled = base is not None and (options.fill_from_base or options.lora.alone)
    with at(options.source):
        return source_numbers(catalog, sources, config=config, filled=filled)


def itself(catalog: Catalog, numbers: Numbers, sources: Sources) -> Base | None:
    """A model that is converted without a base: its own files go along.

    `numbers` are its tensors as numbers. None where no config lies beside it, or where it is an
    adapter.
    """
    root = catalog.origin.root
    adapted = is_file(root / ADAPTER_CONFIG) and holds_adapters(catalog.entries)
    if not holds_config(catalog) or adapted:
        return None
    return base_of(root, huggingface.read_config(root, sources), numbers, catalog.records, sources)


def dequantised(numbers: Numbers, base: Base | None) -> tuple[Finding, ...]:
    """The finding that weights are written as numbers which are codes in the checkpoint or in
    the base."""
    findings = [numbers.finding("the checkpoint's")] if numbers.kinds else []
    quantised = None if base is None else base.quantised
    if quantised is not None and quantised.kinds:
        findings.append(quantised.finding("the base's"))
    elif quantised is not None and quantised.stated is not None:
        message = (
            f"the base's config says that its weights are quantised ({quantised.stated.title}), "
            "and they are not: the output's config does not say so."
        )
        findings.append(Finding("quantisation-unfounded", message))
    return tuple(findings)


def compared_as_numbers(
    first: Catalog, second: Catalog, sources: Sources
) -> tuple[Catalog, Catalog]:
    """Two sides with their quantised weights as numbers; if both have codes that are not read,
    these are compared as they are stored."""
    kinds = (refused_kind(first, sources), refused_kind(second, sources))
    if kinds[0] is not None and kinds[1] is not None:
        return _with_note(first, kinds[0]), _with_note(second, kinds[1])
    one, mine = source_numbers(first, sources, filled=True)
    other, theirs = source_numbers(second, sources, filled=True)
    if mine.kinds and theirs.kinds:
        # Rounded to bfloat16 they could be equal and their codes or scales not.
        return replace(one, entries=mine.exact()), replace(other, entries=theirs.exact())
    return one, other


def _with_note(side: Catalog, kind: Refused) -> Catalog:
    message = (
        f"its weights are quantised by {kind.title}: codes and scales are compared as they are "
        "stored."
    )
    note = Finding("codes-compared", message, subject=str(side.origin.root))
    return replace(side, findings=(*side.findings, note))
