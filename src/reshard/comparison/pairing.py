"""Which tensor of a checkpoint belongs to which of a converted folder.

With the base of the conversion, its plan is made again. Without it a Hugging Face folder serves as
the base, whose names and config it has. Otherwise names must be the same.

What a folder's `reshard.json` states of how it was made (which head, how adapters were scaled, what
was left out) is taken from there; neither its plan nor its digests are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from glob import escape
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from reshard import formats
from reshard.comparison.result import Compared, Difference, described
from reshard.comparison.values import Pair
from reshard.conversion import manifest, output_model
from reshard.conversion.base_model import Base, holds_config, own_base, read_base
from reshard.conversion.dtypes import OutputTensor
from reshard.conversion.manifest import Manifest
from reshard.conversion.options import Options, RewardChoice, SrmFormat, restated, unwritten
from reshard.conversion.output_model import OutputModel
from reshard.conversion.planning import plan_output
from reshard.conversion.side_files import LIGHTRFT
from reshard.conversion.trainer_names import trainer
from reshard.conversion.verification import check_listed, check_run, child_of
from reshard.core.catalog import Catalog
from reshard.core.fragments import regions
from reshard.core.locations import MANIFEST
from reshard.core.tensors import Entry, Shape
from reshard.errors import FormatError, NamesError, OptionError, PlanError
from reshard.formats.info import named
from reshard.naming import FitOptions
from reshard.naming.families import CONSTANTS
from reshard.naming.matching import Matching, parsed
from reshard.naming.patterns import matches_any
from reshard.naming.rewards import REWARD_CONFIG, REWARD_HEAD
from reshard.naming.search import unwrap
from reshard.naming.value_heads import SCORE, VALUE_HEAD
from reshard.storage.local import Sources
from reshard.storage.paths import absolute, is_file, is_folder

#: The files of a side: those beside the model by name, the model itself under the empty name.
Tables = dict[str, dict[str, Entry]]


class Pairing(Struct, frozen=True):
    """What is to be compared, and what cannot be.

    left: tensors of the first side without a place on the second. omitted: those of them that the
    conversion recorded as left out. filled: tensors of the second side that it took from its base.
    by_name: nothing but equal names paired the tensors. options: those of the conversion that made
    the second of the first, as its `reshard.json` states them; None where it has none. planned: the
    base that was given, and the plan that was made again onto it.
    """

    pairs: list[Pair]
    left: tuple[Compared, ...] = ()
    omitted: tuple[Compared, ...] = ()
    filled: tuple[Compared, ...] = ()
    by_name: bool = False
    options: Options | None = None
    planned: tuple[Base, OutputModel] | None = None

    def turned(self) -> Pairing:
        """The same with first and second exchanged."""
        apart = (self.left, self.omitted, self.filled)
        left, omitted, filled = (tuple(map(_turned, found)) for found in apart)
        pairs = [Pair(found.name, found.second, found.first) for found in self.pairs]
        return Pairing(pairs, left, omitted, filled, self.by_name)


def _turned(compared: Compared) -> Compared:
    kind: dict[Difference, Difference] = {
        "only in the first": "only in the second",
        "only in the second": "only in the first",
    }
    return replace(
        compared,
        kind=kind.get(compared.kind, compared.kind),
        first=compared.second,
        second=compared.first,
    )


def tells_names(catalog: Catalog) -> bool:
    """Whether names can be fitted onto a checkpoint's: a model with its config, or an output of
    reshard, which records what happened to them."""
    return is_file(catalog.origin.root / MANIFEST) or holds_config(catalog)


def pair(
    first: Catalog,
    second: Catalog,
    sources: Sources,
    *,
    base: Path | None = None,
    stated: Manifest | None = None,
) -> Pairing:
    """Pair the tensors of two checkpoints, of which the second may be the first, converted.

    `stated` is what the second's `reshard.json` states, where it was read before.

    Raises `NamesError` where names of the first have no place or several, `PlanError` where only
    a base could tell.
    """
    folder = second.origin.root
    stated = stated or stated_of(folder, sources)
    tables = _tables(second, stated, sources)
    options, recorded = _recorded(first, folder, stated, tables)
    pairing: Pairing | None = None
    if base is not None:
        model = read_base(base, sources)
        output = plan_output(first, model, options, sources)
        pairs = _pairs(_planned(output), tables)
        pairing = Pairing(pairs, *_left(first, output, options), planned=(model, output))
    elif _stands_in(first, second, tables):
        try:
            model = own_base(second, sources)
            pairing = _onto_itself(first, model, options, recorded, tables, sources)
        except NamesError:
            if not set(first.names()) >= set(second.entries):
                raise
    if pairing is None:
        pairing = _by_name(first, options, recorded, tables, sources)
    return pairing if stated is None else replace(pairing, options=options)


def onto_one(first: Catalog, second: Catalog, sources: Sources, *, base: Path) -> Pairing:
    """Pair the tensors of two checkpoints by the names that both have, fitted onto a base.

    Raises `NamesError` where names of one have no place or several.
    """
    model = read_base(base, sources)
    sides = []
    for catalog in (first, second):
        root = catalog.origin.root
        options = unwritten(root, root)
        output = plan_output(catalog, model, options, sources)
        sides.append((_planned(output), Pairing([], *_left(catalog, output, options))))
    (mine, left), (theirs, right) = sides
    right = right.turned()
    return Pairing(_pairs(mine, theirs), (*left.left, *right.left), (*left.omitted, *right.omitted))


def stated_of(folder: Path, sources: Sources) -> Manifest | None:
    """What the `reshard.json` of a folder, or of the output that the folder is a part of, states;
    None where there is none.

    Raises `VerificationError` where the output does not hold what its `reshard.json` lists.
    """
    if not is_file(folder / MANIFEST):
        return _stated_above(folder, sources)
    stated = manifest.read(folder, sources)
    check_listed(folder, stated)
    check_run(folder, stated)
    return stated


def _stated_above(folder: Path, sources: Sources) -> Manifest | None:
    """What the folder above states, where this one is a part of that output."""
    if not is_file(folder.parent / MANIFEST):
        return None
    stated = manifest.read(folder.parent, sources)
    check_run(folder.parent, stated)
    inside = any(name.startswith(f"{folder.name}/") for name in stated.files)
    return stated if inside else None


def _tables(catalog: Catalog, stated: Manifest | None, sources: Sources) -> Tables:
    """A side's tensors, with those of the files beside its model."""
    folder = catalog.origin.root
    beside: list[str] = []
    if stated is not None:
        beside = list(stated.beside)
    elif named(catalog.format).takes_files and is_folder(folder):
        # A `pytorch_model.bin` without this config is the model over again.
        scored = is_file(folder / REWARD_CONFIG)
        known = (REWARD_HEAD, VALUE_HEAD, LIGHTRFT) if scored else (REWARD_HEAD, VALUE_HEAD)
        beside = [name for name in known if is_file(folder / name)]
    tables: Tables = {}
    if stated is None or stated.tensors:
        tables[""] = dict(catalog.entries)
    for name in beside:
        found = formats.read(child_of(folder, name), sources, formats.Selection()).entries
        tables[name] = {called: e for e in found.values() for called in e.names}
    return tables


