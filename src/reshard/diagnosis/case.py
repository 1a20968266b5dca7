"""The input of the checks: a folder, the base, the fit of one onto the other, facts about values.

Everything is read here, once; the checks are pure functions of a `Case`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from reshard.conversion.base_model import Base
from reshard.core.catalog import Catalog
from reshard.core.collecting import paused_gc
from reshard.core.tensors import Entry, Shape
from reshard.diagnosis import folder as folders
from reshard.diagnosis import quantisation
from reshard.diagnosis.checks.companions import Companions, read_companions
from reshard.diagnosis.folder import Folder
from reshard.diagnosis.quantisation import Quantisation
from reshard.errors import NamesError, PlanError, ReshardError
from reshard.formats import Selection, deepspeed
from reshard.naming import FitOptions, NameMap, apply, fit, partners, schema
from reshard.naming.families import PREFIXES
from reshard.naming.search import unwrap, unwrapped
from reshard.naming.structure import Structure, examine
from reshard.naming.ties import HEADS
from reshard.naming.value_heads import SCORE
from reshard.progress import StagedProgress, stage
from reshard.storage.local import Sources
from reshard.transfer import passes
from reshard.transfer.finite import NotFinite
from reshard.transfer.reading import equal


class Fitted(Struct, frozen=True):
    """The folder's tensors as the base has them, and why they are not all of the base's.

    `misfit` is None where the fit is complete. A fit may stand beside it: that of all tensors but
    a head that is missing.
    """

    fit: NameMap | None = None
    misfit: NamesError | PlanError | None = None
    entries: Mapping[str, Entry] = field(default_factory=dict)


class Vocabulary(Struct, frozen=True):
    """Input embedding and output head, by the folder's own names; None where one is not there.

    `equal`: both are there and hold the same values. `tied_in_base`: the base's are one tensor, by
    its config or, where that is silent, by its values.
    """

    embedding: str | None = None
    head: str | None = None
    equal: bool = False
    tied_in_base: bool = False


class Values(Struct, frozen=True):
    """What the weights hold. `changed` of `compared` tensors differ from the base's.

    `conflicts` are tensors that several files hold with different values.
    """

    not_finite: Mapping[str, NotFinite] = field(default_factory=dict)
    compared: int = 0
    changed: int = 0
    conflicts: tuple[str, ...] = ()


class Rescue(Struct, frozen=True):
    """A training checkpoint that lies in the folder, and its tensors by the base's names."""

    catalog: Catalog
    name_map: NameMap
    entries: Mapping[str, Entry]


class Case(Struct, frozen=True):
    """A folder and everything that is known about it.

    placeholders: tensors without their elements. prefix: what precedes all names. clean: name
    without wrappers' parts and prefix -> the folder's own name, aliases included. rescue: None, or
    why there is none, or a checkpoint that has the weights. quantisation: what the weights are made
    of; the folder's tensors are numbers where possible.
    structure: what is unlike the architecture; None where not all was read.
    """

    folder: Folder
    base: Base | None
    placeholders: tuple[str, ...]
    fitted: Fitted
    prefix: str
    clean: Mapping[str, str]
    vocabulary: Vocabulary
    companions: Companions
    values: Values
    rescue: Rescue | str | None = None
    quantisation: Quantisation = Quantisation()
    structure: Structure | None = None

    @property
    def alone(self) -> bool:
        """Whether there is no base to compare with."""
        return self.base is None

    def shown_dtype(self, name: str) -> str:
        """The dtype of a tensor by one of the folder's own names."""
        return self.entry(name).spec.dtype.name

    @property
    def fits(self) -> bool:
        """Whether the tensors at hand are all of the base's, under whatever names."""
        whole = self.fitted.fit is not None and self.fitted.misfit is None
        return whole or isinstance(self.rescue, Rescue)

    @property
    def levels(self) -> Mapping[str, Mapping[str, Any]]:
        """The configs that describe the language model, by dotted path: `""`, `"text_config."`."""
        settings = self.folder.settings
        return dict(zip(schema.stating_levels(settings), schema.levels(settings), strict=True))

    def clean_name(self, own: str) -> str:
        """A tensor's name without wrappers' parts and prefix."""
        return unwrap(own).removeprefix(self.prefix)

    def shape(self, name: str) -> Shape:
        """The shape of a tensor by one of the folder's own names."""
        return self.entry(name).spec.shape

    def entry(self, name: str) -> Entry:
        """A tensor by one of the folder's own names, aliases included."""
        found = self.folder.entries.get(name)
        if found is not None:
            return found
        return next(entry for entry in self.folder.entries.values() if name in entry.aliases)


