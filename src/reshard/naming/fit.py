"""The fit of a checkpoint's tensors onto a base model's, name for name and shape for shape.

    search -> outputs -> tied tensors -> unwritten names -> heads left behind -> vocabulary

Each step is a function of what the search found, and returns what it adds to the map.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from reshard.core.arrangement import Arrangement
from reshard.core.findings import Finding
from reshard.core.tensors import Entry, Equal
from reshard.errors import NamesError
from reshard.naming import tied_tensors, ties
from reshard.naming.assemble import Assembler
from reshard.naming.judge import FitOptions, Verdict
from reshard.naming.layouts import Piece
from reshard.naming.matching import Matching, Resize
from reshard.naming.mismatch import refuse
from reshard.naming.name_map import NameMap
from reshard.naming.schema import Schema, is_unheld, stating_levels, text_config
from reshard.naming.search import search, sources
from reshard.naming.steps import FitResult, Known, is_chosen
from reshard.naming.ways import Candidate


def fit(
    entries: Mapping[str, Entry],
    schema: Schema,
    *,
    options: FitOptions | None = None,
    equal: Equal | None = None,
) -> NameMap:
    """Find the one map of the checkpoint's tensors onto the base's.

    `equal` is called for a head that may be tied, with two entries of one shape, and only where
    their bytes are not the same bytes already. Without it such pairs are taken to be equal and
    listed in `NameMap.undecided`.

    Raises `NamesError` where there is no map, with what is missing and unexpected, or where there
    are several.
    """
    options = options or FitOptions()
    if options.prefix and not options.prefix.endswith("."):
        options = replace(options, prefix=f"{options.prefix}.")
    found = sources(entries, options.prefix)
    candidate = search(found, schema, options)
    if not candidate.complete:
        raise refuse(candidate, is_chosen(options))
    by_name = {clean: entries[own] for clean, own in found.owners.items()}
    known = Known(candidate, found.owners, by_name, schema.config, options, equal)
    written, copies = tied_tensors.copied(known)
    judged = copies + tied_tensors.judged(known, written)
    steps = (
        FitResult(outputs=_outputs(known), origins=_origins(known))
        + judged
        + _unwritten(known, written, judged.origins)
        + tied_tensors.left_behind(known)
        + _unheld(known)
    )
    resized, patched = _resized(known)
    return _joined(known, steps + patched, resized)


def _joined(known: Known, result: FitResult, resized: tuple[Resize, ...]) -> NameMap:
    candidate = known.candidate
    return NameMap(
        outputs=result.outputs,
        origins=result.origins,
        prefix=candidate.prefix,
        rules=_rules(candidate),
        matching=Matching(
            missing=known.named(Verdict.LEFT_OUT),
            filled=known.named(Verdict.FILLED),
            unexpected=result.unexpected,
            tied=result.tied,
            resized=resized,
        ),
        from_base=result.from_base,
        tied_to=result.tied_to,
        config_patches=result.config_patches,
        undecided=result.undecided,
        findings=result.findings,
    )


def _outputs(known: Known) -> dict[str, Arrangement]:
    """The base's tensors that the source holds."""
    pairs: dict[str, list[tuple[Piece, Piece]]] = {}
    absent: dict[str, str] = {}
    for hub, piece in known.want.items():
        if hub in known.have:
            pairs.setdefault(piece.name, []).append((piece, known.have[hub]))
        else:
            absent[piece.name] = hub
    for name in pairs.keys() & absent.keys():
        raise NamesError(
            f"the checkpoint holds only a part of it: {absent[name]!r} is missing.",
            tensor=name,
            missing=(name,),
        )
    shapes = {clean: entry.spec.shape for clean, entry in known.by_name.items()}
    assembler = Assembler(shapes, known.owners)
    return {name: assembler.arrange(pieces) for name, pieces in pairs.items()}


def _origins(known: Known) -> dict[str, str]:
    """Which tensors are one of the source's, complete and not transposed."""
    origins = {}
    for hub, piece in known.want.items():
        source = known.have.get(hub)
        if source is None or piece.expert is not None or source.expert is not None:
            continue
        if piece.swapped == source.swapped:
            origins[piece.name] = known.owners[source.name]
    return origins


def _unwritten(known: Known, written: Mapping[str, str], heads: Mapping[str, str]) -> FitResult:
    """What is not written: other names of written tensors are ties; the rest is unexpected.

    `heads` are written although the base does not store them.
    """
    candidate = known.candidate
    stores = {
        known.by_name[known.have[hub].name].spec.name: known.here(stored)
        for hub, stored in written.items()
    }
    tied: dict[str, str] = {}
    unexpected = list(candidate.source.allowed)
    for hub in candidate.of(Verdict.DROPPED):
        name = known.have[hub].name
        if known.here(hub) in heads:
            continue
        stored = stores.get(known.by_name[name].spec.name)
        if stored is None:
            unexpected.append(name)
        else:
            tied[known.here(hub)] = stored
    return FitResult(tied=tied, unexpected=tuple(dict.fromkeys(unexpected)))


def _unheld(known: Known) -> FitResult:
    """The finding that layers which no loaded model holds are the base's."""
    count = sum(is_unheld(name, known.config) for name in known.named(Verdict.FILLED))
    message = (
        f"{count} tensors of layers that no loaded model holds (multi-token prediction) "
        "are the base's, untrained."
    )
    return FitResult(findings=(Finding("untrained-layers", message),) if count else ())


def _resized(known: Known) -> tuple[tuple[Resize, ...], FitResult]:
    """Tensors with another number of vocabulary rows, which the config must then state."""
    hubs = (*known.candidate.of(Verdict.RESIZED), *known.candidate.of(Verdict.COPIED))
    resized = []
    for hub in hubs:
        name, base_rows = known.want[hub].name, known.want[hub].shape[0]
        stored = hub if hub in known.have else ties.tied_partner(hub, known.have)
        rows = base_rows if stored is None else known.have[stored].shape[0]
        if rows != base_rows:
            resized.append(Resize(name, base_rows, rows))
    if not resized:
        return (), FitResult()
    _refuse_other_rows(known, resized[0])
    paths = stating_levels(known.config)
    stated = [path for path in paths if "vocab_size" in _at(known.config, path)]
    patches = {f"{path}vocab_size": resized[0].rows for path in stated or paths[-1:]}
    return tuple(resized), FitResult(config_patches=patches)


def _refuse_other_rows(known: Known, resized: Resize) -> None:
    """Raises `NamesError` where the base's head would stand beside a resized embedding."""
    want = known.want
    stale = [
        want[hub].name
        for hub in known.candidate.of(Verdict.FILLED)
        if (ties.is_head(hub) or ties.is_vocabulary(hub, want))
        and want[hub].shape[:1] == (resized.base_rows,)
    ]
    if stale:
        raise NamesError(
            f"{resized.name!r} has {resized.rows} rows, but {resized.base_rows} in the base; the "
            f"checkpoint lacks {stale[0]!r}, which must have the same number of rows, and the "
            "base's has not.",
            missing=tuple(stale),
            hint="Convert a checkpoint of the run that holds it.",
        )


def _rules(candidate: Candidate) -> tuple[str, ...]:
    """What was done to the names, in words, with the number of tensors each rule was used on."""
    rules = [f"{rule} ({count})" for rule, count in candidate.source.rules.items()]
    rules += [f"base: {rule} ({count})" for rule, count in candidate.base.rules.items()]
    return tuple(rules)


def _at(config: Mapping[str, object], level: str) -> Mapping[str, object]:
    return text_config(config) if level else config