def _recorded(
    first: Catalog, folder: Path, stated: Manifest | None, tables: Tables
) -> tuple[Options, Matching]:
    """The conversion's options, as far as they decide what goes where, and its record of names.

    Dtypes are the second side's.
    """
    options = replace(unwritten(first.origin.root, folder), names=None)
    if stated is None:
        srm_format: SrmFormat = "both" if LIGHTRFT in tables else "split"
        return replace(options, rewards=RewardChoice(srm_format=srm_format)), Matching()
    names = stated.names
    try:
        options = restated(options, stated.options, names)
        recorded = parsed(names)
    except (OptionError, TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise FormatError("it is damaged.", path=folder / MANIFEST) from None
    return replace(options, allow=(*options.allow, *map(escape, recorded.unexpected))), recorded


def _stands_in(first: Catalog, second: Catalog, tables: Tables) -> bool:
    """Whether the second side's names and config decide what goes where."""
    if not holds_config(second) or "" not in tables:
        return False
    counts = [sum(len(entry.names) for entry in each.entries.values()) for each in (first, second)]
    same = not first.unshaped and counts[0] == counts[1] and _shapes(first) == _shapes(second)
    return not same or (len(tables) > 1 and not named(first.format).holds_config)


def _shapes(catalog: Catalog) -> dict[str, Shape]:
    """The shape of each tensor, by all of its names."""
    return {name: e.spec.shape for e in catalog.entries.values() for name in e.names}


def _onto_itself(
    first: Catalog,
    base: Base,
    options: Options,
    recorded: Matching,
    tables: Tables,
    sources: Sources,
) -> Pairing:
    """The pairing where the second side serves as the base."""
    if options.exclude_frozen and not options.fill_from_base:
        # They are in no file of the folder, so have no place there.
        options = replace(options, allow=(*options.allow, *_frozen(first)))
    options = replace(options, fill_from_base=True, names="disk")
    head = options.rewards.heads.value_head
    if head is not None and f"{SCORE}.weight" in tables[""]:
        first = _called(first, f"{head}.weight", f"{SCORE}.weight")
        heads = replace(options.rewards.heads, value_head=None)
        options = replace(options, rewards=replace(options.rewards, heads=heads))
    output = output_model.onto(first, base, options, sources)
    planned = _planned(output)
    for name in output.matching.filled:
        planned[""].pop(name)
    _check_apart(planned, base.folder)
    model, filled = dict(tables[""]), []
    for name in sorted({*recorded.filled}.intersection(output.matching.filled)):
        entry = model.pop(name)
        filled.append(Compared(name, "only in the second", "", described(entry.spec)))
    pairs = _pairs(planned, {**tables, "": model})
    return Pairing(pairs, *_left(first, output, options), tuple(filled))


def _frozen(catalog: Catalog) -> list[str]:
    """The names of the frozen parameters, as patterns."""
    entries = [entry for entry in catalog.entries.values() if entry.kind == "frozen"]
    return [escape(unwrap(name)) for entry in entries for name in entry.names]


def _by_name(
    first: Catalog, options: Options, recorded: Matching, tables: Tables, sources: Sources
) -> Pairing:
    """The pairing by equal names, wrappers' parts aside. A tied name that the conversion did not
    store is compared with the tensor that it is recorded to be."""
    mine = _tables(first, stated_of(first.origin.root, sources), sources)
    if (options.names == "memory" or trainer(options)) and named(first.format).holds_config:
        placed = plan_output(first, None, options, sources)
        return Pairing(_pairs(_planned(placed), tables), by_name=True)
    if "" not in tables and len(tables) == 1:
        tables = {"": next(iter(tables.values()))}
    kept = tables.get("", {})
    there = {name: e for e in kept.values() for name in e.names}
    there = {name: there[tie] for name, tie in recorded.tied.items() if tie in there} | there
    model: dict[str, Entry] = {}
    theirs: dict[str, Entry] = {}
    for entry in mine.get("", {}).values():
        if options.exclude_frozen and entry.kind == "frozen":
            continue
        known = [n for name in entry.names for n in (name, unwrap(name)) if n in there]
        # Two tensors of one side may correspond to one of the other, by its two names.
        for name in {there[name].spec.name: name for name in reversed(known)}.values():
            model[name], theirs[name] = entry, there[name]
        if not known:
            model[entry.spec.name] = entry
    met = {entry.spec.name for entry in theirs.values()}
    theirs |= {name: entry for name, entry in kept.items() if name not in met}
    return Pairing(_pairs({**mine, "": model}, {**tables, "": theirs}), by_name=True)


def _called(catalog: Catalog, old: str, new: str) -> Catalog:
    """The catalog with one tensor under another name."""
    entries = [
        entry.renamed(new) if unwrap(name) == old else entry
        for name, entry in catalog.entries.items()
    ]
    return replace(catalog, entries={entry.spec.name: entry for entry in entries})


def _check_apart(planned: Mapping[str, Mapping[str, Entry]], folder: Path) -> None:
    """Refuse to compare a folder with itself where adapters would be merged into the base's
    weights."""
    for tensors in planned.values():
        for name, made in tensors.items():
            if any(
                Path(extent.file.path).is_relative_to(absolute(folder))
                for extent in regions([made])
            ):
                raise PlanError(
                    "the checkpoint holds only its update, not the weight that the update was "
                    "merged into.",
                    path=folder,
                    tensor=name,
                    hint="Pass --base, the base of the conversion.",
                )


def _planned(output: OutputModel) -> dict[str, dict[str, Entry]]:
    """What a conversion writes, by file."""
    tables = {"": _sources_of(output.model)} if output.model else {}
    return tables | {file.name: _sources_of(file.tensors) for file in output.side_files}


def _sources_of(tensors: Iterable[OutputTensor]) -> dict[str, Entry]:
    return {t.spec.name: t.source for t in tensors}


def _pairs(
    first: Mapping[str, Mapping[str, Entry]], second: Mapping[str, Mapping[str, Entry]]
) -> list[Pair]:
    """Both sides' files by name; a file of one side alone is a pair with nothing."""
    names = dict.fromkeys((*first, *second))
    return [Pair(name, first.get(name, {}), second.get(name, {})) for name in names]


def _left(
    first: Catalog, output: OutputModel, options: Options
) -> tuple[tuple[Compared, ...], tuple[Compared, ...]]:
    """The checkpoint's tensors that the conversion leaves out; second, those that an option
    named."""
    allowed = FitOptions(allow=options.allow)
    shown = {unwrap(n): described(e.spec) for n, e in first.entries.items()}
    # What a module computes from its config is in no file of a released model.
    dropped = [
        Compared(name, "only in the first", shown.get(name, ""), "")
        for name in output.matching.unexpected
        if not matches_any(CONSTANTS, name)
    ]
    recorded = {found.name for found in dropped if allowed.allows(found.name)}
    return (
        tuple(found for found in dropped if found.name not in recorded),
        tuple(found for found in dropped if found.name in recorded),
    )
