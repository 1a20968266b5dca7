"""Quantised models on their way in: a base or a checkpoint as the numbers that its codes stand for.

Kinds that are not read as numbers are refused here, by name. Of a checkpoint with adapters on such
weights the adapters alone are taken, where the weights come from an unquantised base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from reshard.core.catalog import Asset, Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry
from reshard.formats import huggingface
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

# What describes the codes beside config.json: ModelOpt's, AutoGPTQ's and AutoAWQ's files.
_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_BASE_HINT = "Name the unquantised release that it was made from as the base."
_SOURCE_HINT = "Convert the unquantised release that it was made from."
_ADAPTERS_HINT = (
    "Its adapters are there: to merge them onto the unquantised (16-bit) model, pass that as "
    "--base with --fill-from-base."
)


def base_numbers(entries: Mapping[str, Entry], config: Mapping[str, Any]) -> Numbers:
    """A base model's tensors as numbers. Raises `UnsupportedError` for a kind that is not read."""
    kind = refused(entries, statement(config))
    if kind is not None:
        raise kind.error(_BASE_HINT)
    return numbers(entries, config)


def config_of(catalog: Catalog, sources: Sources) -> Mapping[str, Any]:
    """The config beside a checkpoint's tensors; empty where there is none."""
    root = catalog.origin.root
    folder = root if root.is_dir() else root.parent
    if catalog.format != "huggingface" or not (folder / "config.json").is_file():
        return {}
    return huggingface.read_config(folder, sources)


def refused_kind(catalog: Catalog, sources: Sources) -> Refused | None:
    """The kind that a checkpoint's weights are of, if it is one that is not read as numbers."""
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
                f"their {left} tensors are left out, and the base's weights taken, which differ "
                "from them by the rounding of the quantisation.",
            ),
        )
    found = numbers(entries, own)
    return replace(catalog, entries=found.entries, findings=findings), found


def without_descriptions(assets: tuple[Asset, ...]) -> tuple[Asset, ...]:
    """The files beside a model, without those that describe its codes."""
    return tuple(asset for asset in assets if asset.name not in _FILES)