def read(
    path: Path,
    base: Base | None,
    sources: Sources,
    *,
    threads: int,
    weights: bool = True,
    progress: StagedProgress | None = None,
) -> Case:
    """Read all that the checks need.

    Without `weights` only what decides ties and repeated tensors is read of the values.
    Raises `NotFoundError` where there is no model to look at.
    """
    with paused_gc():
        folder, quantised = quantisation.examine(folders.read(path, sources), sources)
        placeholders = _placeholders(folder, base)
        left_out = frozenset(placeholders)
        whole = {name: entry for name, entry in folder.entries.items() if name not in left_out}
        # Codes that are not read have no known numbers: there is nothing to fit.
        fitted = _fitted(folder, whole, None if quantised.unread else base, sources)
    names = [name for entry in folder.entries.values() for name in entry.names]
    plain = unwrapped(names)
    prefix = fitted.fit.prefix if fitted.fit is not None else guess_prefix(plain)
    clean = {one.removeprefix(prefix): name for one, name in zip(plain, names, strict=True)}
    return Case(
        folder=folder,
        base=base,
        placeholders=placeholders,
        fitted=fitted,
        prefix=prefix,
        clean=clean,
        vocabulary=_vocabulary(folder, clean, base, sources),
        companions=read_companions(folder, base, sources),
        values=_values(folder, base, fitted.entries, sources, weights, threads, progress),
        rescue=_rescue(path, base, sources) if placeholders else None,
        quantisation=quantised,
        structure=_structure(folder, clean) if _tells(folder, placeholders, quantised) else None,
    )


def _tells(folder: Folder, placeholders: Sequence[str], quantised: Quantisation) -> bool:
    """Whether the known names are all that the folder is to hold."""
    whole = not (folder.damaged or folder.index_fault or placeholders)
    lost = (folder.listed or {}).keys() - folder.entries.keys()
    # An index may name what lies elsewhere; then the scales beside codes are its own.
    read = quantised.unread is None and not quantised.fault
    return whole and read and not (lost and quantised.stated is None)


def _structure(folder: Folder, clean: Mapping[str, str]) -> Structure:
    shapes = {name: entry.spec.shape for entry in folder.entries.values() for name in entry.names}
    return examine({name: shapes[own] for name, own in clean.items()}, folder.settings)


def _placeholders(folder: Folder, base: Base | None) -> tuple[str, ...]:
    """Tensors of shape [0], and weights of shape [1], unless the base has them so.

    `torch.empty(0)` is what ZeRO-3 leaves in a parameter's place (DeepSpeed 0.19.8,
    runtime/zero/partition_parameters.py); `torch.empty(1)` is what older versions left.
    """
    known: Mapping[str, Entry] = {} if base is None else base.entries
    found = []
    for name, entry in folder.entries.items():
        empty = entry.spec.shape == (0,)
        single = entry.spec.shape == (1,) and name.endswith(".weight")
        as_in_base = name in known and known[name].spec.shape == entry.spec.shape
        # Quantised models hold empty integer tensors on purpose (GPTQ's g_idx).
        if (empty or single) and entry.spec.dtype.floating and not as_in_base:
            found.append(name)
    return tuple(found)


def _fitted(
    folder: Folder, entries: Mapping[str, Entry], base: Base | None, sources: Sources
) -> Fitted:
    if base is None:
        return Fitted()

    def same(one: Entry, other: Entry) -> bool:
        return equal(one, other, sources)

    score: dict[str, Entry] = {}
    if folder.classifies and f"{SCORE}.weight" not in base.entries:
        # The base is the language model that the classifier was trained from.
        own = {n: unwrap(n) for n in entries if unwrap(n) in (f"{SCORE}.weight", f"{SCORE}.bias")}
        score = {clean: entries[name].renamed(clean) for name, clean in own.items()}
        entries = {name: entry for name, entry in entries.items() if name not in own}
    try:
        # transformers 4 leaves an embedding that is stored as the head alone without weights.
        options = FitOptions(headless=folder.headless, untied=_heads(entries))
        found = fit(entries, base.schema, options=options, equal=same)
        return Fitted(found, None, {**apply(found.outputs, entries), **score})
    except (NamesError, PlanError) as error:
        misfit = error.with_traceback(None)  # whose frames hold all tables of the fit
    try:
        found = fit(entries, base.schema, options=FitOptions(headless=True), equal=same)
        return Fitted(found, misfit, apply(found.outputs, entries))
    except (NamesError, PlanError):
        return Fitted(None, misfit)


