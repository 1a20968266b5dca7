"""A checkpoint in the names of another library, of AutoEP, or of FSDP1's slices, by the hub's
names."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct
from msgspec.structs import replace

from reshard.conversion.base_model import Base
from reshard.core.arrangement import Arrangement, Whole
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, main_dtype
from reshard.errors import NamesError, UnsupportedError
from reshard.naming import (
    Translation,
    apply,
    autoep,
    flat,
    megatron,
    megatron_args,
    megatron_families,
    meta,
    pipeline,
    titan,
    translation,
)
from reshard.naming.schema import is_unheld
from reshard.naming.search import unwrapped

#: What the reader of Megatron-Core's checkpoints says of itself.
MEGATRON = "megatron-core"


class Renamed(Struct, frozen=True):
    """The checkpoint by the hub's names, and the base with the layers that only the checkpoint has.

    `rules` say in words what was done to the names; `names` does it to another table of them.
    """

    catalog: Catalog
    base: Base
    rules: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    names: Translation | None = None


def by_hub_names(catalog: Catalog, base: Base) -> Renamed:
    """The checkpoint with the names of torchtitan, Meta, Megatron-Core or AutoEP turned into the
    hub's, or the loaded model's, and with the base's shapes where it states none.

    Any other checkpoint goes through as it is. Raises `UnsupportedError` for a family whose names
    are not known, `NamesError` where shapes or settings are not the base's.
    """
    found = flat.shaped(catalog, base.schema)
    catalog = replace(catalog, entries=found.entries, unshaped=frozenset())
    renamed = _renamed(catalog, base)
    return replace(
        renamed,
        rules=(*found.rules, *renamed.rules),
        findings=(*found.findings, *renamed.findings),
    )


def _renamed(catalog: Catalog, base: Base) -> Renamed:
    names = unwrapped(catalog.names())
    if megatron.is_megatron(names, base.schema):
        return _of_megatron(catalog, base)
    shapes = {name: entry.spec.shape for name, entry in catalog.entries.items()}
    if pipeline.is_sequence(shapes, base.schema):
        try:
            found = pipeline.arrangements(shapes, base.schema)
            return _arranged(catalog, base, found.outputs, found.rule)
        except NamesError:
            # Sentence Transformers numbers its modules, too, and they hold no block.
            if "pipeline_stages" in catalog.origin.details:
                raise
    meta.check(catalog.origin.details.get("params"), base.config)
    known = titan.translated(catalog.entries, base.schema)
    if known.rules:
        of_titan = replace(catalog, entries=known.entries)
        more, said = _with_beyond(base, known.entries)
        return Renamed(of_titan, more, known.rules, said, known.names)
    # After torchtitan's names: its experts, and its stacks of 2025, are called as AutoEP's are.
    theirs = titan.is_titan(names, base.schema)
    blocks = frozenset[str]() if theirs else autoep.blocks(shapes, base.schema)
    if blocks:
        outputs = autoep.arrangements(shapes, blocks, base.schema)
        rule = f"experts that AutoEP split -> the loaded model's ({len(blocks)} layers)"
        return _arranged(catalog, base, outputs, rule)
    return Renamed(catalog, base)


def _arranged(
    catalog: Catalog, base: Base, outputs: Mapping[str, Arrangement], rule: str
) -> Renamed:
    """The checkpoint's tensors as these arrangements make them."""
    made = replace(catalog, entries=_kept(outputs, catalog.entries))
    return Renamed(made, base, (rule,), names=translation(outputs))


def _kept(outputs: Mapping[str, Arrangement], entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """What the arrangements make; tensors that are others' whole keep their other names."""
    made = apply(outputs, entries)
    for name, arrangement in outputs.items():
        if isinstance(arrangement, Whole) and arrangement.name == name:
            made[name] = entries[name]
    return made


def _of_megatron(catalog: Catalog, base: Base) -> Renamed:
    if catalog.origin.framework != MEGATRON:
        raise UnsupportedError(
            "its tensors have the names of Megatron-Core, but it is not a torch_dist checkpoint: "
            "reshard does not read checkpoints of Megatron-FSDP (fsdp_dtensor) or of a single "
            "rank.",
            path=catalog.origin.root,
            hint="Save with --ckpt-format torch_dist, and convert that.",
        )
    schema = base.schema
    named = megatron.arrangements({n: e.spec.shape for n, e in catalog.entries.items()}, schema)
    embedding = base.entries.get(megatron.EMBEDDING)
    rows = None if embedding is None else embedding.spec.shape[0]
    megatron_args.check(
        catalog.origin.details.get("settings", {}),
        base.config,
        rows=rows,
        less_one=megatron_families.family_of(base.config).less_one,
    )
    entries = apply(named.outputs, catalog.entries)
    padded = [_padding(name, rows, catalog) for name, rows in named.padding.items()]
    more, said = _with_beyond(base, entries)
    return Renamed(
        replace(catalog, entries=entries),
        more,
        (f"Megatron-Core's names -> the hub's ({len(catalog.entries)} -> {len(entries)})",),
        (*padded, *said),
        translation(named.outputs),
    )


def _padding(name: str, rows: int, catalog: Catalog) -> Finding:
    total = catalog.entries[name].spec.shape[0]
    message = (
        f"of the {total} rows of {name!r} the base's {total - rows} are written: the others are "
        f"assumed to be padding, which Megatron adds."
    )
    return Finding("vocabulary-padded", message, subject=name)


def _with_beyond(base: Base, entries: Mapping[str, Entry]) -> tuple[Base, tuple[Finding, ...]]:
    """The base with the layers for multi-token prediction that only the checkpoint has."""
    beyond = [n for n in entries if n not in base.entries and is_unheld(n, base.config)]
    if not beyond:
        return base, ()
    message = (
        f"{len(beyond)} tensors of layers for multi-token prediction are written, of which "
        "the base's files hold none: transformers does not load them."
    )
    made = _with_layers(base, {name: entries[name] for name in beyond})
    return made, (Finding("layers-beyond-base", message),)


def _with_layers(base: Base, beyond: dict[str, Entry]) -> Base:
    """The base with more layers, in the dtypes that its last own layer has."""
    last = f"model.layers.{base.config['num_hidden_layers'] - 1}."
    entries = dict(base.entries)
    main = main_dtype(entry.spec for entry in entries.values())
    for name, entry in beyond.items():
        of_base = base.entries.get(last + name.split(".", 3)[3])
        dtype = main if of_base is None else of_base.spec.dtype
        entries[name] = Entry(replace(entry.spec, dtype=dtype or entry.spec.dtype), (), entry.kind)
    return replace(base, entries=entries)
