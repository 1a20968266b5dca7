"""Tensors that are one in the base or by its config: what is written for them, under which name.

A head that is tied to its embedding is stored once, twice, or not at all. The checkpoint's values
are compared, and the output's config states the result.
"""

from __future__ import annotations

from collections.abc import Mapping

from reshard.core.arrangement import Whole
from reshard.core.findings import Finding
from reshard.errors import NamesError, UnsupportedError
from reshard.naming import ties
from reshard.naming.beginnings import Beginnings
from reshard.naming.judge import FitOptions, Verdict
from reshard.naming.layouts import Piece
from reshard.naming.lora import methods
from reshard.naming.mismatch import refuse
from reshard.naming.schema import says_tied, says_untied, stating_levels
from reshard.naming.steps import FitResult, Known, is_chosen


def copied(known: Known) -> tuple[dict[str, str], FitResult]:
    """Write what the base stores under a name that the source lacks.

    Returns the tensors that are written by their own hub names, and the partners of the copied
    ones.
    """
    written = {hub: hub for hub in known.want if hub in known.have}
    result = FitResult()
    for hub in known.candidate.of(Verdict.COPIED):
        partner = ties.tied_partner(hub, known.have)
        if partner is None:
            continue
        name, own = known.want[hub].name, known.own(partner)
        result += FitResult(outputs={name: Whole(own)})
        written[partner] = hub
        if ties.is_head(partner):
            message = (
                f"{name!r} is read from {own!r}: the base's config ties them, "
                "and the checkpoint holds one."
            )
            result += FitResult(findings=(Finding("tied-tensor-copied", message, subject=name),))
        result += _parted_by_update(known, hub, partner)
    return written, result


def _parted_by_update(known: Known, hub: str, partner: str) -> FitResult:
    """Untie the head of a pair that the source stores once, if an adapter updates one of them."""
    if known.have[partner].name not in known.options.updated:
        return FitResult()
    if not (ties.is_head(hub) or ties.is_head(partner)):
        raise _one_of_copies(known, partner, hub)
    if ties.is_head(hub):
        return _said_untied(known, known.want[hub].name, "it has no update")
    return (
        _untied(known, partner)
        if ties.is_head(partner) and partner not in known.want
        else FitResult()
    )


def judged(known: Known, written: Mapping[str, str]) -> FitResult:
    """Compare what the base or its config says is one tensor, and the source stores twice.

    Raises `NamesError` where the two differ and neither is an output head: then no file and no
    config can state that they are two.
    """
    candidate, have = known.candidate, known.have
    result = FitResult()
    for hub in candidate.of(Verdict.PARTNER):
        if hub in written:
            continue
        partner = ties.tied_partner(hub, written)
        same, undecided = (
            (False, FitResult()) if partner is None else _compared(known, hub, partner)
        )
        result += undecided
        if partner is not None and same:
            result += FitResult(tied={known.here(hub): known.here(written[partner])})
        elif ties.embedding_of(hub, known.want) is not None:
            # A head whose embedding is the base's was trained separately, else it would serve for
            # both.
            result += _untied(known, hub)
        elif partner is None:
            raise refuse(candidate, is_chosen(known.options))
        else:
            raise NamesError(
                f"it differs from {have[partner].name!r}; the base stores one tensor for both.",
                tensor=have[hub].name,
                unexpected=(have[hub].name,),
            )
    heads = filter(ties.is_head, candidate.of(Verdict.MATCHED))
    for hub in heads if says_tied(known.config) else ():
        embedding = ties.embedding_of(hub, {**known.want, **have})
        if embedding is None or written[hub] == embedding:
            continue
        same, undecided = (
            _compared(known, hub, embedding) if embedding in have else (False, FitResult())
        )
        result += undecided if same else undecided + _untied(known, hub)
    return result


def _compared(known: Known, hub: str, partner: str) -> tuple[bool, FitResult]:
    """Whether two of the source's tensors hold the same values; and a pair that is undecided."""
    one, other = known.by_name[known.have[hub].name], known.by_name[known.have[partner].name]
    updated = known.options.updated
    if updated.get(known.have[hub].name) != updated.get(known.have[partner].name):
        return False, FitResult()
    if one.fragments == other.fragments:
        return True, FitResult()
    if not (one.fragments and other.fragments):
        # They are the base's, which ties them.
        return one.spec.shape == other.spec.shape, FitResult()
    if known.equal is None:
        return True, FitResult(undecided=((one.spec.name, other.spec.name),))
    return known.equal(one, other), FitResult()