def _heads(names: Iterable[str]) -> frozenset[str]:
    """The names of output heads, wrappers' parts left out."""
    heads = tuple(head for head, _ in HEADS)
    return frozenset(clean for clean in map(unwrap, names) if clean.endswith(heads))


def guess_prefix(names: Iterable[str]) -> str:
    """The prefix that a trainer put before all names, from the names alone; `""` where uncertain.

    Many intact models have `model.` before their names: it is superfluous only where the next part
    belongs to the top of a model.

    >>> guess_prefix(["model.model.norm.weight", "model.lm_head.weight"])
    'model.'
    """
    listed = list(names)
    if not listed:
        return ""
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        if not all(name.startswith(prefix) for name in listed):
            continue
        if prefix != "model." or any(
            name.startswith(("model.model.", "model.lm_head.")) for name in listed
        ):
            return prefix
    return ""


def _vocabulary(
    folder: Folder, clean: Mapping[str, str], base: Base | None, sources: Sources
) -> Vocabulary:
    """Input embedding and output head, by the folder's own names."""
    matrices = {
        own: entry
        for entry in folder.entries.values()
        for own in entry.names
        if len(entry.spec.shape) == 2
    }
    found = partners.vocabulary({name for name, own in clean.items() if own in matrices})
    embedding = None if found.embedding is None else clean[found.embedding]
    head = None if found.head is None else clean[found.head]
    if embedding is None or head is None:
        return Vocabulary(embedding)
    same = equal(matrices[head], matrices[embedding], sources)
    return Vocabulary(embedding, head, same, base is not None and _ties(base, sources))


def _ties(base: Base, sources: Sources) -> bool:
    """Whether head and embedding of the base are one tensor, as a conversion decides it."""
    by_value = partners.schema_with_ties(
        base.schema, base.entries, lambda one, other: equal(one, other, sources)
    )
    return schema.says_tied(by_value.config)


def _values(
    folder: Folder,
    base: Base | None,
    fitted: Mapping[str, Entry],
    sources: Sources,
    weights: bool,
    threads: int,
    progress: StagedProgress | None,
) -> Values:
    conflicts = tuple(
        name
        for name, copies in folder.repeated.items()
        if not all(equal(copies[0], other, sources) for other in copies[1:])
    )
    if not weights:
        return Values(conflicts=conflicts)

    spoilt = passes.not_finite(
        folder.entries, sources, threads=threads, progress=stage(progress, "examining")
    )
    pairs = [] if base is None else pairs_with(base, fitted)
    unchanged = passes.same(pairs, sources, threads=threads, progress=stage(progress, "comparing"))
    return Values(spoilt, len(pairs), unchanged.count(False), conflicts)


def pairs_with(base: Base, entries: Mapping[str, Entry]) -> list[tuple[Entry, Entry]]:
    """The tensors with elements that the base has in the same shape, with the base's."""
    return [
        (entry, base.entries[name])
        for name, entry in entries.items()
        if name in base.entries
        and entry.spec.numel
        and entry.spec.shape == base.entries[name].spec.shape
    ]


def _rescue(path: Path, base: Base | None, sources: Sources) -> Rescue | str | None:
    """The DeepSpeed checkpoint beside the placeholders, as HF's Trainer saves one.

    None where there is none; a text where there is one that cannot be used.
    """
    if deepspeed.detect(path) is None:
        return None
    if base is None:
        return "a DeepSpeed checkpoint lies beside it; name the base with --base"
    try:
        catalog = deepspeed.read(path, sources, Selection())
        found = fit(
            catalog.entries, base.schema, equal=lambda one, other: equal(one, other, sources)
        )
    except ReshardError as error:
        return f"the DeepSpeed checkpoint beside it cannot be used: {error}"
    return Rescue(catalog, found, apply(found.outputs, catalog.entries))
