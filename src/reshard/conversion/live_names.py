"""Into training: a model's tensors by the names that a live module has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from reshard.conversion.base_model import CONFIG, Base, patched_config
from reshard.conversion.dtypes import Target
from reshard.conversion.options import Options
from reshard.conversion.output_model import Export
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, TensorSpec
from reshard.errors import PlanError
from reshard.formats import huggingface
from reshard.formats.info import named
from reshard.naming import NEWEST, parse_version, to_memory
from reshard.naming.layouts import Version
from reshard.storage import strict_json
from reshard.storage.local import Sources


def config_of(
    exported: Export, catalog: Catalog, base: Base | None, sources: Sources
) -> Mapping[str, Any]:
    """The model's config: the base's as the export changes it, or that of the Hugging Face folder
    that is converted."""
    if base is not None:
        patched = patched_config(base, exported.patches)
        return strict_json.parse_object(patched, str(base.folder / CONFIG))
    if not named(catalog.format).holds_config or not catalog.origin.root.is_dir():
        raise PlanError("--names memory needs the model's config.", hint="Pass --base.")
    return huggingface.read_config(catalog.origin.root, sources)


def placed(exported: Export, config: Mapping[str, Any], options: Options) -> Export:
    """The export with the names and shapes of a live module of the wanted transformers version."""
    entries: dict[str, Entry] = {}
    for target in exported.model:
        # The dtype that is written rides along: the layout joins tensors of one dtype only.
        spec = TensorSpec(target.spec.name, target.spec.dtype, target.spec.shape)
        entries[target.spec.name] = replace(target.source, spec=spec)
    version = options.transformers_version or _installed() or NEWEST
    live = to_memory(entries, config, version)
    text = ".".join(map(str, version))
    return replace(
        exported,
        model=[Target(replace(e.spec, name=name), e) for name, e in live.items()],
        findings=(
            *exported.findings,
            Finding("live-names", f"names are those of a live module of transformers {text}."),
        ),
        live=text,
    )


def _installed() -> Version | None:
    """The installed transformers' version, looked up without importing it."""
    from importlib import metadata  # 25 ms, for the few who ask

    try:
        return parse_version(metadata.version("transformers"))
    except metadata.PackageNotFoundError:
        return None
