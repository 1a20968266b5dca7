"""Checks of quantised weights: whether codes, scales and the config go together."""

from __future__ import annotations

from reshard.diagnosis.case import Case
from reshard.diagnosis.signs import Repair, Signs, some

_CONVERT = "Convert the quantised release again: reshard convert FP8MODEL OUT."


def scales_left_over(case: Case) -> Signs | None:
    """Scales of codes beside weights that are not codes."""
    found = case.quantisation
    if not found.stale:
        return None
    pairs = (f"{name} is {case.shown_dtype(name)}, beside it {scale}" for name, scale in
             found.stale.items())  # fmt: skip
    evidence = [f"{len(found.stale)} weights are not codes and have scales: {some(pairs)}"]
    if found.cast:
        evidence.append(
            f"{len(found.cast)} of them hold the codes themselves, cast: they are as many times "
            "too large as their scales are small"
        )
        return Signs(tuple(evidence), advice=_CONVERT)
    words = "the scales are left out, and the config does not mention them"
    return Signs(tuple(evidence), Repair(words) if case.alone or case.fits else None)


def codes_unreadable(case: Case) -> Signs | None:
    """Codes without their scales, or with scales that do not go with them."""
    fault = case.quantisation.fault
    return Signs((fault,), advice="Copy the model again.") if fault else None


def contradicts_config(case: Case) -> Signs | None:
    """A config that contradicts the weights."""
    quantised = case.quantisation
    if quantised.fault:
        return None
    if quantised.stated is None and quantised.kinds:
        evidence = (
            f"{len(quantised.kinds)} weights are codes, and config.json does not say so: some "
        )
        names = some(f"{name} ({kind})" for name, kind in quantised.kinds.items())
        repair = Repair("the weights are written as numbers") if case.alone or case.fits else None
        return Signs((f"{evidence}are {names}", "loaders mistake the codes for weights"), repair)
    if quantised.stated is None and quantised.unread is not None:
        evidence = (
            f"the weights are quantised by {quantised.unread.title}, config.json does not say so"
        )
        return Signs((evidence,), advice="Copy the config of the model that it was made from.")
    if quantised.stated is not None and not quantised.kinds and quantised.unread is None:
        evidence = (
            f"config.json has {', '.join(quantised.stated.paths)} ({quantised.stated.title}), and "
        )
        words = f"{', '.join(quantised.stated.paths)} is left out"
        repair = Repair(words) if not quantised.cast and (case.alone or case.fits) else None
        return Signs((f"{evidence}no weight is a code",), repair)
    return None


def unread(case: Case) -> Signs | None:
    """Codes of a kind that is not read: their numbers were not checked."""
    kind = case.quantisation.unread
    if kind is None:
        return None
    evidence = f"{len(kind.modules)} modules are quantised by {kind.title}: {some(kind.modules)}"
    return Signs(
        (evidence, "their names, shapes and values were not compared"),
        advice="To compare them, examine the unquantised model.",
    )
