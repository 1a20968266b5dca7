"""Checks of names and shapes against the architecture that the config names, without a base."""

from __future__ import annotations

from collections.abc import Iterable

from reshard.diagnosis.case import Case
from reshard.diagnosis.signs import CONVERT_AGAIN, Repair, Signs, some
from reshard.naming import fields
from reshard.naming.structure import Structure

_UNNOTICED = "vLLM silently leaves them at random values, mlx-lm refuses"


def _structure(case: Case) -> Structure | None:
    """What is unlike the architecture; None where a base tells more."""
    return case.structure if case.base is None else None


def tensors_missing(case: Case) -> Signs | None:
    """Tensors that every model of this architecture has, or that the other layers have."""
    found = _structure(case)
    if found is None or not found.absent:
        return None
    evidence = f"{len(found.absent)} tensors are missing: {some(found.absent)}"
    return Signs((evidence, _UNNOTICED), advice=CONVERT_AGAIN)


def part_missing(case: Case) -> Signs | None:
    """A whole part of the model, as a vision tower."""
    found = _structure(case)
    if found is None or not found.parts:
        return None
    parts = (f"no name begins with {part!r}" for part in found.parts)
    advice = (
        "If it was frozen and not saved: reshard convert RUN OUT --base HF_DIR --fill-from-base."
    )
    return Signs(tuple(parts), advice=advice)


def layer_count(case: Case) -> Signs | None:
    """Another number of layers than the config says."""
    found = _structure(case)
    if found is None or not found.layers:
        return None
    evidence = tuple(
        f"{each.have} layers begin with {each.prefix!r}, "
        + (f"{each.key} is {each.stated}" if each.key else f"numbered up to {each.stated - 1}")
        for each in found.layers
    )
    return Signs(evidence, advice=CONVERT_AGAIN)


def names_unknown(case: Case) -> Signs | None:
    """Names that no class of the architecture has."""
    found = _structure(case)
    if found is None or not found.strange:
        return None
    return _strange(case, found.strange, "tensors have no place in")


def stray_head(case: Case) -> Signs | None:
    """A head that the class in the config does not have."""
    found = _structure(case)
    if found is None or not found.heads:
        return None
    return _strange(case, found.heads, "tensors belong to a head that is not in")


def _strange(case: Case, names: Iterable[str], what: str) -> Signs:
    listed = tuple(names)
    stated = case.folder.settings["architectures"][0]
    evidence = (
        f"{len(listed)} {what} {stated}: {some(listed)}",
        "transformers ignores them; vLLM, llama.cpp and mlx-lm refuse weights and drop biases",
    )
    return Signs(evidence, advice=CONVERT_AGAIN)


def shapes_differ(case: Case) -> Signs | None:
    """Shapes that are not what the config's sizes make."""
    found = _structure(case)
    if found is None or not found.other:
        return None
    shapes = (
        f"{name} is ({', '.join(map(str, have))}), not {want}"
        for name, (have, want) in found.other.items()
    )
    evidence = (f"{len(found.other)} tensors: {some(shapes)}",)
    return Signs(evidence, advice="config.json may be another model's. " + CONVERT_AGAIN)


def backbone_names(case: Case) -> Signs | None:
    """Names as saved from the backbone, though the config names a class with a head."""
    found = _structure(case)
    if found is None or not found.bare or case.folder.headless:
        return None
    stated = case.folder.settings["architectures"][0]
    evidence = (
        f"the names are the backbone's ({next(iter(case.clean))}), but the class is {stated}",
        "transformers loads it, vLLM (but for pooling) and mlx-lm refuse it",
    )
    renamed = {
        own: f"model.{clean}" for clean, own in case.clean.items() if not clean.startswith("lm_")
    }
    return Signs(evidence, Repair("`model.` is put before the names", renamed=renamed))


def config_fields(case: Case) -> Signs | None:
    """Fields that releases of the model have, and that transformers 5 leaves out."""
    found = fields.missing(case.folder.settings)
    if not found:
        return None
    evidence = (
        f"config.json does not state {some(each.path for each in found)}",
        "programs that expect a release's config use their own defaults, or refuse",
    )
    patches = {each.path: each.value for each in found}
    return Signs(evidence, Repair("they are written as the release has them", patches))
