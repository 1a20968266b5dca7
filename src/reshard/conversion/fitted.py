"""A checkpoint on its base: what its tensors are, and the map of their names.

    separate adapters -> modules of sub-folders -> separate heads -> fit names -> updates

Each step is a function, and its value a field of `Fitted`.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from reshard.conversion import adapters
from reshard.conversion.base_model import Base
from reshard.conversion.modules import take
from reshard.conversion.options import Options
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Equal
from reshard.errors import NamesError
from reshard.naming import FitOptions, NameMap, fit
from reshard.naming.backbone import has_head
from reshard.naming.lora.find import Separated
from reshard.naming.lora.output import Updates, updates
from reshard.naming.partners import schema_with_ties
from reshard.naming.rewards import ModelParts, check, split
from reshard.naming.value_heads import classifier
from reshard.storage.local import Sources
from reshard.transfer.reading import equal


class Fitted(Struct, frozen=True):
    """A checkpoint's tensors, and how they go onto the base's.

    modules: the tensors of the base's modules in sub-folders, by file. classes: the changes of the
    config where a critic becomes a sequence classifier. compare: whether two tensors hold the same
    values, None where no value is read.
    """

    base: Base
    options: Options
    adapters: adapters.Adapters
    parts: ModelParts
    modules: Mapping[str, Mapping[str, Entry]]
    classes: Mapping[str, object] | None
    compare: Equal | None
    name_map: NameMap
    updates: Updates
    findings: tuple[Finding, ...]

    @property
    def alone(self) -> bool:
        """Whether only the adapters are written, without the model."""
        return self.options.lora.alone

    @property
    def separated(self) -> Separated:
        """The checkpoint's tensors without the adapters, and the adapters."""
        return self.adapters.separated

    @property
    def with_adapter(self) -> bool:
        """Whether an adapter folder is written."""
        return self.adapters.config is not None and self.options.lora.writes_adapter


def fitted(catalog: Catalog, base: Base, options: Options, sources: Sources | None) -> Fitted:
    """Split a checkpoint into model, heads and adapters, and fit its names onto the base's.

    Without `sources` no value is read, and tied tensors are assumed to be equal.
    """
    found = adapters.find(catalog, base, options, sources)
    entries, modules = take(found.separated.entries, base.modules)
    parts = _parts(entries, base, options)
    classes = _classes(parts, base)
    compare = _comparison(sources)
    name_map = _name_map(parts, found, base, options, compare, scored=classes is not None)
    made, left_out = _updates(found, name_map, base, options, sources)
    alone = options.lora.alone  # the findings concern the model, not the adapter
    findings = (*found.findings, *(() if alone else name_map.findings), *left_out)
    return Fitted(base, options, found, parts, modules, classes, compare, name_map, made, findings)


def _parts(entries: Mapping[str, Entry], base: Base, options: Options) -> ModelParts:
    choice = options.rewards
    allows = FitOptions(allow=options.allow).allows
    parts = split(entries, base.entries, choice.heads.value_head, allows)
    return check(parts, choice.model_type, choice.heads)


def _classes(parts: ModelParts, base: Base) -> dict[str, object] | None:
    """The config changes of a critic that becomes a sequence classifier."""
    if parts.value is None:
        return None
    classes = base.config.get("architectures") or ()
    return classifier(parts.value, classes, speaks=has_head(parts.backbone))


def _name_map(
    parts: ModelParts,
    adapted: adapters.Adapters,
    base: Base,
    options: Options,
    compare: Equal | None,
    *,
    scored: bool,
) -> NameMap:
    """The map of the names. `scored`: the model becomes a sequence classifier."""
    # A scalar reward model without an output head.
    scalar = parts.rewards is not None and not has_head(parts.backbone)
    alone = options.lora.alone
    fit_options = FitOptions(
        chosen=options.selection.prefix is not None,
        fill_from_base=options.fill_from_base or options.exclude_frozen or alone,
        headless=scored or (scalar and not options.fill_from_base),
        allow=options.allow,
        transformers_version=options.transformers_version,
        untied=adapted.separated.apart,
        updated=adapted.keys,
    )
    schema = schema_with_ties(base.schema, base.entries, compare)
    try:
        return fit(parts.backbone, schema, options=fit_options, equal=compare)
    except NamesError as error:
        raise adapters.explained(error, adapted.separated) from None


def _updates(
    adapted: adapters.Adapters,
    name_map: NameMap,
    base: Base,
    options: Options,
    sources: Sources | None,
) -> tuple[Updates, list[Finding]]:
    """What the adapters update and, where they are written, what of the model is left out."""
    if adapted.config is None:
        return Updates(), []
    adapters.check_place(adapted, name_map)
    made = Updates()
    if not options.lora.alone:
        made = updates(
            adapted.separated,
            name_map,
            adapted.config,
            base.entries,
            keys=adapted.keys,
            base_config=base.config,
        )
    written = options.lora.writes_adapter
    if not written or sources is None or options.lora.scaling is not None:
        return made, []
    return made, adapters.check_left_out(adapted, name_map, base, options, sources)


def _comparison(sources: Sources | None) -> Equal | None:
    if sources is None:
        return None
    return lambda one, other: equal(one, other, sources)