def _untied(known: Known, hub: str) -> FitResult:
    """Write the head as a separate tensor, and make the config say so."""
    name, own = known.here(hub), known.own(hub)
    result = FitResult(outputs={name: Whole(own)})
    if hub not in known.want:
        result += FitResult(origins={name: own})
        embedding = ties.embedding_of(hub, known.want)
        if embedding is not None:
            result += FitResult(tied_to={name: known.want[embedding].name})
    return result + _said_untied(known, name, "it is written")


def _said_untied(known: Known, head: str, what: str) -> FitResult:
    """Record that a head differs from what the base ties it to, in the config and as a finding."""
    levels = stating_levels(known.config)
    message = (
        f"{head!r} differs from the embedding that the base ties it to: {what}, and the config "
        "says so."
    )
    return FitResult(
        config_patches={f"{level}tie_word_embeddings": False for level in levels},
        findings=(Finding("head-untied", message, subject=head),),
    )


def left_behind(known: Known) -> FitResult:
    """If the source lacks a head whose embedding was trained separately, the head stays the
    base's; if adapters update the embedding, the head is the embedding before the update.

    Raises `NamesError` where the base is not to be copied, or has another vocabulary, and
    `UnsupportedError` for one of several names of an embedding.
    """
    options, result = known.options, FitResult()
    heads = _unheld(known)
    if options.headless:
        return result
    for hub, embedding in heads.items():
        piece = known.have[embedding]
        apart = piece.name in options.untied
        if embedding not in known.want or hub in known.candidate.of(Verdict.COPIED):
            continue
        name = known.here(hub)
        if piece.name in options.updated and not apart:
            result += FitResult(
                outputs={name: Whole(known.owners[piece.name])},
                tied_to={name: known.want[embedding].name},
            )
            result += _said_untied(known, name, "it has no update")
        elif apart:
            _check_head(options, name, piece, known.want[embedding])
            if hub not in known.want:
                result += FitResult(from_base={name: known.want[embedding].name})
            result += _said_untied(known, name, "it is the base's")
    return result


def _unheld(known: Known) -> dict[str, str]:
    """Head -> embedding, of heads that the loaded model has and the source lacks, tied to an
    embedding that it holds.

    Raises `UnsupportedError` for an embedding that was trained under one of its names, where the
    loaded model has others for it that are no heads: no file can say that they differ.
    """
    have, config = known.have, known.config
    heads = ties.missing_heads(have, config.get("model_type")) if says_tied(config) else {}
    trained = {
        hub
        for hub, piece in have.items()
        if piece.name in known.options.updated or piece.name in known.options.untied
    }
    if not trained & ties.EMBEDDINGS:
        return heads
    names = {*known.want, *have}
    for name, original in ties.missing_parts(names, Beginnings(names)).items():
        if original not in trained:
            continue
        if not ties.is_head(name):
            raise _one_of_copies(known, original, name)
        if not says_untied(config):
            heads[name] = original
    return heads


def _one_of_copies(known: Known, trained: str, other: str) -> UnsupportedError:
    return UnsupportedError(
        f"it was trained by PEFT, and the loaded model holds it as {known.here(other)!r} too, "
        "which was not: the base stores one tensor for both.",
        tensor=known.have[trained].name,
        hint=methods.hint(merges=False),
    )


def _check_head(options: FitOptions, name: str, embedding: Piece, base: Piece) -> None:
    """Check that a head can be the base's. Raises `NamesError`."""
    fits = base.shape == embedding.shape
    if options.fill_from_base and fits:
        return
    raise NamesError(
        f"{embedding.name!r} was trained separately from the head that the base ties it to, and "
        f"the checkpoint does not hold the head, of shape {embedding.shape}.",
        missing=(name,),
        hint="Take it from the base: --fill-from-base."
        if fits
        else f"The base's has shape {base.shape}: save the head too, with the whole model.",
    )
